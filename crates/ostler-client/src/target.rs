//! Where the server is and who asks.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use http::uri::{Authority, Uri};

use crate::LocalService;

/// Where the server is.
#[derive(Clone)]
pub enum Target {
    /// A unix socket on this machine: `unix:///var/lib/ostler/ostler.sock`.
    Unix(PathBuf),
    /// `https://host:port`, with the authorities that its certificate may come from.
    Https { authority: Authority, ca: Ca },
    /// `http://127.0.0.1:port`: loopback only, since it is not encrypted.
    Http(Authority),
    /// A service in this process.
    Local(LocalService),
}

/// Whose signature on a server's certificate is trusted.
#[derive(Clone, Default)]
pub enum Ca {
    /// The authorities of this machine.
    #[default]
    System,
    /// Only these certificates.
    Pem(Vec<u8>),
    /// Only the certificates in this file.
    File(PathBuf),
}

/// A text that is not an address of a server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error(
        "{0:?} is not a server's address: write unix:///PATH, https://HOST[:PORT] or http://127.0.0.1:PORT"
    )]
    Malformed(String),
    #[error("{0:?} is plain HTTP to another machine, which anybody on the way can read: use https://")]
    NotLoopback(String),
}

impl Target {
    /// The same server, trusting `ca`; nothing changes where there is no TLS.
    #[must_use]
    pub fn with_ca(self, ca: Ca) -> Self {
        match self {
            Self::Https { authority, .. } => Self::Https { authority, ca },
            other @ (Self::Unix(_) | Self::Http(_) | Self::Local(_)) => other,
        }
    }

    /// The `Host` header: meaningless but required where there is no host.
    pub(crate) fn authority(&self) -> Authority {
        match self {
            Self::Https { authority, .. } | Self::Http(authority) => authority.clone(),
            Self::Unix(_) | Self::Local(_) => Authority::from_static("localhost"),
        }
    }
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let malformed = || TargetError::Malformed(text.to_owned());
        if let Some(path) = text.strip_prefix("unix://") {
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(malformed()) };
        }
        let uri: Uri = text.trim_end_matches('/').parse().map_err(|_| malformed())?;
        let authority = uri.authority().ok_or_else(malformed)?.clone();
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() || authority.as_str().contains('@') {
            return Err(malformed());
        }
        match uri.scheme_str() {
            Some("https") => Ok(Self::Https { authority, ca: Ca::System }),
            Some("http") if is_loopback(authority.host()) => Ok(Self::Http(authority)),
            Some("http") => Err(TargetError::NotLoopback(text.to_owned())),
            _ => Err(malformed()),
        }
    }
}

/// The host without the brackets of an IPv6 address.
pub(crate) fn bare_host(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || bare_host(host).parse::<IpAddr>().is_ok_and(|addr| addr.is_loopback())
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Https { authority, .. } => write!(f, "https://{authority}"),
            Self::Http(authority) => write!(f, "http://{authority}"),
            Self::Local(_) => f.write_str("this process"),
        }
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Target({self})")
    }
}

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Who asks. On a unix socket the server knows the user by itself.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// `ostler_ID_SECRET`.
    pub token: Option<Secret>,
}

impl Credentials {
    pub fn none() -> Self {
        Self::default()
    }

    pub fn token(secret: impl Into<String>) -> Self {
        Self { token: Some(Secret::new(secret)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_and_print_the_same() {
        for text in [
            "unix:///run/x.sock",
            "https://cloud.example:8550",
            "http://127.0.0.1:80",
            "http://[::1]:8",
            "http://localhost",
        ] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_texts_are_refused_with_what_to_write() {
        for bad in [
            "",
            "cloud.example",
            "unix://relative",
            "unix:/x",
            "ftp://x",
            "https://h/path",
            "https://u:p@h",
            "https://h?q=1",
        ] {
            assert!(matches!(bad.parse::<Target>(), Err(TargetError::Malformed(_))), "{bad}");
        }
        for far in ["http://10.0.0.1:80", "http://cloud.example", "http://127.evil.example"] {
            assert!(matches!(far.parse::<Target>(), Err(TargetError::NotLoopback(_))), "{far}");
        }
    }

    #[test]
    fn a_token_does_not_print() {
        assert!(!format!("{:?}", Credentials::token("hush")).contains("hush"));
    }
}
