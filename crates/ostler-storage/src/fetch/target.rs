//! A checked URL.

use std::fmt;

use http::{Uri, uri::Scheme};

use super::FetchError;

/// An http or https URL without credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    uri: Uri,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uri.fmt(f)
    }
}

impl Target {
    pub(super) fn parse(url: &str) -> Result<Self, FetchError> {
        let invalid = |why: String| FetchError::InvalidUrl { url: without_credentials(url), why };
        let (bare, _fragment) = url.split_once('#').unwrap_or((url, ""));
        let uri: Uri = bare.parse().map_err(|error: http::uri::InvalidUri| invalid(error.to_string()))?;
        match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP || *scheme == Scheme::HTTPS => {}
            Some(scheme) => return Err(invalid(format!("{scheme} is neither http nor https"))),
            None => return Err(invalid("it must begin with http:// or https://".to_owned())),
        }
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        if authority.contains('@') {
            return Err(invalid(
                "a user name or password in a URL ends up in logs; it is not supported".to_owned(),
            ));
        }
        if uri.host().is_none_or(str::is_empty) {
            return Err(invalid("it names no host".to_owned()));
        }
        if authority.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']'))
            && uri.port_u16().is_none()
        {
            return Err(invalid("the port is not a number from 0 to 65535".to_owned()));
        }
        Ok(Self { uri })
    }

    /// The target of a redirect: an absolute URL, or one relative to this.
    pub(super) fn join(&self, location: &str) -> Result<Self, FetchError> {
        let authority = self.uri.authority().map_or("", |authority| authority.as_str());
        let scheme = self.scheme();
        let absolute = if location.contains("://") && !location.starts_with('/') {
            location.to_owned()
        } else if let Some(rest) = location.strip_prefix("//") {
            format!("{scheme}://{rest}")
        } else if location.starts_with('/') {
            format!("{scheme}://{authority}{location}")
        } else if location.starts_with('?') {
            format!("{scheme}://{authority}{}{location}", self.uri.path())
        } else {
            let folder = self.uri.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            format!("{scheme}://{authority}{folder}/{location}")
        };
        let target = Self::parse(&absolute)?;
        if self.is_tls() && !target.is_tls() {
            return Err(FetchError::InvalidUrl {
                url: target.to_string(),
                why: "an https URL must not redirect to http".to_owned(),
            });
        }
        Ok(target)
    }

    pub(super) fn is_tls(&self) -> bool {
        self.uri.scheme() == Some(&Scheme::HTTPS)
    }

    fn scheme(&self) -> &'static str {
        if self.is_tls() { "https" } else { "http" }
    }

    /// The host without the brackets of an IPv6 address.
    pub(super) fn host(&self) -> &str {
        let host = self.uri.host().unwrap_or("");
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
    }

    pub(super) fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(if self.is_tls() { 443 } else { 80 })
    }

    /// What the `Host` header says.
    pub(super) fn authority(&self) -> &str {
        self.uri.authority().map_or("", |authority| authority.as_str())
    }

    /// Path and query, as the request line has them.
    pub(super) fn path(&self) -> &str {
        self.uri.path_and_query().map_or("/", |path| path.as_str())
    }
}

/// A URL as it may be shown: a password typed by mistake is left out.
fn without_credentials(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match rest[..end].rfind('@') {
        Some(at) => format!("{scheme}://…{}", &rest[at..]),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_http_and_https_without_credentials() {
        for url in [
            "file:///etc/passwd",
            "ftp://host/file",
            "/etc/passwd",
            "image.qcow2",
            "",
            "http://",
            "http:///x",
            "gopher://host/",
            "http://host:99999/",
            "data:text/plain,hello",
            "json:{}",
        ] {
            assert!(matches!(Target::parse(url), Err(FetchError::InvalidUrl { .. })), "{url}");
        }
        let error = Target::parse("https://user:secret@host/x").unwrap_err().to_string();
        assert!(!error.contains("secret") && error.contains("…@host"), "{error}");
    }

    #[test]
    fn parts_are_what_the_request_needs() {
        let target = Target::parse("https://[2001:db8::1]:8443/a/b?c=d#e").unwrap();
        assert_eq!((target.host(), target.port(), target.path()), ("2001:db8::1", 8443, "/a/b?c=d"));
        let target = Target::parse("HTTP://example.org").unwrap();
        assert_eq!((target.host(), target.port(), target.path()), ("example.org", 80, "/"));
    }

    #[test]
    fn redirects_are_relative_or_absolute_and_never_weaker() {
        let from = Target::parse("https://a.example:8443/one/two?x=y").unwrap();
        let to = |location: &str| from.join(location).map(|target| target.to_string());
        assert_eq!(to("/three").unwrap(), "https://a.example:8443/three");
        assert_eq!(to("three").unwrap(), "https://a.example:8443/one/three");
        assert_eq!(to("?z").unwrap(), "https://a.example:8443/one/two?z");
        assert_eq!(to("//b.example/x").unwrap(), "https://b.example/x");
        assert_eq!(to("https://b.example/x").unwrap(), "https://b.example/x");
        assert_eq!(to("http://b.example/x").unwrap_err().code(), "invalid_url");
        assert_eq!(to("file:///etc/passwd").unwrap_err().code(), "invalid_url");
    }
}
