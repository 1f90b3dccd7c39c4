//! One request over whichever way there is.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use http::uri::{Authority, Scheme};
use http::{Request, Response};
use hyper_util::client::legacy;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use crate::body::{self, Body};
use crate::dial::{Conn, DialError, Dialer};
use crate::{ClientError, LocalService, Result, Target, local};

const IDLE_MAX: usize = 8;
const IDLE_FOR: Duration = Duration::from_secs(30);

enum Transport {
    Pool(Box<legacy::Client<Dialer, Body>>),
    /// No pool and no connections: a thousand of these cost next to nothing.
    Local(LocalService),
}

/// A way to the server with its name for messages.
pub(crate) struct Link {
    transport: Transport,
    dialer: Dialer,
    pub(crate) scheme: Scheme,
    pub(crate) authority: Authority,
    target: Box<str>,
}

impl Link {
    pub(crate) fn new(target: Target, connect_timeout: Duration) -> Result<Self> {
        let name = target.to_string().into_boxed_str();
        let authority = target.authority();
        let dialer = Dialer::new(&target, connect_timeout)?;
        let scheme = match &target {
            Target::Https { .. } => Scheme::HTTPS,
            Target::Unix(_) | Target::Http(_) | Target::Local(_) => Scheme::HTTP,
        };
        let transport = match target {
            Target::Local(service) => Transport::Local(service),
            Target::Unix(_) | Target::Http(_) | Target::Https { .. } => Transport::Pool(Box::new(
                legacy::Client::builder(TokioExecutor::new())
                    .pool_timer(TokioTimer::new())
                    .pool_idle_timeout(IDLE_FOR)
                    .pool_max_idle_per_host(IDLE_MAX)
                    .build(dialer.clone()),
            )),
        };
        Ok(Self { transport, dialer, scheme, authority, target: name })
    }

    pub(crate) fn target(&self) -> &str {
        &self.target
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Result<Response<Body>> {
        match &self.transport {
            Transport::Pool(pool) => {
                let answer = pool.request(request).await.map_err(|e| self.sending(e))?;
                Ok(answer.map(body::incoming))
            }
            Transport::Local(service) => local::call(service, request).await.map_err(|e| self.broken(e)),
        }
    }

    /// A connection of its own, for a WebSocket.
    pub(crate) async fn connection(&self) -> Result<Conn> {
        self.dialer.dial().await.map_err(|e| self.dialling(&e))
    }

    pub(crate) fn broken(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        ClientError::Broken { target: self.target.to_string(), source: source.into() }
    }

    fn sending(&self, error: legacy::Error) -> ClientError {
        let mut cause = error.source();
        while let Some(inner) = cause {
            if let Some(dial) = inner.downcast_ref::<DialError>() {
                return self.dialling(dial);
            }
            cause = inner.source();
        }
        self.broken(error)
    }

    fn dialling(&self, error: &DialError) -> ClientError {
        let target = self.target.to_string();
        // The error inside is borrowed from the pool's: its kind and text are what a caller needs.
        let copy = |source: &io::Error| io::Error::new(source.kind(), source.to_string());
        match error {
            DialError::Io(source) => ClientError::Connect { target, source: copy(source) },
            DialError::Tls(source) => ClientError::Tls { target, source: copy(source) },
        }
    }
}
