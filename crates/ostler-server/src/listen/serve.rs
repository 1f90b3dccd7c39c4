//! Accept loops and the life of one connection.
//!
//! What always holds: a connection has its own task, so a slow or hostile client holds nothing but itself; every wait
//! for a client's bytes has an end; a version of HTTP is never guessed from the first bytes, which would have none.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use ostler_api::{ApiError, ErrorCode};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::connections::{Connections, Held, Permit};
use crate::config::Limits;
use crate::identity::Peer;
use crate::idle::Activity;
use crate::problem::PROBLEM_JSON;

/// For an idle connection to take leave.
const LINGER: Duration = Duration::from_secs(1);

/// How connections come to their end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shutdown {
    /// No new connections and requests; running ones may finish.
    pub(crate) closing: CancellationToken,
    /// Now.
    pub(crate) kill: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

/// What an accept loop needs for a connection.
#[derive(Debug, Clone)]
pub(crate) struct Acceptor {
    pub(crate) router: axum::Router,
    pub(crate) limits: Limits,
    pub(crate) connections: Arc<Connections>,
    pub(crate) shutdown: Shutdown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Http1,
    Http2,
}

/// Accepts over TCP, with TLS where an acceptor is given.
pub(crate) async fn accept_tcp(listener: TcpListener, tls: Option<TlsAcceptor>, acceptor: Acceptor) {
    loop {
        let (stream, addr) = tokio::select! {
            () = acceptor.shutdown.closing.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    after_error(&error).await;
                    continue;
                }
            },
        };
        let acceptor = acceptor.clone();
        let Some(permit) = acceptor.connections.admit(Some(addr.ip())) else {
            if tls.is_none() {
                refuse(stream, &acceptor);
            }
            continue;
        };
        let tls = tls.clone();
        let tasks = acceptor.shutdown.tasks.clone();
        tasks.spawn(async move {
            match tls {
                None => acceptor.connection(stream, Peer::Tcp(addr), Protocol::Http1, permit).await,
                Some(tls) => acceptor.tls_connection(tls, stream, addr, permit).await,
            }
        });
    }
}

/// Accepts on the unix socket, and asks the kernel who is there.
pub(crate) async fn accept_unix(listener: UnixListener, acceptor: Acceptor) {
    loop {
        let stream = tokio::select! {
            () = acceptor.shutdown.closing.cancelled() => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    after_error(&error).await;
                    continue;
                }
            },
        };
        let acceptor = acceptor.clone();
        let Some(permit) = acceptor.connections.admit(None) else {
            refuse(stream, &acceptor);
            continue;
        };
        let peer = match stream.peer_cred() {
            Ok(credentials) => Peer::Unix { uid: credentials.uid() },
            Err(error) => {
                tracing::warn!(%error, "the kernel does not say who is on the unix socket");
                continue;
            }
        };
        let tasks = acceptor.shutdown.tasks.clone();
        tasks.spawn(async move { acceptor.connection(stream, peer, Protocol::Http1, permit).await });
    }
}

/// Out of descriptors or memory: accepting again at once would only spin.
async fn after_error(error: &io::Error) {
    let passing = matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    );
    if !passing {
        tracing::warn!(%error, "a connection cannot be accepted");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Tells a client that comes one too many that it may come again, if it takes that without waiting.
fn refuse<IO: AsyncRead + AsyncWrite + Unpin + Send + 'static>(mut stream: IO, acceptor: &Acceptor) {
    let error =
        ApiError::new(ErrorCode::Unavailable, "there are too many connections").hint("try again in a moment");
    let body = serde_json::to_string(&error.problem(None)).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: {PROBLEM_JSON}\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let timeout = acceptor.limits.handshake_timeout.min(Duration::from_secs(1));
    acceptor.shutdown.tasks.spawn(async move {
        // Nobody is owed this answer: a client that does not take it in time gets none.
        let _ = tokio::time::timeout(timeout, async {
            stream.write_all(answer.as_bytes()).await?;
            stream.shutdown().await
        })
        .await;
    });
}

impl Acceptor {
    async fn tls_connection(
        self,
        tls: TlsAcceptor,
        stream: tokio::net::TcpStream,
        addr: SocketAddr,
        permit: Permit,
    ) {
        let handshake = tokio::time::timeout(self.limits.handshake_timeout, tls.accept(stream));
        let stream = tokio::select! {
            () = self.shutdown.closing.cancelled() => return,
            done = handshake => match done {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => {
                    tracing::debug!(%addr, %error, "TLS handshake failed");
                    return;
                }
                Err(_) => {
                    tracing::debug!(%addr, "TLS handshake took too long");
                    return;
                }
            },
        };
        let protocol = match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => Protocol::Http2,
            _ => Protocol::Http1,
        };
        self.connection(stream, Peer::Tcp(addr), protocol, permit).await;
    }

    async fn connection<IO>(self, stream: IO, peer: Peer, protocol: Protocol, permit: Permit)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let activity = Activity::new();
        let held = Held::new(permit);
        let service = {
            let (router, activity, held) = (self.router.clone(), activity.clone(), held.clone());
            hyper::service::service_fn(move |request: Request<Incoming>| {
                let (router, activity) = (router.clone(), activity.clone());
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(peer);
                request.extensions_mut().insert(held.clone());
                async move {
                    let busy = activity.enter();
                    let response: Response<Body> = match router.oneshot(request).await {
                        Ok(response) => response,
                        Err(never) => match never {},
                    };
                    Ok::<_, Infallible>(response.map(|body| busy.hold(body)))
                }
            })
        };
        match protocol {
            Protocol::Http1 => {
                let connection = self.http1().serve_connection(TokioIo::new(stream), service).with_upgrades();
                // HTTP/1 has the head's timeout for idle connections.
                self.drive(connection, |c| c.graceful_shutdown(), peer, &activity, Duration::MAX).await;
            }
            Protocol::Http2 => {
                let connection = self.http2().serve_connection(TokioIo::new(stream), service);
                let limit = self.limits.keepalive;
                self.drive(connection, |c| c.graceful_shutdown(), peer, &activity, limit).await;
            }
        }
    }

    /// Serves a connection to its end: its own, the server's, or that of our patience.
    async fn drive<C: Future<Output = hyper::Result<()>>>(
        &self,
        connection: C,
        take_leave: impl Fn(Pin<&mut C>),
        peer: Peer,
        activity: &Activity,
        idle_limit: Duration,
    ) {
        let mut connection = pin!(connection);
        let mut idle = pin!(activity.idle(idle_limit));
        let mut closing = false;
        loop {
            tokio::select! {
                result = connection.as_mut() => {
                    if let Err(error) = result {
                        tracing::debug!(%peer, %error, "connection ended early");
                    }
                    return;
                }
                () = self.shutdown.kill.cancelled() => return,
                () = self.shutdown.closing.cancelled(), if !closing => {}
                () = &mut idle => {
                    if closing {
                        return;
                    }
                }
            }
            closing = true;
            take_leave(connection.as_mut());
            // Who has no request in progress and does not go, as one that never began to speak, is not waited for.
            idle.set(activity.idle(LINGER));
        }
    }

    fn http1(&self) -> http1::Builder {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_timeout)
            .max_headers(64)
            .max_buf_size(64 * 1024);
        builder
    }

    fn http2(&self) -> http2::Builder<TokioExecutor> {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(128)
            .max_header_list_size(32 * 1024)
            .keep_alive_interval(self.limits.keepalive / 2)
            .keep_alive_timeout(self.limits.header_timeout);
        builder
    }
}
