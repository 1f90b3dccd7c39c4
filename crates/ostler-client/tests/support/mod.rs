//! A server that answers with what a closure says, over any transport.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::{HeaderMap, Method, Request, Response};
use http_body_util::BodyExt;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use ostler_api::operation::Operation;
use ostler_api::vm::Vm;
use ostler_api::vm_phase::VmPhase;
use ostler_api::{ApiError, ErrorCode};
use ostler_client::body::{self, Body, BodyError};
use ostler_client::{Ca, Client, Credentials, LocalService, Target};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use serde::Serialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

pub(crate) struct Seen {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// 1 for the first request.
    pub(crate) count: usize,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub(crate) fn parameter(&self, name: &str) -> Option<&str> {
        self.query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }
}

pub(crate) enum Answer {
    Whole(u16, &'static str, Bytes),
    Chunks(Vec<Bytes>),
    /// A WebSocket that returns what it gets.
    Echo,
    HangUp,
    Never,
}

impl Answer {
    pub(crate) fn json(status: u16, value: &impl Serialize) -> Self {
        Self::Whole(status, "application/json", serde_json::to_vec(value).unwrap().into())
    }
    pub(crate) fn text(status: u16, text: &'static str) -> Self {
        Self::Whole(status, "text/plain", Bytes::from_static(text.as_bytes()))
    }
    pub(crate) fn problem(code: ErrorCode, detail: &str) -> Self {
        let problem = ApiError::new(code, detail).hint("a hint").problem(None);
        Self::Whole(code.status(), "application/problem+json", serde_json::to_vec(&problem).unwrap().into())
    }
    pub(crate) fn chunks<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Self {
        Self::Chunks(chunks.into_iter().map(Bytes::copy_from_slice).collect())
    }
    pub(crate) fn lines(lines: &[impl Serialize]) -> Self {
        Self::Chunks(lines.iter().map(|line| (serde_json::to_string(line).unwrap() + "\n").into()).collect())
    }
    pub(crate) fn hang_up() -> Self {
        Self::HangUp
    }
    pub(crate) fn never() -> Self {
        Self::Never
    }
}

type Script = dyn Fn(&Seen) -> Answer + Send + Sync;

struct State {
    script: Box<Script>,
    headers: Mutex<Vec<HeaderMap>>,
    connections: AtomicUsize,
}

pub(crate) struct Server {
    state: Arc<State>,
    target: Target,
    _dir: Option<tempfile::TempDir>,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Server {
    fn state(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Arc<State> {
        Arc::new(State {
            script: Box::new(script),
            headers: Mutex::default(),
            connections: AtomicUsize::new(0),
        })
    }

    pub(crate) fn unix(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Self::unix_at(&dir.path().join("s.sock"), script);
        server._dir = Some(dir);
        server
    }

    pub(crate) fn unix_at(path: &Path, script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let state = Self::state(script);
        let listener = UnixListener::bind(path).unwrap();
        let served = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(served.clone(), stream));
            }
        });
        Self { state, target: Target::Unix(path.to_owned()), _dir: None, task: Some(task) }
    }

    pub(crate) async fn tcp(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let state = Self::state(script);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let served = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(served.clone(), stream));
            }
        });
        Self { state, target, _dir: None, task: Some(task) }
    }

    pub(crate) async fn tls(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let signed = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(signed.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![signed.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let state = Self::state(script);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target: Target = format!("https://{}", listener.local_addr().unwrap()).parse().unwrap();
        let target = target.with_ca(Ca::Pem(signed.cert.pem().into_bytes()));
        let served = state.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, served) = (acceptor.clone(), served.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(stream).await {
                        serve(served, stream).await;
                    }
                });
            }
        });
        Self { state, target, _dir: None, task: Some(task) }
    }

    pub(crate) fn local(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let state = Self::state(script);
        let served = state.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let served = served.clone();
            async move { answer(&served, request).await }
        });
        Self { state, target: Target::Local(LocalService::new(service)), _dir: None, task: None }
    }

    pub(crate) fn target(&self) -> Target {
        self.target.clone()
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.target(), Credentials::none()).unwrap()
    }

    pub(crate) fn ca(&self) -> Ca {
        match self.target() {
            Target::Https { ca, .. } => ca,
            other => panic!("{other} has none"),
        }
    }

    pub(crate) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    pub(crate) fn requests(&self) -> usize {
        self.state.headers.lock().unwrap().len()
    }

    pub(crate) fn headers(&self, name: &str) -> Vec<String> {
        let headers = self.state.headers.lock().unwrap();
        headers.iter().filter_map(|h| Some(h.get(name)?.to_str().unwrap().to_owned())).collect()
    }
}

async fn serve(state: Arc<State>, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
    state.connections.fetch_add(1, Ordering::Relaxed);
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let state = state.clone();
        async move { answer(&state, request.map(body::incoming)).await }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    // A connection that a test breaks ends with an error.
    let _ = served.await;
}

async fn answer(state: &State, request: Request<Body>) -> Result<Response<Body>, BodyError> {
    let upgrade = request.headers().get("sec-websocket-key").cloned();
    let (mut parts, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let count = {
        let mut headers = state.headers.lock().unwrap();
        headers.push(parts.headers.clone());
        headers.len()
    };
    let seen = Seen {
        method: parts.method.clone(),
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers: parts.headers.clone(),
        body,
        count,
    };
    match (state.script)(&seen) {
        Answer::Whole(status, kind, bytes) => Ok(Response::builder()
            .status(status)
            .header("content-type", kind)
            .body(body::full(bytes))
            .unwrap()),
        Answer::Chunks(chunks) => {
            Ok(Response::new(body::stream(futures::stream::iter(chunks.into_iter().map(Ok)))))
        }
        Answer::HangUp => Err(BodyError::new("the test hangs up")),
        Answer::Never => std::future::pending().await,
        Answer::Echo => {
            let key = upgrade.expect("a websocket request");
            let on_upgrade = parts.extensions.remove::<hyper::upgrade::OnUpgrade>().expect("an upgrade");
            tokio::spawn(async move {
                let io = TokioIo::new(on_upgrade.await.unwrap());
                let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
                while let Some(Ok(message)) = socket.next().await {
                    // A close is answered by the next look at the socket.
                    if !message.is_close() && socket.send(message).await.is_err() {
                        break;
                    }
                }
            });
            Ok(Response::builder()
                .status(101)
                .header("connection", "upgrade")
                .header("upgrade", "websocket")
                .header("sec-websocket-accept", derive_accept_key(key.as_bytes()))
                .body(body::empty())
                .unwrap())
        }
    }
}

/// The same name has the same id throughout a test run.
fn id_of(name: &str) -> uuid::Uuid {
    static IDS: OnceLock<Mutex<HashMap<String, uuid::Uuid>>> = OnceLock::new();
    *IDS.get_or_init(Mutex::default).lock().unwrap().entry(name.to_owned()).or_insert_with(uuid::Uuid::new_v4)
}

pub(crate) fn vm(name: &str, phase: VmPhase) -> Vm {
    serde_json::from_value(json!({
        "metadata": {"id": id_of(name), "name": name, "project": "default", "created": "2026-01-02T03:04:05Z"},
        "spec": {"cpus": 1, "memory": 1 << 29, "machine": "q35", "firmware": "bios", "accelerator": "auto",
                 "power": "running"},
        "status": {"phase": phase},
    }))
    .unwrap()
}

pub(crate) fn operation_of(action: &str, phase: &str) -> Operation {
    serde_json::from_value(json!({
        "metadata": {"id": id_of("op"), "name": "op", "project": "default", "created": "2026-01-02T03:04:05Z"},
        "spec": {"action": action, "target": {"kind": "vm", "id": id_of("web"), "name": "web"}},
        "status": {"phase": phase},
    }))
    .unwrap()
}
