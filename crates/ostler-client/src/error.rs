//! What can go wrong between a caller and the server.

use std::io;
use std::time::Duration;

use ostler_api::{ErrorCode, Problem};

pub type Result<T, E = ClientError> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server said no, and why.
    #[error("{}", .0.detail)]
    Api(Box<Problem>),
    /// There is no connection to be had.
    #[error("cannot reach the server at {target}")]
    Connect { target: String, source: io::Error },
    /// The two ends do not agree on who the server is.
    #[error("no trusted connection to {target}")]
    Tls { target: String, source: io::Error },
    /// The connection was there and broke.
    #[error("the connection to {target} broke")]
    Broken { target: String, source: Box<dyn std::error::Error + Send + Sync> },
    /// The answer is not what this client understands.
    #[error("{0}")]
    Protocol(String),
    #[error("{what} took longer than {} s", after.as_secs_f64())]
    Timeout { what: String, after: Duration },
}

impl ClientError {
    /// The server's code, when the server answered.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Api(problem) => Some(problem.code),
            Self::Connect { .. }
            | Self::Tls { .. }
            | Self::Broken { .. }
            | Self::Protocol(_)
            | Self::Timeout { .. } => None,
        }
    }

    pub fn is_not_found(&self) -> bool {
        self.code() == Some(ErrorCode::NotFound)
    }

    /// Whether the same request may well succeed a moment later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Api(problem) => problem.code == ErrorCode::Unavailable,
            Self::Connect { .. } | Self::Broken { .. } | Self::Timeout { .. } => true,
            Self::Tls { .. } | Self::Protocol(_) => false,
        }
    }

    /// What to do, as the server or the kind of failure says.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Api(problem) => problem.hint.clone(),
            Self::Connect { source, .. } => Some(match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    "the socket is for the server's user and root: be one of them, or use a token over https".to_owned()
                }
                _ => "is `ostler serve` running there? Start it, or name another server with --host or OSTLER_HOST"
                    .to_owned(),
            }),
            Self::Tls { .. } => Some(
                "trust the server's own CA with --ca-cert or OSTLER_CA_CERT (ca.pem in its data directory)".to_owned(),
            ),
            Self::Broken { .. } => Some("see the server's log, then try again".to_owned()),
            Self::Protocol(_) => {
                Some("is this an Ostler server of this version? Compare with: ostler version".to_owned())
            }
            Self::Timeout { .. } => None,
        }
    }
}
