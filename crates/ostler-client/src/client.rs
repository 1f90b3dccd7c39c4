//! The client: a shared link to one server, with the caller's credentials and time limits.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;

use crate::transport::Link;
use crate::{ClientError, Credentials, Result, Target};

/// How long to wait and how often to try.
#[derive(Debug, Clone)]
pub struct Options {
    /// For a connection, TLS included.
    pub connect_timeout: Duration,
    /// From sending a request to the end of its answer; what a request waits for on purpose is added.
    pub request_timeout: Duration,
    /// Longest silence on a watch; the server sends a bookmark every few seconds.
    pub stream_idle: Duration,
    pub retry: Retry,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(60),
            stream_idle: Duration::from_secs(30),
            retry: Retry::default(),
        }
    }
}

/// What to do when a connection fails. Only requests that may safely arrive twice are repeated.
#[derive(Debug, Clone)]
pub struct Retry {
    /// All tries together; 1 is none but the first.
    pub attempts: u32,
    /// Before the second try; doubles with each further one.
    pub delay: Duration,
    /// Whether to try again when no connection was to be had at all (the server may be starting).
    pub refused: bool,
}

impl Default for Retry {
    fn default() -> Self {
        Self { attempts: 3, delay: Duration::from_millis(100), refused: false }
    }
}

impl Retry {
    pub const NONE: Self = Self { attempts: 1, delay: Duration::ZERO, refused: false };

    /// The pause after the `attempt`-th failed try, `None` when `error` ends it.
    pub(crate) fn pause(&self, attempt: u32, error: &ClientError) -> Option<Duration> {
        let again = match error {
            ClientError::Broken { .. } => true,
            ClientError::Connect { .. } => self.refused,
            ClientError::Api(_)
            | ClientError::Tls { .. }
            | ClientError::Protocol(_)
            | ClientError::Timeout { .. } => false,
        };
        (again && attempt < self.attempts)
            .then(|| self.delay.saturating_mul(1 << attempt.saturating_sub(1).min(6)))
    }
}

/// A client of one server. Clones share connections.
#[derive(Clone)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
    project: Option<Arc<str>>,
}

pub(crate) struct Shared {
    pub(crate) link: Link,
    pub(crate) authorization: Option<HeaderValue>,
    pub(crate) options: Options,
}

impl Client {
    /// Nothing is sent yet: a connection is opened with the first request.
    ///
    /// # Errors
    /// The CA cannot be read, or the token has characters that no token has.
    pub fn connect(target: Target, credentials: Credentials) -> Result<Self> {
        Self::with_options(target, credentials, Options::default())
    }

    /// # Errors
    /// As [`Client::connect`].
    pub fn with_options(target: Target, credentials: Credentials, options: Options) -> Result<Self> {
        let link = Link::new(target, options.connect_timeout)?;
        let authorization = match credentials.token {
            None => None,
            Some(secret) => {
                let mut value =
                    HeaderValue::try_from(format!("Bearer {}", secret.expose())).map_err(|_| {
                        ClientError::Protocol("the token has characters that no token has".to_owned())
                    })?;
                value.set_sensitive(true);
                Some(value)
            }
        };
        Ok(Self { shared: Arc::new(Shared { link, authorization, options }), project: None })
    }

    /// The same client, working in `project` instead of the caller's own.
    #[must_use]
    pub fn in_project(&self, project: impl Into<Arc<str>>) -> Self {
        Self { shared: self.shared.clone(), project: Some(project.into()) }
    }

    pub fn project(&self) -> Option<&str> {
        self.project.as_deref()
    }

    /// The server's address, for messages.
    pub fn target(&self) -> &str {
        self.shared.link.target()
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("target", &self.target()).field("project", &self.project).finish()
    }
}
