//! The server: binds its listeners, serves, and ends in order.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ostler_control::Cloud;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::config::{Limits, ServerConfig};
use crate::listen::{Acceptor, BindError, UnixSocket, accept_tcp, accept_unix, bind_plain, bind_tcp};
use crate::routes;
use crate::tls::ServerTls;

/// How often the certificate is looked at.
const RENEW_EVERY: Duration = Duration::from_secs(86_400);
/// For connections to notice that they were cut.
const CUT: Duration = Duration::from_secs(1);

/// Where a server really listens: with port 0 the system chose.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalAddrs {
    pub unix_socket: Option<PathBuf>,
    pub tls: Option<SocketAddr>,
    pub plain_http: Option<SocketAddr>,
}

/// A server whose sockets are bound; connections wait until [`Server::run`].
pub struct Server {
    app: App,
    addrs: LocalAddrs,
    unix: Option<UnixSocket>,
    tls: Option<(TcpListener, Arc<ServerTls>, TlsAcceptor)>,
    plain: Option<TcpListener>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("addrs", &self.addrs).finish_non_exhaustive()
    }
}

impl Server {
    /// Takes all of its addresses, or none.
    ///
    /// # Errors
    /// Says which address or file cannot be used and what to do.
    pub async fn bind(cloud: Arc<Cloud>, config: ServerConfig) -> Result<Self, BindError> {
        let ServerConfig { unix_socket, tls, plain_http, limits } = config;
        let plain = plain_http.map(bind_plain).transpose()?;
        let tls = match tls {
            None => None,
            Some(listen) => {
                let listener = bind_tcp(listen.addr)?;
                let tls = ServerTls::load(&listen)?;
                let acceptor = TlsAcceptor::from(tls.config()?);
                Some((listener, tls, acceptor))
            }
        };
        let unix = unix_socket.as_deref().map(UnixSocket::bind).transpose()?;
        let addr = |listener: &TcpListener| listener.local_addr().ok();
        let addrs = LocalAddrs {
            unix_socket,
            tls: tls.as_ref().and_then(|(listener, ..)| addr(listener)),
            plain_http: plain.as_ref().and_then(addr),
        };
        if addrs == LocalAddrs::default() {
            return Err(BindError::Nothing);
        }
        Ok(Self { app: app(cloud, limits), addrs, unix, tls, plain })
    }

    pub fn local_addrs(&self) -> &LocalAddrs {
        &self.addrs
    }

    /// Serves until `shutdown`; then takes nothing new, ends watches and waits, and lets requests in progress finish for
    /// the time of `Limits::grace`.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { app, addrs: _, unix, tls, plain } = self;
        let ending = app.shutdown.clone();
        let [(_, tcp_connections), (_, unix_connections)] = &app.connections;
        let router = routes::router(app.clone());
        let acceptor = |connections: &Arc<_>| Acceptor {
            router: router.clone(),
            limits: app.limits.clone(),
            connections: Arc::clone(connections),
            shutdown: ending.clone(),
        };
        let mut socket_file = None;
        if let Some(UnixSocket { listener, file }) = unix {
            socket_file = Some(file);
            ending.tasks.spawn(accept_unix(listener, acceptor(unix_connections)));
        }
        if let Some((listener, tls, tls_acceptor)) = tls {
            ending.tasks.spawn(accept_tcp(listener, Some(tls_acceptor), acceptor(tcp_connections)));
            ending.tasks.spawn(renew(tls, ending.closing.clone()));
        }
        if let Some(listener) = plain {
            ending.tasks.spawn(accept_tcp(listener, None, acceptor(tcp_connections)));
        }
        ending.tasks.close();

        shutdown.cancelled().await;
        // While its listener is still open, so that it cannot be another server's by now.
        drop(socket_file);
        ending.closing.cancel();
        if tokio::time::timeout(app.limits.grace, ending.tasks.wait()).await.is_err() {
            tracing::warn!(
                connections = ending.tasks.len(),
                grace_secs = app.limits.grace.as_secs(),
                "connections that did not finish in time are cut"
            );
            ending.kill.cancel();
            // What is cut ends at its next step; whatever does not goes with the process.
            let _ = tokio::time::timeout(CUT, ending.tasks.wait()).await;
        }
    }
}

async fn renew(tls: Arc<ServerTls>, closing: CancellationToken) {
    loop {
        tokio::select! {
            () = closing.cancelled() => return,
            () = tokio::time::sleep(RENEW_EVERY) => {}
        }
        let tls = Arc::clone(&tls);
        match tokio::task::spawn_blocking(move || tls.refresh()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "the certificate cannot be renewed; the old one stays in use")
            }
            Err(error) => tracing::error!(%error, "the renewal of the certificate broke off"),
        }
    }
}

fn app(cloud: Arc<Cloud>, limits: Limits) -> App {
    App::new(cloud, limits, Bytes::from(routes::openapi_json()))
}

/// The API as a service within this process, without sockets. Callers are known by their bearer tokens alone.
pub fn router(cloud: Arc<Cloud>) -> axum::Router {
    routes::router(app(cloud, Limits::default()))
}
