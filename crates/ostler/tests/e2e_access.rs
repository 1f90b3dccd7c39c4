//! Access from elsewhere: TLS and tokens, consoles and displays, watches, metrics, repeated requests.

#[path = "e2e/mod.rs"]
mod e2e;

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e::{Done, PATIENCE, TestServer, cli_command, http, wait_until};
use ostler_api::list::{ListParams, WatchLine};
use ostler_api::token::Token;
use ostler_api::vm::Vm;
use ostler_client::{Client, Credentials, Target};

/// What runs on a runtime of its own.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let limited = async { tokio::time::timeout(PATIENCE, future).await.expect("in time") };
    runtime.block_on(limited)
}

fn client(server: &TestServer) -> Client {
    Client::connect(Target::Unix(server.socket()), Credentials::none()).unwrap()
}

/// A server that listens for TLS on the port that is returned.
fn with_tls() -> (TestServer, u16) {
    let mut server = TestServer::prepare("", &[]);
    let port = server.free_port();
    server.args = vec!["--listen".to_owned(), format!("127.0.0.1:{port}")];
    server.start();
    (server, port)
}

/// The command line over TLS, with a token, as from another machine.
fn remote(server: &TestServer, port: u16, ca: &Path, token: Option<&str>, args: &[&str]) -> Done {
    let mut command = cli_command(&server.home());
    command.env("OSTLER_HOST", format!("https://127.0.0.1:{port}")).env("OSTLER_CA_CERT", ca).args(args);
    if let Some(token) = token {
        command.env("OSTLER_TOKEN", token);
    }
    command.output().unwrap().into()
}

#[test]
fn over_tls_a_token_opens_and_nothing_else() {
    let (server, port) = with_tls();
    let ca = server.data().join("tls/ca.pem");
    let refused = remote(&server, port, &ca, None, &["vm", "list"]);
    assert_eq!(refused.code, 6, "{}", refused.stderr);
    let secret = server.ok(&["token", "create", "laptop"]);
    let secret = secret.trim();
    assert!(secret.starts_with("ostler_"), "{secret}");
    let list = remote(&server, port, &ca, Some(secret), &["vm", "list"]);
    assert_eq!(list.code, 0, "{}", list.stderr);

    // The secret is not to be seen again, and not on the disk.
    let tokens: Vec<Token> = server.json(&["token", "list"]);
    assert!(tokens.iter().any(|token| token.metadata.name.as_str() == "laptop"));
    let listed = server.ok(&["token", "list", "-o", "json"]);
    let hidden = secret.rsplit('_').next().unwrap();
    assert!(!listed.contains(hidden));
    for file in ["ostler.db", "ostler.db-wal"] {
        let bytes = std::fs::read(server.data().join(file)).unwrap_or_default();
        assert!(!bytes.windows(hidden.len()).any(|part| part == hidden.as_bytes()), "{file} has the secret");
    }

    // A reader looks and does not touch.
    let reader = server.ok(&["token", "create", "reader", "--role", "reader", "--project", "default"]);
    assert_eq!(remote(&server, port, &ca, Some(reader.trim()), &["vm", "list"]).code, 0);
    let denied = remote(&server, port, &ca, Some(reader.trim()), &["token", "create", "more"]);
    assert_eq!(denied.code, 6, "{}", denied.stderr);

    for wrong in ["ostler_x_y", "", &secret[..secret.len() - 1]] {
        assert_eq!(remote(&server, port, &ca, Some(wrong), &["vm", "list"]).code, 6, "{wrong}");
    }
    server.ok(&["token", "revoke", "laptop"]);
    assert_eq!(remote(&server, port, &ca, Some(secret), &["vm", "list"]).code, 6);
    server.nothing_left();
}

#[test]
fn a_server_with_another_authority_is_not_believed() {
    let (mut server, port) = with_tls();
    let token = server.ok(&["token", "create", "laptop"]);
    let other = server.file("other.pem");
    let key = server.file("other.key");
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "2", "-subj", "/CN=other"])
        .args(["-keyout", &key, "-out", &other])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let refused = remote(&server, port, Path::new(&other), Some(token.trim()), &["vm", "list"]);
    assert_eq!(refused.code, 1, "{}", refused.stderr);
    assert!(refused.stderr.to_lowercase().contains("certificate"), "{}", refused.stderr);
    // The authority stays the same over restarts, or every client would have to be told.
    let ca = server.data().join("tls/ca.pem");
    let before = std::fs::read(&ca).unwrap();
    server.restart();
    assert_eq!(std::fs::read(&ca).unwrap(), before);
    assert_eq!(remote(&server, port, &ca, Some(token.trim()), &["vm", "list"]).code, 0);
    server.nothing_left();
}

#[test]
fn http_without_tls_stays_on_this_machine() {
    let server = TestServer::prepare("", &["--plain-http", "0.0.0.0:0"]);
    let (status, said) = server.start_refused();
    assert!(status.code() == Some(2) && said.contains("loopback"), "{status} {said}");
    let mut far = cli_command(&server.home());
    let far: Done = far.args(["vm", "list", "--host", "http://192.0.2.1:80"]).output().unwrap().into();
    assert!(far.code == 2 && far.stderr.contains("https://"), "{} {}", far.code, far.stderr);
}

#[test]
fn several_people_share_a_console() {
    let server = TestServer::new();
    server.import_kernel();
    server.create_direct("a", "", &[]);
    server.marker("a", "ready");
    let mut first = server.watch_console("a");
    // What was printed before anybody looked.
    first.sees("OSTLER-GUEST ready");
    first.types("echo $((6*7))-first\n");
    first.sees("\n42-first");
    let mut second = server.watch_console("a");
    second.sees("\n42-first");
    second.types("echo $((6*7))-second\n");
    first.sees("\n42-second");
    second.sees("\n42-second");
    drop(first);
    second.types("echo $((6*7))-third\n");
    second.sees("\n42-third");
    assert!(server.log("a").contains("42-third"));
    server.nothing_left();
}

#[test]
fn the_display_speaks_rfb() {
    let server = TestServer::new();
    server.import_kernel();
    server.create_direct("a", "", &[]);
    let hello = block_on(async {
        let mut socket = client(&server).vm_vnc("a").await.unwrap();
        let mut hello = Vec::new();
        while hello.len() < 12 {
            hello.extend_from_slice(&socket.recv().await.unwrap().expect("more"));
        }
        String::from_utf8_lossy(&hello).into_owned()
    });
    assert_eq!(hello, "RFB 003.008\n");
    server.nothing_left();
}

#[test]
fn the_api_describes_and_counts_itself() {
    let mut server = TestServer::new();
    let openapi = server.http("GET", "/v1/openapi.json").unwrap();
    assert_eq!(openapi.status, 200);
    assert!(openapi.json()["paths"]["/v1/vms/{vm}/actions/rebuild"]["post"].is_object());
    server.import_guest();
    let port = server.port();
    let publish = format!("{port}:80");
    let vm = ["vm", "create", "a", "--image", "guest", "--memory", "64M", "--wait", "--publish", &publish];
    server.ok(&vm);
    let metrics = server.http("GET", "/metrics").unwrap().text();
    assert!(metrics.contains("ostler_resources{kind=\"vm\",phase=\"running\"} 1"), "{metrics}");
    let health = server.http("GET", "/healthz").unwrap();
    assert_eq!((health.status, health.text().trim()), (200, "ok"));
    // What is published is open as long as the VM runs.
    let addr = SocketAddr::from(([127, 0, 0, 1], port));
    TcpStream::connect_timeout(&addr, Duration::from_secs(5)).unwrap();
    server.ok(&["vm", "stop", "a", "--wait"]);
    wait_until("the port is closed", || TcpStream::connect_timeout(&addr, Duration::from_secs(5)).is_err());
    server.nothing_left();
}

#[test]
fn a_watch_sees_what_comes_and_goes() {
    let server = TestServer::new();
    server.import_guest();
    let (seen, phases) = block_on(async {
        let client = client(&server);
        let mut lines = client.watch::<Vm>(&ListParams::default()).await.unwrap();
        let (mut seen, mut phases) = (Vec::new(), Vec::new());
        loop {
            match lines.next().await.unwrap().expect("it goes on") {
                WatchLine::Synced { .. } => {
                    server.ok(&["vm", "create", "a", "--image", "guest", "--memory", "64M"]);
                }
                WatchLine::Added { object } => seen.push(format!("added {}", object.metadata.name)),
                WatchLine::Modified { object } => {
                    phases.push(object.status.phase.as_str());
                    if phases.last() == Some(&"running") && !phases.contains(&"deleting") {
                        server.ok(&["vm", "delete", "a"]);
                    }
                }
                WatchLine::Deleted { object } => {
                    seen.push(format!("deleted {}", object.metadata.name));
                    return (seen, phases);
                }
                WatchLine::Bookmark { .. } => {}
                WatchLine::Error { problem } => panic!("{problem:?}"),
            }
        }
    });
    assert_eq!(seen, ["added a", "deleted a"]);
    let place = |phase| phases.iter().position(|seen| *seen == phase).unwrap_or_else(|| panic!("{phases:?}"));
    assert!(place("starting") < place("running") && place("running") < place("deleting"), "{phases:?}");
    server.nothing_left();
}

#[test]
fn a_repeated_create_makes_one_vm() {
    let mut server = TestServer::new();
    server.import_guest();
    let create = |server: &TestServer, key: &str, body: &str| {
        let headers = [("content-type", "application/json"), ("idempotency-key", key)];
        http(&server.socket(), "POST", "/v1/vms", &headers, body.as_bytes()).unwrap()
    };
    let body = r#"{"name": "a", "image": "guest", "start": false}"#;
    let first = create(&server, "key-1", body);
    assert_eq!(first.status, 201, "{}", first.text());
    let id =
        |answer: &e2e::Response| answer.json()["resource"]["metadata"]["id"].as_str().unwrap().to_owned();
    // The client never saw the answer, and the server died.
    server.restart();
    let second = create(&server, "key-1", body);
    assert_eq!(id(&second), id(&first), "{}", second.text());
    assert_eq!(server.ok(&["vm", "list", "-o", "name"]), "a\n");
    let other = create(&server, "key-1", r#"{"name": "b", "image": "guest"}"#);
    assert_eq!((other.status, other.json()["code"].as_str()), (422, Some("idempotency_mismatch")));
    let anew = create(&server, "key-2", body);
    assert_eq!(anew.status, 409, "{}", anew.text());
    server.nothing_left();
}
