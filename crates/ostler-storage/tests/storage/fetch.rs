//! Downloads from a small server on loopback that can break off, redirect and lie.

use std::{
    collections::HashMap,
    net::SocketAddr,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use ostler_storage::{FetchError, FetchPolicy, ImageStore, ImportProgress, fetch};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use crate::support::{MIB, noise};

/// A request as the server saw it.
#[derive(Debug, Clone)]
struct Seen {
    path: String,
    headers: HashMap<String, String>,
}

/// What the server sends back before it closes the connection.
enum Reply {
    Bytes(Vec<u8>),
    /// Says nothing and keeps the connection open.
    Silence,
}

type Handler = dyn Fn(&Seen) -> Reply + Send + Sync;

struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_on("127.0.0.1:0", handler, None).await
    }

    async fn start_on(
        address: &str,
        handler: impl Fn(&Seen) -> Reply + Send + Sync + 'static,
        tls: Option<tokio_rustls::TlsAcceptor>,
    ) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, handler): (_, Arc<Handler>) = (Arc::new(Mutex::new(Vec::new())), Arc::new(handler));
        let log = seen.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (handler, log, tls) = (handler.clone(), log.clone(), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                answer(stream, &*handler, &log).await;
                            }
                        }
                        None => answer(stream, &*handler, &log).await,
                    }
                });
            }
        });
        Self { address, seen, task }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, handler: &Handler, log: &Mutex<Vec<Seen>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let text = String::from_utf8(head).unwrap();
    let mut lines = text.lines();
    let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let headers = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let seen = Seen { path, headers };
    log.lock().unwrap().push(seen.clone());
    match handler(&seen) {
        Reply::Bytes(bytes) => {
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
        }
        Reply::Silence => {
            // Until the client goes away.
            let _ = stream.read_u8().await;
        }
    }
}

fn reply(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    Reply::Bytes([head.as_bytes(), b"\r\n", body].concat())
}

fn whole(body: &[u8]) -> Reply {
    reply("200 OK", &[("content-length", &body.len().to_string()), ("etag", "\"v1\"")], body)
}

fn redirect(to: &str) -> Reply {
    reply("302 Found", &[("location", to), ("content-length", "0")], b"")
}

/// Serves `content` with ranges, but breaks off after `piece` bytes.
fn in_pieces(content: Vec<u8>, piece: usize, tag: &'static str) -> impl Fn(&Seen) -> Reply {
    move |seen| {
        let range = seen
            .headers
            .get("range")
            .filter(|_| seen.headers.get("if-range").is_some_and(|found| found == tag));
        let start = range.map_or(0, |range| {
            range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse::<usize>().unwrap()
        });
        let rest = &content[start..];
        let (length, total) = (rest.len().to_string(), content.len());
        let position = format!("bytes {start}-{}/{total}", total - 1);
        let mut headers = vec![("content-length", length.as_str()), ("etag", tag)];
        let status = if range.is_some() {
            headers.push(("content-range", &position));
            "206 Partial Content"
        } else {
            "200 OK"
        };
        reply(status, &headers, &rest[..rest.len().min(piece)])
    }
}

fn local() -> FetchPolicy {
    FetchPolicy { allow_private: true, max_retries: 2, ..FetchPolicy::default() }
}

struct Downloaded {
    outcome: Result<(), FetchError>,
    bytes: Vec<u8>,
    progress: ImportProgress,
}

/// Downloads into the upload "u" of the store, whatever it has.
async fn download(dir: &std::path::Path, url: &str, policy: &FetchPolicy) -> Downloaded {
    let store = ImageStore::open(dir).unwrap();
    let mut upload = store.upload("u").await.unwrap();
    let progress = watch::Sender::new(ImportProgress::default());
    let outcome = fetch(url, policy, &mut upload, &progress, &CancellationToken::new()).await;
    let bytes = std::fs::read(dir.join("incoming/u.upload")).unwrap();
    let progress = *progress.borrow();
    Downloaded { outcome, bytes, progress }
}

async fn code(url: &str, policy: &FetchPolicy) -> &'static str {
    let dir = tempfile::tempdir().unwrap();
    download(dir.path(), url, policy).await.outcome.unwrap_err().code()
}

#[tokio::test]
async fn a_file_is_downloaded_with_progress() {
    let content = noise(3 * MIB + 17);
    let body = content.clone();
    let server = Server::start(move |_| whole(&body)).await;
    let dir = tempfile::tempdir().unwrap();
    let done = download(dir.path(), &server.url("/disk.img?x=1"), &local()).await;
    done.outcome.unwrap();
    assert!(done.bytes == content);
    assert_eq!((done.progress.done, done.progress.total), (content.len() as u64, Some(content.len() as u64)));
    let seen = server.seen();
    assert_eq!((seen.len(), seen[0].path.as_str()), (1, "/disk.img?x=1"));
    assert_eq!(seen[0].headers["accept-encoding"], "identity");
    assert_eq!(seen[0].headers["host"], server.address.to_string());
}

#[tokio::test]
async fn a_body_without_a_length_or_in_chunks_is_fine() {
    let server = Server::start(|seen| match seen.path.as_str() {
        "/chunked" => {
            reply("200 OK", &[("transfer-encoding", "chunked")], b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n")
        }
        _ => reply("200 OK", &[], b"hello world"),
    })
    .await;
    for path in ["/chunked", "/until-close"] {
        let dir = tempfile::tempdir().unwrap();
        let done = download(dir.path(), &server.url(path), &local()).await;
        done.outcome.unwrap();
        assert_eq!(done.bytes, b"hello world", "{path}");
    }
}

#[tokio::test]
async fn a_broken_connection_is_taken_up_where_it_broke() {
    let content = noise(MIB);
    let server = Server::start(in_pieces(content.clone(), 300_000, "\"v1\"")).await;
    let dir = tempfile::tempdir().unwrap();
    let done = download(dir.path(), &server.url("/"), &local()).await;
    done.outcome.unwrap();
    assert!(done.bytes == content);
    let seen = server.seen();
    assert_eq!(seen.len(), 4);
    assert_eq!(seen[1].headers["range"], "bytes=300000-");
    assert_eq!(seen[1].headers["if-range"], "\"v1\"");
}

#[tokio::test]
async fn a_download_goes_on_after_a_restart_of_the_process() {
    let content = noise(MIB);
    let server = Server::start(in_pieces(content.clone(), 600_000, "\"v1\"")).await;
    let dir = tempfile::tempdir().unwrap();
    let once = FetchPolicy { max_retries: 0, ..local() };
    let first = download(dir.path(), &server.url("/"), &once).await;
    assert_eq!(first.outcome.unwrap_err().code(), "broken_download");
    assert_eq!(first.bytes.len(), 600_000);
    // `download` opens the store anew.
    let second = download(dir.path(), &server.url("/"), &once).await;
    second.outcome.unwrap();
    assert!(second.bytes == content);
    assert_eq!(server.seen()[1].headers["range"], "bytes=600000-");
}

#[tokio::test]
async fn a_file_that_changed_meanwhile_begins_again() {
    let dir = tempfile::tempdir().unwrap();
    let once = FetchPolicy { max_retries: 0, ..local() };
    let changed = Arc::new(Mutex::new(false));
    let flag = changed.clone();
    let (old, new) = (noise(MIB), vec![7; MIB / 2]);
    let (before, after) = (in_pieces(old, 600_000, "\"v1\""), in_pieces(new.clone(), MIB, "\"v2\""));
    let server =
        Server::start(move |seen| if *flag.lock().unwrap() { after(seen) } else { before(seen) }).await;
    download(dir.path(), &server.url("/"), &once).await.outcome.unwrap_err();
    *changed.lock().unwrap() = true;
    let done = download(dir.path(), &server.url("/"), &once).await;
    done.outcome.unwrap();
    assert!(done.bytes == new);
}

#[tokio::test]
async fn a_server_that_lies_about_ranges_is_caught() {
    let server = Server::start(|seen| match seen.headers.get("range") {
        Some(_) => reply("206 Partial Content", &[("content-range", "bytes 1-4/10")], b"xxxx"),
        None => reply("200 OK", &[("content-length", "10"), ("etag", "\"v1\"")], b"hello"),
    })
    .await;
    assert_eq!(code(&server.url("/"), &local()).await, "broken_download");
}

#[tokio::test]
async fn redirects_are_followed_up_to_a_number() {
    let server = Server::start(|seen| match seen.path.as_str() {
        "/a" => redirect("/folder/b"),
        "/folder/b" => redirect("c"),
        "/folder/c" => whole(b"here"),
        "/file" => redirect("file:///etc/passwd"),
        "/nowhere" => reply("302 Found", &[("content-length", "0")], b""),
        _ => redirect("/loop"),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let done = download(dir.path(), &server.url("/a"), &local()).await;
    done.outcome.unwrap();
    assert_eq!(done.bytes, b"here");
    assert_eq!(code(&server.url("/loop"), &local()).await, "too_many_redirects");
    assert_eq!(code(&server.url("/file"), &local()).await, "invalid_url");
    assert_eq!(
        code(&server.url("/nowhere"), &FetchPolicy { max_retries: 0, ..local() }).await,
        "broken_download"
    );
}

#[tokio::test]
async fn private_targets_are_refused_unless_allowed() {
    let server = Server::start(|_| whole(b"secret")).await;
    let careful = FetchPolicy { allow_private: false, ..local() };
    let port = server.address.port();
    for host in
        ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "169.254.169.254", "[::1]"]
    {
        let refused = code(&format!("http://{host}:{port}/"), &careful).await;
        // Not every resolver knows every odd spelling; none of them may get through.
        assert!(["forbidden_address", "unresolved"].contains(&refused), "{host}: {refused}");
    }
    assert!(server.seen().is_empty(), "nothing was asked of the private target");
}

#[tokio::test]
async fn a_redirect_is_checked_like_the_first_address() {
    let forbidden = Server::start_on("127.0.0.2:0", |_| whole(b"secret"), None).await;
    let target = forbidden.url("/latest/meta-data");
    let server = Server::start(move |_| redirect(&target)).await;
    let careful = FetchPolicy { allow_private: false, allowed: vec![server.address.ip()], ..local() };
    assert_eq!(code(&server.url("/"), &careful).await, "forbidden_address");
    assert_eq!((server.seen().len(), forbidden.seen().len()), (1, 0));
    assert_eq!(code(&forbidden.url("/"), &careful).await, "forbidden_address");
    let both = FetchPolicy { allowed: vec![server.address.ip(), forbidden.address.ip()], ..careful };
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(download(dir.path(), &server.url("/"), &both).await.bytes, b"secret");
}

#[tokio::test]
async fn what_is_too_large_is_not_downloaded() {
    let server = Server::start(|seen| match seen.path.as_str() {
        "/declared" => reply("200 OK", &[("content-length", "1000000")], b""),
        _ => reply("200 OK", &[], &vec![0; 100_000]),
    })
    .await;
    let small = FetchPolicy { max_size: 50_000, ..local() };
    for path in ["/declared", "/undeclared"] {
        let dir = tempfile::tempdir().unwrap();
        let done = download(dir.path(), &server.url(path), &small).await;
        assert_eq!(done.outcome.unwrap_err().code(), "too_large", "{path}");
        assert!(done.bytes.len() <= 50_000);
    }
}

#[tokio::test]
async fn other_schemes_and_answers_are_told() {
    for url in ["file:///etc/passwd", "ftp://127.0.0.1/x", "/etc/passwd", "json:{}", "http://u:p@127.0.0.1/"]
    {
        assert_eq!(code(url, &local()).await, "invalid_url", "{url}");
    }
    let server = Server::start(|seen| match seen.path.as_str() {
        "/busy" => reply("503 Service Unavailable", &[("content-length", "0")], b""),
        _ => reply("404 Not Found", &[("content-length", "0")], b""),
    })
    .await;
    let once = FetchPolicy { max_retries: 1, ..local() };
    assert_eq!(code(&server.url("/absent"), &once).await, "http_status");
    assert_eq!(server.seen().len(), 1, "asking again for what is absent is of no use");
    assert_eq!(code(&server.url("/busy"), &once).await, "http_status");
    assert_eq!(server.seen().len(), 3, "a busy server is asked again");
}

#[tokio::test]
async fn a_silent_server_and_a_cancelled_download_end() {
    let server = Server::start(|_| Reply::Silence).await;
    let impatient = FetchPolicy { idle_timeout: Duration::from_millis(50), max_retries: 0, ..local() };
    assert_eq!(code(&server.url("/"), &impatient).await, "timed_out");

    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).unwrap();
    let mut upload = store.upload("u").await.unwrap();
    let (progress, cancel) = (watch::Sender::new(ImportProgress::default()), CancellationToken::new());
    let (url, policy) = (server.url("/"), local());
    let (outcome, ()) = tokio::join!(fetch(&url, &policy, &mut upload, &progress, &cancel), async {
        while server.seen().len() < 2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        cancel.cancel();
    });
    assert_eq!(outcome.unwrap_err().code(), "cancelled");
}

/// A server for `localhost` whose certificate nobody knows, and that certificate.
async fn tls_server() -> (Server, String) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    (Server::start_on("127.0.0.1:0", |_| whole(b"over TLS"), Some(acceptor)).await, made.cert.pem())
}

#[tokio::test]
async fn an_unknown_certificate_is_refused() {
    let (server, _) = tls_server().await;
    let once = FetchPolicy { max_retries: 0, ..local() };
    let url = format!("https://localhost:{}/", server.address.port());
    let dir = tempfile::tempdir().unwrap();
    let error = download(dir.path(), &url, &once).await.outcome.unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    assert!(server.seen().is_empty());
}

const TLS_URL: &str = "OSTLER_TEST_TLS_URL";

/// Not a test of its own: a process that trusts the test server's certificate.
#[tokio::test]
#[ignore = "run by the test below, with another set of trusted certificates"]
async fn trusting_client() {
    let Ok(url) = std::env::var(TLS_URL) else { return };
    let dir = tempfile::tempdir().unwrap();
    let done = download(dir.path(), &url, &local()).await;
    done.outcome.unwrap();
    assert_eq!(done.bytes, b"over TLS");
}

#[tokio::test]
async fn a_certificate_that_this_machine_trusts_is_fine() {
    let (server, pem) = tls_server().await;
    let dir = tempfile::tempdir().unwrap();
    let roots = dir.path().join("roots.pem");
    std::fs::write(&roots, pem).unwrap();
    let url = format!("https://localhost:{}/", server.address.port());
    let status = tokio::task::spawn_blocking(move || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "fetch::trusting_client", "--ignored"])
            .env("SSL_CERT_FILE", roots)
            .env(TLS_URL, url)
            .status()
            .unwrap()
    });
    assert!(status.await.unwrap().success());
    assert_eq!(server.seen().len(), 1);
}
