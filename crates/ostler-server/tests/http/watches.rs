//! Watches: streams of JSON lines.

use std::time::Duration;

use bytes::BytesMut;
use http::Response;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use ostler_server::Limits;
use serde_json::{Value, json};

use crate::support::{PATIENCE, Site, Via};

/// Reads lines as they come.
struct Lines {
    body: Incoming,
    buffer: BytesMut,
}

impl Lines {
    fn of(response: Response<Incoming>) -> Self {
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/jsonl");
        Self { body: response.into_body(), buffer: BytesMut::new() }
    }

    /// None at the orderly end.
    async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(at) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(at + 1);
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.expect("a line in time");
            match frame {
                None => return None,
                Some(frame) => self.buffer.extend_from_slice(&frame.unwrap().into_data().unwrap()),
            }
        }
    }

    /// The next line that is not a bookmark.
    async fn news(&mut self) -> Value {
        loop {
            let line = self.next().await.expect("the watch goes on");
            if line["type"] != "bookmark" {
                return line;
            }
        }
    }
}

fn name(line: &Value) -> &str {
    line["object"]["metadata"]["name"].as_str().unwrap_or("")
}

fn quick() -> Limits {
    Limits { bookmark: Duration::from_millis(50), ..Limits::default() }
}

#[tokio::test]
async fn the_present_then_changes() {
    let site = Site::with(quick()).await;
    site.image("base").await;
    let mut watch = Lines::of(site.get("/v1/images?watch=true").open().await);
    let first = watch.news().await;
    assert_eq!((first["type"].as_str(), name(&first)), (Some("added"), "base"));
    let synced = watch.news().await;
    assert_eq!(synced["type"], "synced");
    site.post("/v1/images", &json!({"name": "next"})).send().await;
    let added = watch.news().await;
    assert_eq!((added["type"].as_str(), name(&added)), (Some("added"), "next"));
    // Silence is filled with bookmarks, which never go back.
    let mut revision = added["object"]["metadata"]["revision"].as_u64().unwrap();
    for _ in 0..3 {
        let line = watch.next().await.unwrap();
        assert_eq!(line["type"], "bookmark");
        assert!(line["revision"].as_u64().unwrap() >= revision);
        revision = line["revision"].as_u64().unwrap();
    }
    site.stop().await;
}

#[tokio::test]
async fn nothing_is_missed_between_a_list_and_its_watch() {
    let site = Site::with(quick()).await;
    let list = site.get("/v1/images").send().await.json();
    let from = list["revision"].as_u64().unwrap() + 1;
    for name in ["a", "b"] {
        site.post("/v1/images", &json!({"name": name})).send().await;
    }
    let mut watch = Lines::of(site.get(&format!("/v1/images?watch=true&from={from}")).open().await);
    let (a, b) = (watch.news().await, watch.news().await);
    assert_eq!((name(&a), name(&b)), ("a", "b"));
    // From a bookmark on nothing is repeated and nothing is missing.
    let bookmark = watch.next().await.unwrap();
    assert_eq!(bookmark["type"], "bookmark");
    let from = bookmark["revision"].as_u64().unwrap() + 1;
    site.post("/v1/images", &json!({"name": "c"})).send().await;
    let mut resumed = Lines::of(site.get(&format!("/v1/images?watch=true&from={from}")).open().await);
    assert_eq!(name(&resumed.news().await), "c");
    site.stop().await;
}

#[tokio::test]
async fn stopping_ends_a_watch_in_order() {
    let site = Site::start().await;
    let token = site.token(json!({"name": "w", "role": "admin"})).await;
    let mut watches = Vec::new();
    for via in [Via::Unix, Via::Tls, Via::Tls2] {
        let mut watch = Lines::of(site.get("/v1/images?watch=true").via(via).token(&token).open().await);
        assert_eq!(watch.next().await.unwrap()["type"], "synced");
        watches.push(watch);
    }
    site.shutdown.cancel();
    for mut watch in watches {
        assert_eq!(watch.next().await.unwrap()["type"], "bookmark");
        assert!(watch.next().await.is_none());
    }
    site.stop().await;
}

#[tokio::test]
async fn a_revoked_token_loses_its_watches() {
    let site = Site::with(quick()).await;
    let token = site.token(json!({"name": "w", "role": "admin"})).await;
    let mut watch = Lines::of(site.get("/v1/vms?watch=true").via(Via::Plain).token(&token).open().await);
    assert_eq!(watch.next().await.unwrap()["type"], "synced");
    site.ask(http::Method::DELETE, "/v1/tokens/w").send().await;
    let line = watch.news().await;
    assert_eq!(
        (line["type"].as_str(), line["problem"]["code"].as_str()),
        (Some("error"), Some("unauthenticated"))
    );
    assert!(watch.next().await.is_none());
    site.stop().await;
}

#[tokio::test]
async fn a_nodes_work_comes_as_lines() {
    let site = Site::start().await;
    site.node("n1").await;
    let token = site.token(json!({"name": "agent", "role": "node", "node": "n1"})).await;
    let mut work = Lines::of(site.get("/v1/nodes/n1/work").via(Via::Tls2).token(&token).open().await);
    assert_eq!(work.next().await.unwrap()["type"], "hello");
    assert_eq!(work.news().await["type"], "images");
    assert_eq!(work.news().await["type"], "synced");
    site.shutdown.cancel();
    while work.next().await.is_some() {}
    site.stop().await;
}
