//! Opening connections: unix, TCP, TLS. Used by the pool and, for WebSockets, directly.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::uri::{Authority, Uri};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tower::Service;

use crate::target::bare_host;
use crate::tls::{Tls, tls};
use crate::{LocalService, Result, Target, local};

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// An open connection of any kind.
pub(crate) struct Conn(Box<dyn Io>);

impl Conn {
    pub(crate) fn new(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        Self(Box::new(io))
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Conn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }
    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }
}

impl Connection for Conn {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// Why a connection did not come to be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("no connection")]
    Io(#[source] io::Error),
    #[error("the TLS handshake failed")]
    Tls(#[source] io::Error),
}

enum Way {
    Unix(Box<Path>),
    Tcp(Authority, u16),
    Tls(Authority, u16, Tls),
    Local(LocalService),
}

/// Opens connections to one server.
#[derive(Clone)]
pub(crate) struct Dialer {
    way: Arc<Way>,
    timeout: Duration,
}

impl Dialer {
    pub(crate) fn new(target: &Target, timeout: Duration) -> Result<Self> {
        let way = match target {
            Target::Local(service) => Way::Local(service.clone()),
            Target::Unix(path) => Way::Unix(path.as_path().into()),
            Target::Http(authority) => Way::Tcp(authority.clone(), authority.port_u16().unwrap_or(80)),
            Target::Https { authority, ca } => {
                let settings = tls(authority.host(), ca, &target.to_string())?;
                Way::Tls(authority.clone(), authority.port_u16().unwrap_or(443), settings)
            }
        };
        Ok(Self { way: Arc::new(way), timeout })
    }

    pub(crate) async fn dial(&self) -> Result<Conn, DialError> {
        let late = || {
            DialError::Io(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer within {} s", self.timeout.as_secs_f64()),
            ))
        };
        tokio::time::timeout(self.timeout, self.dial_unhurried()).await.map_err(|_| late())?
    }

    async fn dial_unhurried(&self) -> Result<Conn, DialError> {
        match &*self.way {
            Way::Local(service) => Ok(Conn::new(local::connect(service))),
            Way::Unix(path) => UnixStream::connect(path).await.map(Conn::new).map_err(DialError::Io),
            Way::Tcp(authority, port) => Ok(Conn::new(tcp(authority, *port).await?)),
            Way::Tls(authority, port, settings) => {
                let tcp = tcp(authority, *port).await?;
                let connector = TlsConnector::from(settings.config.clone());
                connector.connect(settings.name.clone(), tcp).await.map(Conn::new).map_err(DialError::Tls)
            }
        }
    }
}

async fn tcp(authority: &Authority, port: u16) -> Result<TcpStream, DialError> {
    let stream = TcpStream::connect((bare_host(authority.host()), port)).await.map_err(DialError::Io)?;
    // Requests are small and waited for.
    stream.set_nodelay(true).map_err(DialError::Io)?;
    Ok(stream)
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<Conn>;
    type Error = DialError;
    type Future = BoxFuture<'static, Result<TokioIo<Conn>, DialError>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), DialError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: Uri) -> Self::Future {
        let dialer = self.clone();
        Box::pin(async move { dialer.dial().await.map(TokioIo::new) })
    }
}
