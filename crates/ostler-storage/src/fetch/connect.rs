//! One connection per request, to an address that was resolved and checked once.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use http::{Request, Response, header};
use http_body_util::Empty;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::{FetchError, FetchPolicy, Target, address::is_public, chain};

/// Makes the requests of one download.
pub(super) struct Connector<'a> {
    policy: &'a FetchPolicy,
    /// Addresses by host and port, resolved once for the whole download.
    pinned: HashMap<(String, u16), Vec<SocketAddr>>,
    /// Drives the connection of the current request; dropped with the connector.
    driver: JoinSet<()>,
}

impl<'a> Connector<'a> {
    pub(super) fn new(policy: &'a FetchPolicy) -> Self {
        Self { policy, pinned: HashMap::new(), driver: JoinSet::new() }
    }

    /// Sends a GET; with `range`, for the bytes from an offset on, if the file is still the one that the validator names.
    pub(super) async fn get(
        &mut self,
        target: &Target,
        range: Option<(u64, &str)>,
    ) -> Result<Response<Incoming>, FetchError> {
        self.driver.abort_all();
        let addresses = self.resolve(target).await?;
        let stream = self.connect(target, &addresses).await?;
        let mut request = Request::get(target.path())
            .header(header::HOST, target.authority())
            .header(header::USER_AGENT, concat!("ostler/", env!("CARGO_PKG_VERSION")))
            .header(header::ACCEPT, "*/*")
            .header(header::ACCEPT_ENCODING, "identity")
            .header(header::CONNECTION, "close");
        if let Some((offset, validator)) = range {
            request =
                request.header(header::RANGE, format!("bytes={offset}-")).header(header::IF_RANGE, validator);
        }
        let request = request
            .body(Empty::new())
            .map_err(|error| FetchError::InvalidUrl { url: target.to_string(), why: error.to_string() })?;
        if target.is_tls() {
            let stream = self.handshake(target, stream).await?;
            self.send(target, stream, request).await
        } else {
            self.send(target, stream, request).await
        }
    }

    /// Sends the request and waits for the head of the response.
    async fn send<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        &mut self,
        target: &Target,
        stream: S,
        request: Request<Empty<Bytes>>,
    ) -> Result<Response<Incoming>, FetchError> {
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(target, &error))?;
        self.driver.spawn(async move {
            // An error ends the response's body too, and is told there.
            let _ = connection.await;
        });
        let idle = self.policy.idle_timeout;
        timeout(idle, sender.send_request(request))
            .await
            .map_err(|_| self.timed_out(target, idle))?
            .map_err(|error| broken(target, &error))
    }

    /// The addresses of the target's host, every one of which must be allowed.
    async fn resolve(&mut self, target: &Target) -> Result<Vec<SocketAddr>, FetchError> {
        let key = (target.host().to_owned(), target.port());
        if let Some(addresses) = self.pinned.get(&key) {
            return Ok(addresses.clone());
        }
        let wait = self.policy.connect_timeout;
        let unresolved = |why: String| FetchError::Unresolved { host: target.host().to_owned(), why };
        let addresses: Vec<SocketAddr> =
            timeout(wait, tokio::net::lookup_host((target.host(), target.port())))
                .await
                .map_err(|_| self.timed_out(target, wait))?
                .map_err(|error| unresolved(error.to_string()))?
                .collect();
        if addresses.is_empty() {
            return Err(unresolved("it has no address".to_owned()));
        }
        if !self.policy.allow_private
            && let Some(address) = addresses
                .iter()
                .find(|address| !is_public(address.ip()) && !self.policy.allowed.contains(&address.ip()))
        {
            return Err(FetchError::Forbidden { host: target.host().to_owned(), address: address.ip() });
        }
        self.pinned.insert(key, addresses.clone());
        Ok(addresses)
    }

    async fn connect(&self, target: &Target, addresses: &[SocketAddr]) -> Result<TcpStream, FetchError> {
        let wait = self.policy.connect_timeout;
        let mut last = self.timed_out(target, wait);
        for address in addresses {
            match timeout(wait, TcpStream::connect(address)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => last = broken(target, &error),
                Err(_) => last = self.timed_out(target, wait),
            }
        }
        Err(last)
    }

    async fn handshake(
        &self,
        target: &Target,
        stream: TcpStream,
    ) -> Result<tokio_rustls::client::TlsStream<TcpStream>, FetchError> {
        let name = ServerName::try_from(target.host().to_owned())
            .map_err(|error| FetchError::InvalidUrl { url: target.to_string(), why: error.to_string() })?;
        let wait = self.policy.connect_timeout;
        let connector = TlsConnector::from(tls_config());
        timeout(wait, connector.connect(name, stream))
            .await
            .map_err(|_| self.timed_out(target, wait))?
            .map_err(|error| broken(target, &error))
    }

    fn timed_out(&self, target: &Target, after: std::time::Duration) -> FetchError {
        FetchError::TimedOut { host: target.host().to_owned(), seconds: after.as_secs() }
    }
}

fn broken(target: &Target, error: &dyn std::error::Error) -> FetchError {
    FetchError::Broken { host: target.host().to_owned(), why: chain(error) }
}

/// TLS with the certificates that this machine trusts, read once.
fn tls_config() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    CONFIG
        .get_or_init(|| {
            let mut roots = RootCertStore::empty();
            let native = rustls_native_certs::load_native_certs();
            for error in &native.errors {
                tracing::warn!(%error, "a trusted certificate could not be read");
            }
            roots.add_parsable_certificates(native.certs);
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let config = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .expect("ring has the default protocol versions")
                .with_root_certificates(roots)
                .with_no_client_auth();
            Arc::new(config)
        })
        .clone()
}
