//! Images: bytes in, bytes out.

use std::time::Duration;

use http::header::RANGE;
use http::{Method, StatusCode};
use ostler_server::Limits;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{PATIENCE, Site, Via, disk};

#[tokio::test]
async fn an_upload_goes_on_where_it_was() {
    let site = Site::start().await;
    let disk = disk();
    assert_eq!(site.post("/v1/images", &json!({"name": "base"})).send().await.status, StatusCode::CREATED);
    let put = |offset: usize, last: bool, from: usize, to: usize| {
        let path = format!("/v1/images/base/upload?offset={offset}&last={last}");
        site.ask(Method::PUT, &path).body(disk.slice(from..to))
    };
    let state = put(0, false, 0, 1000).send().await;
    assert_eq!((state.status, &state.json()["offset"]), (StatusCode::OK, &json!(1000)), "{}", state.text());
    // Not the right place: nothing is written, and the right one is said.
    let problem = put(999, false, 0, 10).refused(409, "conflict").await;
    assert!(problem.detail.contains("1000"), "{problem:?}");
    assert_eq!(site.get("/v1/images/base/upload").send().await.json()["offset"], 1000);
    let state = put(1000, true, 1000, disk.len()).send().await;
    assert_eq!(state.status, StatusCode::OK, "{}", state.text());
    let image = site.get("/v1/images/base?wait=active&timeout=60").send().await.json();
    assert_eq!(image["status"]["phase"], "active", "{image}");
    assert_eq!(image["status"]["data"]["virtual_size"], disk.len());
    site.stop().await;
}

#[tokio::test]
async fn a_download_is_whole_in_part_or_converted() {
    let site = Site::start().await;
    site.image("base").await;
    let whole = site.get("/v1/images/base/data").send().await;
    assert_eq!(whole.status, StatusCode::OK, "{}", whole.text());
    let image = site.get("/v1/images/base").send().await.json();
    let data = &image["status"]["data"];
    assert_eq!(whole.body.len() as u64, data["size"]);
    assert_eq!(whole.etag(), format!("\"{}\"", data["sha256"].as_str().unwrap()));
    let part = site.get("/v1/images/base/data").header(RANGE, "bytes=100-199").send().await;
    assert_eq!(part.status, StatusCode::PARTIAL_CONTENT);
    assert_eq!(part.body, whole.body.slice(100..200));
    let beyond = site.get("/v1/images/base/data").header(RANGE, "bytes=99999999-");
    let beyond = beyond.refused(416, "invalid").await;
    assert!(beyond.detail.contains("outside"), "{beyond:?}");
    let head = site.ask(Method::HEAD, "/v1/images/base/data").send().await;
    assert_eq!(head.headers["content-length"], whole.body.len().to_string());
    assert!(head.body.is_empty());
    let raw = site.get("/v1/images/base/data?format=raw").send().await;
    assert_eq!(raw.status, StatusCode::OK, "{}", raw.text());
    assert_eq!(raw.body, disk());
    site.get("/v1/images/base/data?format=floppy").refused(400, "invalid").await;
    // A converted copy is not left behind.
    let left: Vec<_> = walk(site.dir.path()).into_iter().filter(|path| path.contains("export")).collect();
    assert!(left.is_empty(), "{left:?}");
    site.post("/v1/images", &json!({"name": "empty"})).send().await;
    site.get("/v1/images/empty/data").refused(409, "conflict").await;
    site.stop().await;
}

#[tokio::test]
async fn what_came_before_a_silence_is_kept() {
    let limits = Limits { upload_idle: Duration::from_millis(200), ..Limits::default() };
    let site = Site::with(limits).await;
    site.post("/v1/images", &json!({"name": "base"})).send().await;
    let mut silent = site.connect(Via::Unix).await;
    let head =
        "PUT /v1/images/base/upload?offset=0&last=true HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n\r\n";
    silent.write_all(format!("{head}{}", "x".repeat(500)).as_bytes()).await.unwrap();
    let mut answer = [0u8; 12];
    tokio::time::timeout(PATIENCE, silent.read_exact(&mut answer)).await.expect("an answer in time").unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(site.get("/v1/images/base/upload").send().await.json()["offset"], 500);
    assert_ne!(site.get("/v1/images/base").send().await.json()["status"]["phase"], "error");
    site.stop().await;
}

fn walk(dir: &std::path::Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(walk(&entry.path()));
        } else {
            found.push(entry.path().display().to_string());
        }
    }
    found
}
