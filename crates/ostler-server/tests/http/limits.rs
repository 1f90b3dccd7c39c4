//! What one client may take, and that the others do not notice.

use std::time::Duration;

use http::Method;
use ostler_server::Limits;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{PATIENCE, Site, Via, until};

#[tokio::test]
async fn a_body_has_its_limit() {
    let limits = Limits { body_bytes: 1000, ..Limits::default() };
    let site = Site::with(limits).await;
    let large = json!({"name": "a", "labels": {"x": "y".repeat(2000)}});
    site.post("/v1/images", &large).refused(413, "too_large").await;
    site.ask(Method::PATCH, "/v1/vms/x").json(&large).refused(413, "too_large").await;
    // Without an announced length it is counted.
    let mut raw = site.connect(Via::Unix).await;
    let head = "POST /v1/images HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";
    let chunk = format!("{:x}\r\n{}\r\n", 600, " ".repeat(600));
    raw.write_all(format!("{head}{chunk}{chunk}0\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, raw.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 413"), "{}", String::from_utf8_lossy(&answer));
    site.stop().await;
}

#[tokio::test]
async fn who_dawdles_is_cut_off() {
    let brief = Duration::from_millis(300);
    let limits =
        Limits { header_timeout: brief, handshake_timeout: brief, keepalive: brief, ..Limits::default() };
    let site = Site::with(limits).await;
    // Nothing at all, and a head that never ends.
    for (via, sent) in [
        (Via::Unix, ""),
        (Via::Plain, ""),
        (Via::Plain, "GET /v1/vms HTTP/1.1\r\nx-a: "),
        (Via::Tls, "GET /v1/vms HTTP/1.1\r\n"),
        (Via::Tls2, ""),
    ] {
        let mut slow = site.connect(via).await;
        slow.write_all(sent.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        // An error is as good an end as any.
        let _ = tokio::time::timeout(PATIENCE, slow.read_to_end(&mut rest))
            .await
            .unwrap_or_else(|_| panic!("{via:?} {sent:?} is still there"));
    }
    // A TCP connection that never begins its handshake.
    let mut silent = tokio::net::TcpStream::connect(site.addrs.tls.unwrap()).await.unwrap();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, silent.read_to_end(&mut rest)).await.expect("cut off in time");
    // An HTTP/2 connection that has had its say.
    let mut answered = site.get("/healthz").via(Via::Tls2).open().await;
    assert_eq!(answered.status(), 200);
    while http_body_util::BodyExt::frame(answered.body_mut()).await.is_some() {}
    all_gone(&site).await;
    site.stop().await;
}

#[tokio::test]
async fn slow_requests_have_a_deadline_and_waits_their_own() {
    let limits = Limits { request_timeout: Duration::from_millis(300), ..Limits::default() };
    let site = Site::with(limits).await;
    site.image("base").await;
    let mut slow = site.connect(Via::Unix).await;
    let head = "POST /v1/images HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\nconnection: close\r\n\r\n{";
    slow.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, slow.read_to_end(&mut answer)).await.expect("answered in time");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("timed_out"), "{answer}");
    // This one is longer than that and fine.
    let body = json!({"name": "web", "image": "base"});
    let problem = site.post("/v1/vms?wait=running&timeout=1", &body).refused(408, "timed_out").await;
    assert!(problem.detail.contains("waited 1 s"), "{problem:?}");
    site.stop().await;
}

#[tokio::test]
async fn one_too_many_is_told_so_and_others_go_on() {
    let limits = Limits { max_connections: 4, ..Limits::default() };
    let site = Site::with(limits).await;
    // Half of them for one address.
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut connection = site.connect(Via::Plain).await;
        connection.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut begin = [0u8; 15];
        connection.read_exact(&mut begin).await.unwrap();
        assert_eq!(&begin, b"HTTP/1.1 200 OK");
        held.push(connection);
    }
    let mut refused = site.connect(Via::Plain).await;
    let mut answer = Vec::new();
    // The connection may be reset behind the answer, since nobody read the request.
    let _ = tokio::time::timeout(PATIENCE, refused.read_to_end(&mut answer)).await.expect("refused in time");
    assert!(answer.starts_with(b"HTTP/1.1 503"), "{}", String::from_utf8_lossy(&answer));
    // The local administrator gets in all the same, and sees why.
    let metrics = site.get("/metrics").send().await.text();
    assert!(metrics.contains("ostler_connections{listener=\"tcp\"} 2"), "{metrics}");
    assert!(metrics.contains("ostler_connections_refused_total{listener=\"tcp\"} 1"), "{metrics}");
    drop(held);
    all_gone(&site).await;
    assert_eq!(site.get("/healthz").via(Via::Plain).send().await.status, 200);
    site.stop().await;
}

async fn all_gone(site: &Site) {
    until("the connections to end", || async {
        let metrics = site.get("/metrics").send().await.text();
        metrics.lines().any(|line| line == "ostler_connections{listener=\"tcp\"} 0").then_some(())
    })
    .await;
}
