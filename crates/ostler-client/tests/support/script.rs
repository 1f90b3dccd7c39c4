//! What a test server sees and answers: a closure from requests to answers, served over any connection.
//! The tests of the command line use it too.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http_body_util::BodyExt;
use hyper::service::service_fn;
use hyper::{HeaderMap, Method, Request, Response};
use hyper_util::rt::TokioIo;
use ostler_api::operation::Operation;
use ostler_api::vm::Vm;
use ostler_api::vm_phase::VmPhase;
use ostler_api::{ApiError, ErrorCode};
use ostler_client::body::{self, Body, BodyError};
use serde::Serialize;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
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
    /// The same, and the stream stays open.
    Open(Vec<Bytes>),
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
        Self::Chunks(Self::json_lines(lines))
    }
    pub(crate) fn open_lines(lines: &[impl Serialize]) -> Self {
        Self::Open(Self::json_lines(lines))
    }
    fn json_lines(lines: &[impl Serialize]) -> Vec<Bytes> {
        lines.iter().map(|line| (serde_json::to_string(line).unwrap() + "\n").into()).collect()
    }
    pub(crate) fn hang_up() -> Self {
        Self::HangUp
    }
    pub(crate) fn never() -> Self {
        Self::Never
    }
}

type Script = dyn Fn(&Seen) -> Answer + Send + Sync;

pub(crate) struct State {
    script: Box<Script>,
    pub(crate) headers: Mutex<Vec<HeaderMap>>,
    pub(crate) connections: AtomicUsize,
}

impl State {
    pub(crate) fn new(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            script: Box::new(script),
            headers: Mutex::default(),
            connections: AtomicUsize::new(0),
        })
    }
}

pub(crate) async fn serve(state: Arc<State>, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
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

pub(crate) async fn answer(state: &State, request: Request<Body>) -> Result<Response<Body>, BodyError> {
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
        Answer::Open(chunks) => {
            let chunks = futures::stream::iter(chunks.into_iter().map(Ok));
            Ok(Response::new(body::stream(chunks.chain(futures::stream::pending()))))
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
