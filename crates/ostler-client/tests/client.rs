//! The client against a small server: every transport, errors, repetition, streams, WebSockets, waiting.

mod support;

use std::time::Duration;

use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt;
use ostler_api::list::{ListParams, WatchLine};
use ostler_api::vm::{Vm, VmCreate};
use ostler_api::vm_phase::VmPhase;
use ostler_api::{ErrorCode, Name};
use ostler_client::{Client, ClientError, Credentials, Delete, Options, Retry, Target, Wait, body};
use serde_json::json;
use support::{Answer, Seen, Server, operation_of, vm};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

#[tokio::test]
async fn every_transport_carries_requests() {
    let answer = |seen: &Seen| {
        assert_eq!(seen.path, "/v1/vms/web");
        Answer::json(200, &vm("web", VmPhase::Running))
    };
    let unix = Server::unix(answer);
    let tls = Server::tls(answer).await;
    let tcp = Server::tcp(answer).await;
    let local = Server::local(answer);
    for server in [&unix, &tls, &tcp, &local] {
        let client = server.client();
        for _ in 0..3 {
            let vm = client.vm_get("web").await.unwrap();
            assert_eq!(vm.status.phase, VmPhase::Running);
        }
    }
    // Kept alive: three requests, one connection.
    assert_eq!(unix.connections(), 1);
    assert_eq!(tls.connections(), 1);
    assert_eq!(tcp.connections(), 1);
}

#[tokio::test]
async fn a_request_has_project_token_and_key() {
    let server = Server::unix(|seen: &Seen| {
        assert_eq!(seen.method, Method::POST);
        for (key, value) in [("project", "lab"), ("wait", "running"), ("timeout", "7")] {
            assert_eq!(seen.parameter(key), Some(value));
        }
        assert_eq!(seen.header("authorization"), Some("Bearer ostler_1_2"));
        assert_eq!(seen.header("idempotency-key").map(str::len), Some(32));
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&seen.body).unwrap()["name"], "web");
        Answer::json(201, &json!({"resource": vm("web", VmPhase::Pending)}))
    });
    let client =
        Client::connect(server.target(), Credentials::token("ostler_1_2")).unwrap().in_project("lab");
    let wait = Wait::phases(["running"], Duration::from_secs(7));
    let accepted = client.vm_create(&VmCreate::named(name("web")), Some(&wait)).await.unwrap();
    assert!(accepted.operation.is_none());
}

#[tokio::test]
async fn futures_may_be_spawned() {
    let server = Server::local(|_| Answer::json(200, &vm("web", VmPhase::Running)));
    let client = server.client();
    let task = tokio::spawn(async move {
        client.vm_get("web").await?;
        client.vm_start("web", None).await.err();
        client.vm_console("web", 0).await.err();
        client.wait_until::<Vm, _>("web", Duration::from_secs(5), |_| Some(())).await
    });
    task.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_problem_comes_back_whole() {
    let server = Server::unix(|_| Answer::problem(ErrorCode::NotFound, "there is no vm \"web\" here"));
    let error = server.client().vm_delete("web", &Delete::default()).await.unwrap_err();
    assert!(error.is_not_found());
    assert_eq!(error.to_string(), "there is no vm \"web\" here");
    assert_eq!(error.hint().as_deref(), Some("a hint"));

    let server = Server::unix(|_| Answer::text(502, "<html>\u{1b}[31m bad gateway"));
    let error = server.client().vm_get("web").await.unwrap_err();
    assert!(matches!(error, ClientError::Protocol(_)));
    assert!(error.to_string().contains("502") && error.to_string().contains("bad gateway"), "{error}");
    assert!(!error.to_string().contains('\u{1b}'));
}

#[tokio::test]
async fn no_server_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::connect(Target::Unix(dir.path().join("no.sock")), Credentials::none()).unwrap();
    let error = client.version().await.unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
    assert!(error.to_string().contains("no.sock"));
    assert!(error.hint().unwrap().contains("ostler serve"));
}

#[tokio::test]
async fn a_stranger_s_certificate_is_refused() {
    let server = Server::tls(|_| Answer::text(200, "")).await;
    let other = Server::tls(|_| Answer::text(200, "")).await;
    let target = server.target().with_ca(other.ca());
    let error = Client::connect(target, Credentials::none()).unwrap().version().await.unwrap_err();
    assert!(matches!(error, ClientError::Tls { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("--ca-cert"));
}

#[tokio::test]
async fn a_broken_connection_is_tried_again_with_the_same_key() {
    let server = Server::unix(|seen: &Seen| match seen.count {
        1 => Answer::hang_up(),
        _ => Answer::json(202, &json!({"resource": vm("web", VmPhase::Starting)})),
    });
    server.client().vm_start("web", None).await.unwrap();
    let keys = server.headers("idempotency-key");
    assert_eq!(keys.len(), 2);
    assert_eq!(keys[0], keys[1]);
}

#[tokio::test]
async fn what_must_not_be_repeated_is_not() {
    let server = Server::unix(|_| Answer::hang_up());
    let client = server.client();
    let how = Delete { if_match: Some(4), ..Delete::default() };
    assert!(matches!(client.vm_delete("web", &how).await.unwrap_err(), ClientError::Broken { .. }));
    assert_eq!(server.headers("if-match"), ["\"4\""]);
    let upload = client.image_upload("img", 0, true, body::full("data")).await;
    assert!(matches!(upload.unwrap_err(), ClientError::Broken { .. }));
    assert_eq!(server.requests(), 2);
}

#[tokio::test]
async fn a_silent_server_is_a_timeout() {
    let server = Server::unix(|_| Answer::never());
    let options = Options { request_timeout: Duration::from_millis(50), ..Options::default() };
    let client = Client::with_options(server.target(), Credentials::none(), options).unwrap();
    assert!(matches!(client.vm_get("web").await.unwrap_err(), ClientError::Timeout { .. }));
}

#[tokio::test]
async fn lists_fetch_every_page() {
    let server = Server::unix(|seen: &Seen| {
        let (from, next) = match seen.parameter("after") {
            None => (0, Some("two")),
            Some("two") => (2, Some("three")),
            Some(_) => (4, None),
        };
        let items: Vec<_> = (from..from + 2).map(|n| vm(&format!("web-{n}"), VmPhase::Running)).collect();
        Answer::json(200, &json!({"items": items, "revision": 7 + from, "next": next}))
    });
    let (vms, revision) = server.client().list_all::<Vm>(&ListParams::default()).await.unwrap();
    let names: Vec<_> = vms.iter().map(|vm| vm.metadata.name.as_str()).collect();
    assert_eq!(names, ["web-0", "web-1", "web-2", "web-3", "web-4", "web-5"]);
    assert_eq!(revision, 7);
}

#[tokio::test]
async fn lines_come_whole_however_they_are_cut() {
    let lines = [
        serde_json::to_string(&WatchLine::Added { object: vm("web", VmPhase::Running) }).unwrap(),
        serde_json::to_string(&WatchLine::<Vm>::Synced { revision: 9 }).unwrap(),
    ];
    let text = lines.join("\n") + "\n\n";
    let server = Server::unix(move |_| Answer::chunks(text.as_bytes().chunks(7)));
    let mut watch = server.client().watch::<Vm>(&ListParams::default()).await.unwrap();
    assert!(matches!(watch.next().await.unwrap(), Some(WatchLine::Added { .. })));
    assert_eq!(watch.next().await.unwrap(), Some(WatchLine::Synced { revision: 9 }));
    assert_eq!(watch.next().await.unwrap(), None);
}

#[tokio::test]
async fn lines_that_are_cut_off_damaged_or_endless_are_errors() {
    let cut = Server::unix(|_| Answer::chunks([&b"{\"type\":"[..]]));
    let mut watch = cut.client().watch::<Vm>(&ListParams::default()).await.unwrap();
    assert!(matches!(watch.next().await.unwrap_err(), ClientError::Broken { .. }));

    let damaged = Server::unix(|_| Answer::chunks([&b"nonsense\n"[..]]));
    let mut watch = damaged.client().watch::<Vm>(&ListParams::default()).await.unwrap();
    assert!(matches!(watch.next().await.unwrap_err(), ClientError::Protocol(_)));

    let long = vec![b'x'; 1 << 20];
    let endless = Server::unix(move |_| Answer::chunks((0..9).map(|_| &long[..])));
    let mut watch = endless.client().watch::<Vm>(&ListParams::default()).await.unwrap();
    assert!(matches!(watch.next().await.unwrap_err(), ClientError::Protocol(_)));
}

#[tokio::test]
async fn a_watch_without_a_sign_of_life_is_a_timeout() {
    let server = Server::unix(|_| Answer::open_lines(&[WatchLine::<Vm>::Synced { revision: 9 }]));
    let options = Options { stream_idle: Duration::from_millis(50), ..Options::default() };
    let client = Client::with_options(server.target(), Credentials::none(), options).unwrap();
    let mut watch = client.watch::<Vm>(&ListParams::default()).await.unwrap();
    assert!(watch.next().await.unwrap().is_some());
    assert!(matches!(watch.next().await.unwrap_err(), ClientError::Timeout { .. }));
}

#[tokio::test]
async fn waiting_follows_the_watch_and_survives_its_end() {
    let server = Server::unix(|seen: &Seen| match (seen.parameter("watch"), seen.count) {
        (None, 1) => Answer::json(200, &vm("web", VmPhase::Pending)),
        // The first watch breaks off.
        (Some(_), 2) => Answer::lines(&[WatchLine::Added { object: vm("web", VmPhase::Pending) }]),
        (None, 3) => Answer::json(200, &vm("web", VmPhase::Starting)),
        (Some(_), 4) => Answer::open_lines(&[
            WatchLine::Added { object: vm("other", VmPhase::Running) },
            WatchLine::Added { object: vm("web", VmPhase::Starting) },
            WatchLine::Synced { revision: 3 },
            WatchLine::Modified { object: vm("web", VmPhase::Running) },
        ]),
        other => panic!("{other:?}"),
    });
    let mut phases = Vec::new();
    let phase = server
        .client()
        .wait_until("web", Duration::from_secs(20), |vm: Option<&Vm>| {
            let phase = vm.expect("there").status.phase;
            phases.push(phase);
            (phase == VmPhase::Running).then_some(phase)
        })
        .await
        .unwrap();
    assert_eq!(phase, VmPhase::Running);
    assert_eq!(phases.last(), Some(&VmPhase::Running));
}

#[tokio::test]
async fn waiting_sees_that_it_is_gone_and_that_time_is_up() {
    let server = Server::unix(|seen: &Seen| match (seen.parameter("watch"), seen.count) {
        (None, 1) => Answer::json(200, &vm("web", VmPhase::Deleting)),
        (Some(_), _) => Answer::lines(&[WatchLine::Deleted { object: vm("web", VmPhase::Deleting) }]),
        (None, _) => Answer::problem(ErrorCode::NotFound, "gone"),
    });
    let gone = |vm: Option<&Vm>| vm.is_none().then_some(());
    server.client().wait_until("web", Duration::from_secs(20), gone).await.unwrap();

    let server = Server::unix(|seen: &Seen| match seen.parameter("watch") {
        None => Answer::json(200, &vm("web", VmPhase::Deleting)),
        Some(_) => Answer::never(),
    });
    let error = server.client().wait_until("web", Duration::from_millis(80), gone).await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error:?}");
}

#[tokio::test]
async fn an_operation_is_followed_to_its_end() {
    let server = Server::unix(|seen: &Seen| match seen.parameter("watch") {
        None => Answer::json(200, &operation_of("vm.start", "running")),
        Some(_) => Answer::lines(&[WatchLine::Added { object: operation_of("vm.start", "succeeded") }]),
    });
    let mut seen = 0;
    let end = server.client().operation_wait("op", Duration::from_secs(20), |_| seen += 1).await.unwrap();
    assert!(end.status.phase.is_final());
    assert_eq!(seen, 2);
}

#[tokio::test]
async fn uploads_and_downloads_stream() {
    let server = Server::unix(|seen: &Seen| match seen.method.as_str() {
        "PUT" => {
            assert_eq!(seen.query, "offset=5&last=true");
            assert_eq!(seen.body.len(), 600_000);
            Answer::json(200, &json!({"offset": 600_005}))
        }
        _ => Answer::chunks([&b"0123"[..], b"456"]),
    });
    let client = server.client();
    let data = std::io::Cursor::new(vec![7u8; 600_000]);
    let state = client.image_upload("img", 5, true, body::reader(data)).await.unwrap();
    assert_eq!(state.offset, 600_005);
    let (_, body) = client.image_data("img", None).await.unwrap();
    assert_eq!(body.collect().await.unwrap().to_bytes(), "0123456");
}

#[tokio::test]
async fn websockets_carry_bytes_both_ways_on_every_transport() {
    let answer = |_: &Seen| Answer::Echo;
    for server in
        [Server::unix(answer), Server::tls(answer).await, Server::tcp(answer).await, Server::local(answer)]
    {
        let (mut sender, mut receiver) = server.client().vm_console("web", 4096).await.unwrap().split();
        sender.send(Bytes::from_static(b"login: ")).await.unwrap();
        assert_eq!(receiver.recv().await.unwrap().unwrap(), "login: ");
        sender.close().await.unwrap();
        assert_eq!(receiver.recv().await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_refused_websocket_says_why() {
    let server = Server::unix(|_| Answer::problem(ErrorCode::Conflict, "the VM is stopped"));
    let error = server.client().vm_console("web", 0).await.err().unwrap();
    assert_eq!(error.code(), Some(ErrorCode::Conflict), "{error:?}");
}

#[tokio::test]
async fn a_client_may_wait_for_a_server_that_starts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("late.sock");
    let options = Options {
        retry: Retry { attempts: 100, delay: Duration::from_millis(10), refused: true },
        ..Options::default()
    };
    let client = Client::with_options(Target::Unix(path.clone()), Credentials::none(), options).unwrap();
    let asking = tokio::spawn(async move { client.vm_get("web").await });
    let _server = Server::unix_at(&path, |_| Answer::json(200, &vm("web", VmPhase::Running)));
    asking.await.unwrap().unwrap();
}
