//! A server in this process, and a plain HTTP client that hides nothing.

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use ostler_api::project::Project;
use ostler_api::{Metadata, Name, Problem};
use ostler_control::{Cloud, CloudConfig};
use ostler_server::{Limits, LocalAddrs, Server, ServerConfig, TlsIdentity, TlsListen};
use ostler_storage::ImageStore;
use ostler_store::{MemoryStore, Store, Txn, TxnOutcome};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

/// Longest time for anything that is waited for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send + Debug {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send + Debug> Io for T {}

/// A running server with all three listeners.
pub(crate) struct Site {
    pub(crate) cloud: Arc<Cloud>,
    store: Arc<MemoryStore>,
    pub(crate) addrs: LocalAddrs,
    pub(crate) dir: TempDir,
    pub(crate) shutdown: CancellationToken,
    running: Mutex<JoinHandle<()>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Via {
    Unix,
    Plain,
    /// TLS with HTTP/1.1.
    Tls,
    /// TLS with HTTP/2.
    Tls2,
}

pub(crate) async fn cloud(dir: &TempDir, store: Arc<MemoryStore>) -> Arc<Cloud> {
    let images = Arc::new(ImageStore::open(dir.path().join("images")).unwrap());
    Cloud::open(store, images, CloudConfig::default()).await.unwrap()
}

pub(crate) fn config(dir: &TempDir, limits: Limits) -> ServerConfig {
    let any = "127.0.0.1:0".parse().unwrap();
    ServerConfig {
        unix_socket: Some(dir.path().join("api.sock")),
        tls: Some(TlsListen {
            addr: any,
            identity: TlsIdentity::Own { dir: dir.path().join("tls"), names: Vec::new() },
        }),
        plain_http: Some(any),
        limits,
    }
}

impl Site {
    pub(crate) async fn start() -> Self {
        Self::with(Limits::default()).await
    }

    pub(crate) async fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(MemoryStore::new());
        let cloud = cloud(&dir, Arc::clone(&store)).await;
        let server = Server::bind(Arc::clone(&cloud), config(&dir, limits)).await.unwrap();
        let addrs = server.local_addrs().clone();
        let shutdown = CancellationToken::new();
        cloud.run_controllers(shutdown.child_token());
        let running = Mutex::new(tokio::spawn(server.run(shutdown.clone())));
        Self { cloud, store, addrs, dir, shutdown, running }
    }

    pub(crate) fn tls_dir(&self) -> PathBuf {
        self.dir.path().join("tls")
    }

    pub(crate) async fn connect(&self, via: Via) -> Box<dyn Io> {
        match via {
            Via::Unix => {
                Box::new(UnixStream::connect(self.addrs.unix_socket.as_ref().unwrap()).await.unwrap())
            }
            Via::Plain => Box::new(TcpStream::connect(self.addrs.plain_http.unwrap()).await.unwrap()),
            Via::Tls | Via::Tls2 => {
                let ca = CertificateDer::from_pem_file(ostler_server::ca_path(&self.tls_dir())).unwrap();
                let alpn = if via == Via::Tls2 { "h2" } else { "http/1.1" };
                Box::new(self.tls_connect(ca, "localhost", alpn).await.unwrap())
            }
        }
    }

    pub(crate) async fn tls_connect(
        &self,
        ca: CertificateDer<'static>,
        name: &'static str,
        alpn: &str,
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(ca).unwrap();
        let mut config =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
        config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let stream = TcpStream::connect(self.addrs.tls.unwrap()).await.unwrap();
        TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(name).unwrap(), stream).await
    }

    /// A request as the local administrator.
    pub(crate) fn ask(&self, method: Method, path: &str) -> Ask<'_> {
        Ask {
            site: self,
            via: Via::Unix,
            method,
            path: path.to_owned(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
        }
    }

    pub(crate) fn get(&self, path: &str) -> Ask<'_> {
        self.ask(Method::GET, path)
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Ask<'_> {
        self.ask(Method::POST, path).json(body)
    }

    /// A fresh token's secret.
    pub(crate) async fn token(&self, spec: Value) -> String {
        let answer = self.post("/v1/tokens", &spec).send().await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.text());
        answer.json()["secret"].as_str().unwrap().to_owned()
    }

    /// A further project. There is no route that makes one yet, so it is put where the store keeps them.
    pub(crate) async fn project(&self, name: &str) {
        let id = uuid::Uuid::now_v7();
        let project = Project { metadata: Metadata::new(id, Name::new(name).unwrap(), None) };
        let txn = Txn::new()
            .put(format!("r/project/-/{id}"), serde_json::to_vec(&project).unwrap())
            .put(format!("n/project/-/{name}"), id.to_string());
        assert!(matches!(self.store.txn(txn).await.unwrap(), TxnOutcome::Committed { .. }));
        let path = format!("/v1/projects?name={name}");
        until("the project", || async {
            let found = self.get(&path).send().await;
            (found.json()["items"].as_array().map(Vec::len) == Some(1)).then_some(())
        })
        .await;
    }

    pub(crate) async fn node(&self, name: &str) {
        let facts = json!({
            "version": "0", "boot": "b", "cpus": 8, "memory": 8u64 << 30, "disk": 1u64 << 40, "disk_free": 1u64 << 40,
            "cpu_model": "test", "hypervisor": "7.2", "accelerators": ["tcg"]
        });
        let body = json!({"id": uuid::Uuid::now_v7(), "facts": facts});
        let answer = self.ask(Method::PUT, &format!("/v1/nodes/{name}")).json(&body).send().await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }

    /// An active image of one empty disk.
    pub(crate) async fn image(&self, name: &str) {
        let answer = self.post("/v1/images", &json!({"name": name})).send().await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.text());
        let upload = format!("/v1/images/{name}/upload?offset=0&last=true");
        let answer = self.ask(Method::PUT, &upload).body(disk()).send().await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        let answer = self.get(&format!("/v1/images/{name}?wait=active&timeout=60")).send().await;
        assert_eq!(answer.json()["status"]["phase"], "active", "{}", answer.text());
    }

    pub(crate) async fn is_running(&self) -> bool {
        !self.running.lock().await.is_finished()
    }

    /// Stops it in order, which must not take long.
    pub(crate) async fn stop(&self) {
        self.shutdown.cancel();
        let mut running = self.running.lock().await;
        tokio::time::timeout(PATIENCE, &mut *running).await.unwrap().unwrap();
    }
}

/// A raw disk with a partition table.
pub(crate) fn disk() -> Bytes {
    let mut disk = vec![0u8; 1 << 20];
    disk[..2].copy_from_slice(&[0xeb, 0xfe]);
    disk[446..462].copy_from_slice(&[0x80, 0, 2, 0, 0x83, 0, 9, 0, 1, 0, 0, 0, 0xff, 7, 0, 0]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.into()
}

/// A request that is being put together.
pub(crate) struct Ask<'a> {
    site: &'a Site,
    via: Via,
    method: Method,
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Ask<'_> {
    pub(crate) fn via(mut self, via: Via) -> Self {
        self.via = via;
        self
    }

    pub(crate) fn token(self, secret: &str) -> Self {
        self.header(AUTHORIZATION, &format!("Bearer {secret}"))
    }

    pub(crate) fn header(mut self, name: HeaderName, value: &str) -> Self {
        self.headers.insert(name, HeaderValue::from_str(value).unwrap());
        self
    }

    pub(crate) fn key(self, key: &str) -> Self {
        self.header(HeaderName::from_static("idempotency-key"), key)
    }

    pub(crate) fn json(self, body: &Value) -> Self {
        self.header(CONTENT_TYPE, "application/json").body(serde_json::to_vec(body).unwrap())
    }

    pub(crate) fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// The answer's head, with its body still coming.
    pub(crate) async fn open(self) -> Response<Incoming> {
        let io = TokioIo::new(self.site.connect(self.via).await);
        let mut request = Request::new(Full::new(self.body));
        *request.method_mut() = self.method;
        *request.headers_mut() = self.headers;
        let host = "localhost";
        let open = async {
            if self.via == Via::Tls2 {
                *request.uri_mut() = format!("https://{host}{}", self.path).parse().unwrap();
                let (mut sender, connection) =
                    hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
                tokio::spawn(connection);
                sender.send_request(request).await
            } else {
                *request.uri_mut() = self.path.parse().unwrap();
                request.headers_mut().insert(HOST, HeaderValue::from_static(host));
                let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
                tokio::spawn(connection);
                sender.send_request(request).await
            }
        };
        tokio::time::timeout(PATIENCE, open).await.expect("an answer in time").expect("an answer")
    }

    pub(crate) async fn send(self) -> Answer {
        let (parts, body) = self.open().await.into_parts();
        let body = tokio::time::timeout(PATIENCE, body.collect()).await.expect("a body in time");
        Answer { status: parts.status, headers: parts.headers, body: body.expect("a body").to_bytes() }
    }

    /// Sends, and expects this refusal.
    pub(crate) async fn refused(self, status: u16, code: &str) -> Problem {
        let what = format!("{} {}", self.method, self.path);
        let answer = self.send().await;
        assert_eq!(answer.status.as_u16(), status, "{what}: {}", answer.text());
        let problem = answer.problem();
        assert_eq!(problem.code.as_str(), code, "{what}: {}", answer.text());
        problem
    }
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn problem(&self) -> Problem {
        assert_eq!(self.headers[CONTENT_TYPE], "application/problem+json", "{}", self.text());
        let problem: Problem = serde_json::from_slice(&self.body).unwrap();
        assert_eq!(problem.status, self.status.as_u16());
        assert_eq!(problem.request_id.as_deref(), self.headers["x-request-id"].to_str().ok());
        problem
    }

    pub(crate) fn etag(&self) -> String {
        self.headers["etag"].to_str().unwrap().to_owned()
    }
}

/// Looks until `look` answers.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
