//! Beginning and end: what cannot be bound, and shutdown.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use ostler_server::{BindError, Limits, Server, ServerConfig};
use ostler_store::MemoryStore;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{PATIENCE, Site, Via, cloud, config, until};

#[tokio::test]
async fn what_cannot_be_bound_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = cloud(&dir, Arc::new(MemoryStore::new())).await;
    let bind = |config: ServerConfig| Server::bind(Arc::clone(&cloud), config);

    assert!(matches!(bind(ServerConfig::default()).await, Err(BindError::Nothing)));

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let mut busy = config(&dir, Limits::default());
    busy.tls.as_mut().unwrap().addr = addr;
    let error = bind(busy).await.unwrap_err();
    assert!(error.to_string().contains(&addr.to_string()) && error.to_string().contains("in use"), "{error}");
    // Nothing is left behind by a server that could not start.
    assert!(!dir.path().join("api.sock").exists());

    for addr in ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"] {
        let open = ServerConfig { plain_http: Some(addr.parse().unwrap()), ..ServerConfig::default() };
        assert!(matches!(bind(open).await, Err(BindError::NotLoopback { .. })), "{addr}");
    }
    let first = bind(config(&dir, Limits::default())).await.unwrap();
    assert!(matches!(bind(config(&dir, Limits::default())).await, Err(BindError::SocketInUse { .. })));
    drop(first);
    bind(config(&dir, Limits::default())).await.unwrap();
}

#[tokio::test]
async fn requests_in_progress_finish_and_new_ones_are_not_taken() {
    let site = Site::start().await;
    let socket = site.addrs.unix_socket.clone().unwrap();
    // A request whose body is still on its way.
    let mut slow = site.connect(Via::Unix).await;
    let body = json!({"name": "late"}).to_string();
    let head = format!(
        "POST /v1/images HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\nexpect: 100-continue\r\n\r\n",
        body.len()
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    // The handler has begun once it asks for the body.
    let mut answer = [0u8; 64];
    let n = slow.read(&mut answer).await.unwrap();
    assert!(answer[..n].starts_with(b"HTTP/1.1 100"), "{:?}", String::from_utf8_lossy(&answer[..n]));

    site.shutdown.cancel();
    until("the socket to go", || async { (!socket.exists()).then_some(()) }).await;
    assert!(tokio::net::UnixStream::connect(&socket).await.is_err());
    assert!(site.is_running().await);

    slow.write_all(body.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, slow.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 201"), "{}", String::from_utf8_lossy(&answer));
    site.stop().await;
}

#[tokio::test]
async fn what_does_not_finish_is_cut() {
    let limits = Limits { grace: Duration::from_millis(200), ..Limits::default() };
    let site = Site::with(limits).await;
    let mut stuck = site.connect(Via::Unix).await;
    stuck
        .write_all(b"POST /v1/images HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\nexpect: 100-continue\r\n\r\n")
        .await
        .unwrap();
    let mut answer = [0u8; 64];
    assert!(stuck.read(&mut answer).await.unwrap() > 0);
    site.stop().await;
}

#[tokio::test]
async fn waits_end_when_the_server_stops() {
    let site = Site::start().await;
    site.image("base").await;
    site.post("/v1/vms", &json!({"name": "web", "image": "base"})).send().await;
    let waiting = site.get("/v1/vms/web?wait=running&timeout=600").send();
    let stop = async {
        until("the wait to be there", || async {
            let metrics = site.get("/metrics").send().await.text();
            // The other one is this.
            metrics.lines().any(|line| line == "ostler_http_requests_in_progress 2").then_some(())
        })
        .await;
        site.shutdown.cancel();
    };
    let (answer, ()) = tokio::join!(waiting, stop);
    assert_eq!(answer.status, 503, "{}", answer.text());
    assert_eq!(answer.problem().code.as_str(), "unavailable");
    site.stop().await;
}

#[tokio::test]
async fn in_process_callers_need_a_token_too() {
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    let dir = tempfile::tempdir().unwrap();
    let cloud = cloud(&dir, Arc::new(MemoryStore::new())).await;
    let router = ostler_server::router(Arc::clone(&cloud));
    let request = |token: Option<&str>| {
        let request = http::Request::builder().method(Method::GET).uri("/v1/vms");
        let request = match token {
            Some(token) => request.header("authorization", format!("Bearer {token}")),
            None => request,
        };
        request.body(axum::body::Body::empty()).unwrap()
    };
    assert_eq!(router.clone().oneshot(request(None)).await.unwrap().status(), 401);
    let create = serde_json::from_value(json!({"name": "t", "role": "admin"})).unwrap();
    let token = cloud.token_create(&cloud.caller_local(), create).await.unwrap().secret;
    let answer = router.oneshot(request(Some(&token))).await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(!answer.into_body().collect().await.unwrap().to_bytes().is_empty());
}
