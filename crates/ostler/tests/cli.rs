//! The built binary against a scripted server: what it asks, what it prints, what it exits with.

#[path = "../../ostler-client/tests/support/script.rs"]
#[allow(dead_code)]
mod script;

use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use hyper::Method;
use ostler_api::ErrorCode;
use ostler_api::list::WatchLine;
use ostler_api::vm_phase::VmPhase;
use script::{Answer, Seen, State, operation_of, vm};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::process::Command;

struct Server {
    dir: tempfile::TempDir,
    seen: Arc<Mutex<Vec<String>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug)]
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Server {
    fn new(script: impl Fn(&Seen) -> Answer + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s.sock")).unwrap();
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = seen.clone();
        let state = State::new(move |request| {
            let query = if request.query.is_empty() { "" } else { "?" };
            log.lock().unwrap().push(format!("{} {}{query}{}", request.method, request.path, request.query));
            script(request)
        });
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(script::serve(state.clone(), stream));
            }
        });
        Self { dir, seen, task }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = ostler(self.dir.path(), line);
        command.env("OSTLER_HOST", format!("unix://{}", self.path("s.sock").display()));
        command
    }

    async fn run(&self, line: &str) -> Run {
        run(self.command(line), b"").await
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

/// The binary with nothing of the environment but a home.
fn ostler(home: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ostler"));
    command.args(line.split_whitespace()).env_clear().env("HOME", home).env("PATH", "/usr/bin:/bin");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

async fn run(mut command: Command, input: &[u8]) -> Run {
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // A command that does not read its input closes it.
    let writing = tokio::spawn(async move { stdin.write_all(&input).await });
    let output = child.wait_with_output().await.unwrap();
    let _ = writing.await.unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn accepted(resource: &impl serde::Serialize, operation: Option<(&str, &str)>) -> Value {
    match operation {
        Some((action, phase)) => json!({"operation": operation_of(action, phase), "resource": resource}),
        None => json!({"resource": resource}),
    }
}

fn list(items: &[impl serde::Serialize]) -> Answer {
    Answer::json(200, &json!({"items": items, "revision": 5}))
}

#[tokio::test]
async fn every_kind_of_refusal_has_its_exit_code_and_says_what_why_and_what_to_do() {
    for (code, exit) in [
        (ErrorCode::Invalid, 2),
        (ErrorCode::NotFound, 3),
        (ErrorCode::Conflict, 4),
        (ErrorCode::InUse, 4),
        (ErrorCode::TimedOut, 5),
        (ErrorCode::Forbidden, 6),
        (ErrorCode::Unauthenticated, 6),
        (ErrorCode::Internal, 1),
    ] {
        let server = Server::new(move |_| Answer::problem(code, "it is so"));
        let run = server.run("vm show web").await;
        assert_eq!(run.code, Some(exit), "{code}: {run:?}");
        assert_eq!(run.stderr, "error: cannot show vm web\n  why: it is so\n  hint: a hint\n", "{code}");
        assert_eq!(run.stdout, "");
    }
}

#[tokio::test]
async fn usage_errors_exit_with_2_and_no_server_with_1() {
    let home = tempfile::tempdir().unwrap();
    for line in ["vm create BAD", "vm list -o pretty", "--host http://10.1.2.3 vm list", "nonsense"] {
        let run = run(ostler(home.path(), line), b"").await;
        assert_eq!(run.code, Some(2), "{line}: {run:?}");
        assert!(run.stderr.starts_with("error: "), "{run:?}");
    }
    let mut command = ostler(home.path(), "vm list");
    command.env("OSTLER_DATA_DIR", home.path());
    let run = run(command, b"").await;
    assert_eq!(run.code, Some(1));
    let socket = home.path().join("ostler.sock");
    assert!(run.stderr.contains(socket.to_str().unwrap()), "{run:?}");
    assert!(run.stderr.contains("hint: is `ostler serve` running"), "{run:?}");
}

#[tokio::test]
async fn lists_in_every_format() {
    let server = Server::new(|_| list(&[vm("web", VmPhase::Running), vm("database", VmPhase::Stopped)]));
    let table = server.run("vm list").await;
    let lines: Vec<_> =
        table.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!(lines[0], ["NAME", "PHASE", "NODE", "CPUS", "MEMORY", "AGE"]);
    assert_eq!(lines[1][..6], ["web", "running", "-", "1", "512", "MiB"]);
    assert!(server.run("vm list -o wide").await.stdout.contains("MACHINE"));
    assert_eq!(server.run("vm list -o name").await.stdout, "web\ndatabase\n");
    let json: Value = serde_json::from_str(&server.run("vm list -o json").await.stdout).unwrap();
    assert_eq!(json[1]["status"]["phase"], "stopped");
    let yaml = server.run("vm list -o yaml").await.stdout;
    assert!(yaml.contains("phase: running") && yaml.contains("name: web"), "{yaml}");
}

#[tokio::test]
async fn filters_and_the_project_go_to_the_server() {
    let server = Server::new(|_| list(&[0u8; 0]));
    let line =
        "vm list --name web --label tier=web --label !old --phase running,error --node n1 --project lab";
    let run = server.run(line).await;
    assert_eq!((run.code, run.stdout.lines().count()), (Some(0), 1));
    let seen = &server.seen()[0];
    for part in
        ["project=lab", "name=web", "label=tier%3Dweb%2C%21old", "phase=running%2Cerror", "node=n1", "limit="]
    {
        assert!(seen.contains(part), "{seen} {part}");
    }
    server.run("vm list -A").await;
    assert!(server.seen()[1].contains("project=%2A"));
}

#[tokio::test]
async fn show_prints_sections_or_the_api_s_own_shape() {
    let server = Server::new(|_| Answer::json(200, &vm("web", VmPhase::Running)));
    let human = server.run("vm show web").await.stdout;
    assert!(human.contains("\nStatus\n") && human.contains("Phase:") && human.contains("512 MiB"), "{human}");
    let json: Value = serde_json::from_str(&server.run("vm show web -o json").await.stdout).unwrap();
    assert_eq!(json["status"]["phase"], "running");
}

#[tokio::test]
async fn a_reader_that_has_enough_is_no_error() {
    let server = Server::new(|_| {
        let vms: Vec<_> = (0..3000).map(|n| vm(&format!("vm-{n}"), VmPhase::Running)).collect();
        list(&vms)
    });
    let mut child = server.command("vm list -o json").spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).await.unwrap();
    drop(stdout);
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

/// A server on which one action runs and ends in `end`.
fn acting(end: &'static str, phase: VmPhase) -> Server {
    Server::new(move |seen: &Seen| match (seen.method.as_str(), seen.path.as_str()) {
        ("POST", _) => {
            Answer::json(202, &accepted(&vm("web", VmPhase::Starting), Some(("vm.start", "running"))))
        }
        ("GET", path) if path.starts_with("/v1/operations/") => {
            let mut operation = serde_json::to_value(operation_of("vm.start", end)).unwrap();
            if end == "failed" {
                operation["status"]["reason"] = json!({"code": "qemu_died", "message": "QEMU said: no space", "at": "2026-01-02T03:04:05Z"});
            }
            Answer::json(200, &operation)
        }
        ("GET", "/v1/operations") => Answer::open_lines(&[json!({"type": "synced", "revision": 1})]),
        _ => Answer::json(200, &vm("web", phase)),
    })
}

#[tokio::test]
async fn without_wait_it_says_what_was_begun() {
    let server = acting("running", VmPhase::Starting);
    let run = server.run("vm start web").await;
    assert_eq!(run.code, Some(0));
    let id = operation_of("x", "running").metadata.id;
    assert_eq!(run.stdout, format!("start vm web: begun (operation {id})\n"));
    assert_eq!(server.seen(), ["POST /v1/vms/web/actions/start"]);
}

#[tokio::test]
async fn with_wait_it_follows_to_the_end() {
    let server = acting("succeeded", VmPhase::Running);
    let run = server.run("vm start web --wait").await;
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.stdout.starts_with("vm web is running ("), "{run:?}");
    let json = server.run("vm start web --wait -o json").await;
    assert_eq!(serde_json::from_str::<Value>(&json.stdout).unwrap()["status"]["phase"], "running");

    let run = acting("failed", VmPhase::Error).run("vm start web --wait").await;
    assert_eq!(run.code, Some(1), "{run:?}");
    assert!(run.stderr.contains("error: cannot start vm web"), "{run:?}");
    assert!(run.stderr.contains("why: QEMU said: no space (qemu_died)"), "{run:?}");
    assert!(run.stderr.contains("hint: "), "{run:?}");
}

#[tokio::test]
async fn a_wait_that_is_too_long_exits_with_5_and_says_how_to_go_on() {
    let run = acting("running", VmPhase::Starting).run("vm start web --wait --timeout 1").await;
    assert_eq!(run.code, Some(5), "{run:?}");
    assert!(
        run.stderr.contains("the work goes on") && run.stderr.contains("ostler operation show"),
        "{run:?}"
    );
}

#[tokio::test]
async fn create_sends_what_was_asked_for() {
    let body: Arc<Mutex<Value>> = Arc::default();
    let kept = body.clone();
    let server = Server::new(move |seen: &Seen| {
        assert_eq!(seen.path, "/v1/vms");
        *kept.lock().unwrap() = serde_json::from_slice(&seen.body).unwrap();
        Answer::json(201, &accepted(&vm("web", VmPhase::Pending), Some(("vm.create", "pending"))))
    });
    let line = "vm create web --image debian --cpus 2 --memory 1G --disk 20G -p 2222:22 --publish 0.0.0.0:53:53/udp \
                --label tier=web --node-selector ssd=yes --machine i440fx --no-start -o name";
    let run = server.run(line).await;
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), "web\n"), "{run:?}");
    let body = body.lock().unwrap().clone();
    assert_eq!(body["image"], "debian");
    assert_eq!(body["memory"], 1u64 << 30);
    assert_eq!(body["disk"], 20u64 << 30);
    assert_eq!(body["publish"][0]["guest_port"], 22);
    assert_eq!(body["publish"][1]["protocol"], "udp");
    assert_eq!(body["labels"], json!({"tier": "web"}));
    assert_eq!(body["start"], false);
    assert_eq!(body["machine"], "i440fx");
}

#[tokio::test]
async fn one_that_fails_does_not_keep_the_others() {
    let server = Server::new(|seen: &Seen| match (seen.method.as_str(), seen.path.as_str()) {
        ("DELETE", "/v1/vms/b") => Answer::problem(ErrorCode::NotFound, "there is no vm \"b\" here"),
        ("DELETE", _) => Answer::json(202, &accepted(&vm("x", VmPhase::Deleting), None)),
        _ => Answer::problem(ErrorCode::NotFound, "gone"),
    });
    let run = server.run("vm delete a b c --wait --force").await;
    assert_eq!(run.code, Some(3), "{run:?}");
    assert_eq!(run.stdout.matches("deleted").count(), 2, "{run:?}");
    assert!(run.stderr.contains("cannot delete vm b"), "{run:?}");
    assert!(server.seen().contains(&"DELETE /v1/vms/c?force=true".to_owned()));
}

/// An image that is uploaded; the data as the server has it.
fn uploads(breaks: bool) -> (Server, Arc<Mutex<Vec<u8>>>) {
    let data: Arc<Mutex<Vec<u8>>> = Arc::default();
    let kept = data.clone();
    let done = Arc::new(Mutex::new(false));
    let broken = AtomicBool::new(breaks);
    let image = |phase: &str| json!({"metadata": vm("img", VmPhase::Running).metadata, "spec": {}, "status": {"phase": phase}});
    let server = Server::new(move |seen: &Seen| {
        let mut data = kept.lock().unwrap();
        let mut done = done.lock().unwrap();
        match (seen.method.clone(), seen.path.ends_with("/upload")) {
            (Method::POST, _) => Answer::json(201, &accepted(&image("queued"), None)),
            (Method::PUT, _) => {
                let offset: usize = seen.parameter("offset").unwrap().parse().unwrap();
                if offset != data.len() {
                    return Answer::problem(ErrorCode::Conflict, "another offset");
                }
                if offset > 0 && broken.swap(false, Ordering::Relaxed) {
                    // Half of it arrives, and then the connection breaks.
                    data.extend_from_slice(&seen.body[..seen.body.len() / 2]);
                    return Answer::hang_up();
                }
                data.extend_from_slice(&seen.body);
                *done = seen.parameter("last") == Some("true");
                Answer::json(200, &json!({"offset": data.len()}))
            }
            (_, true) => Answer::json(200, &json!({"offset": data.len()})),
            (_, false) => Answer::json(200, &image(if *done { "active" } else { "uploading" })),
        }
    });
    (server, data)
}

fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * 7 + n / 251) as u8).collect()
}

#[tokio::test]
async fn an_upload_goes_on_after_a_break() {
    // One and a bit chunks: the second is broken.
    let (server, data) = uploads(true);
    let file = server.path("disk.raw");
    std::fs::write(&file, noise(9 << 20)).unwrap();
    let run = server.run(&format!("image import img {}", file.display())).await;
    assert_eq!(run.code, Some(0), "{run:?} {:?}", server.seen());
    assert!(run.stdout.starts_with("image img is active"), "{run:?}");
    assert!(*data.lock().unwrap() == noise(9 << 20));
}

#[tokio::test]
async fn standard_input_is_uploaded_whole_also_when_it_is_empty() {
    for length in [0, 5, 8 << 20, 17_000_000] {
        let (server, data) = uploads(false);
        let run = run(server.command("image import img - -o json"), &noise(length)).await;
        assert_eq!(run.code, Some(0), "{run:?}");
        assert_eq!(serde_json::from_str::<Value>(&run.stdout).unwrap()["status"]["phase"], "active");
        assert!(*data.lock().unwrap() == noise(length), "{length}");
        let last: Vec<_> = server.seen().into_iter().filter(|line| line.contains("last=true")).collect();
        assert_eq!(last.len(), 1, "{last:?}");
    }
}

#[tokio::test]
async fn a_broken_off_import_is_taken_up_again() {
    let (server, data) = uploads(false);
    data.lock().unwrap().extend_from_slice(&noise(1000));
    let file = server.path("disk.raw");
    std::fs::write(&file, noise(5000)).unwrap();
    let run = server.run(&format!("image import img {} --resume", file.display())).await;
    assert_eq!(run.code, Some(0), "{run:?}");
    assert!(run.stderr.contains("going on after"), "{run:?}");
    assert!(*data.lock().unwrap() == noise(5000));
}

#[tokio::test]
async fn a_file_that_is_not_there_makes_nothing() {
    let (server, _) = uploads(false);
    let run = server.run("image import img /no/such/file").await;
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("/no/such/file") && run.stderr.contains("hint:"), "{run:?}");
    assert!(server.seen().is_empty());
}

#[tokio::test]
async fn an_export_that_is_not_what_it_should_be_leaves_no_file() {
    let server = Server::new(|seen: &Seen| {
        if seen.path.ends_with("/data") {
            return Answer::chunks([&b"hello"[..]]);
        }
        let good = seen.path.ends_with("/good");
        let hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        let sha = if good { hello.to_owned() } else { "0".repeat(64) };
        Answer::json(
            200,
            &json!({"metadata": vm("img", VmPhase::Running).metadata, "spec": {}, "status": {
                "phase": "active",
                "data": {"sha256": sha, "source_sha256": sha, "format": "raw", "source_format": "raw",
                         "content": "disk", "virtual_size": 5, "size": 5}}}),
        )
    });
    let file = server.path("out.raw");
    let line = |image: &str| format!("image export {image} {}", file.display());
    let run = server.run(&line("bad")).await;
    assert_eq!(run.code, Some(1), "{run:?}");
    assert!(run.stderr.contains("SHA-256"), "{run:?}");
    assert_eq!(std::fs::read_dir(server.dir.path()).unwrap().count(), 1, "only the socket");
    assert_eq!(server.run(&line("good")).await.code, Some(0));
    assert_eq!(std::fs::read(&file).unwrap(), b"hello");
    assert_eq!(server.run(&line("good")).await.code, Some(4), "it is there already");
    assert_eq!(server.run("image export good -").await.stdout, "hello");
}

#[tokio::test]
async fn a_console_in_a_pipe_copies_both_ways_and_ends_when_it_is_silent() {
    let server = Server::new(|_| Answer::Echo);
    let run = run(server.command("vm console web --linger 1"), b"root\n").await;
    assert_eq!(run.code, Some(0), "{run:?}");
    assert_eq!(run.stdout, "root\n");
    assert_eq!(server.seen(), ["GET /v1/vms/web/console?scrollback=16384"]);
}

#[tokio::test]
async fn a_console_gives_the_terminal_back_after_the_escape_and_after_a_signal() {
    let server = Server::new(|_| Answer::Echo);
    let binary = env!("CARGO_BIN_EXE_ostler");
    for (console, input) in [
        (format!("{binary} vm console web"), &b"\x03abc\x1d"[..]),
        (format!("timeout --foreground -s TERM 1 {binary} vm console web"), &b""[..]),
    ] {
        // A terminal of its own, whose settings are compared before and after.
        let line = format!(
            "before=$(stty -g); {console}; code=$?; [ \"$before\" = \"$(stty -g)\" ] && echo same $code"
        );
        let mut command = Command::new("script");
        command.args(["-qec", &line, "/dev/null"]).env_clear().env("PATH", "/usr/bin:/bin");
        command.env("HOME", server.dir.path()).env("TERM", "dumb").env("SHELL", "/bin/sh");
        command.env("OSTLER_HOST", format!("unix://{}", server.path("s.sock").display()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut text = String::new();
        // Keys count only once the terminal is raw, which this line tells.
        while !text.contains("ctrl-] leaves") {
            assert!(stdout.read_line(&mut text).await.unwrap() > 0, "{text}");
        }
        stdin.write_all(input).await.unwrap();
        while !text.contains("same ") {
            assert!(
                stdout.read_line(&mut text).await.unwrap() > 0,
                "the terminal is not as it was: {text:?}"
            );
        }
        if input.is_empty() {
            assert!(text.contains("same 124") || text.contains("same 143"), "{text:?}");
        } else {
            assert!(text.contains("same 0"), "{text:?}");
        }
        drop(stdin);
        child.wait().await.unwrap();
    }
}

#[tokio::test]
async fn a_log_in_a_pipe_is_the_guest_s_own_bytes() {
    let server = Server::new(|_| Answer::chunks([&b"boot\r\n\x1b[2J"[..], b"login: "]));
    let run = server.run("vm log web --tail 4K").await;
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), "boot\r\n\x1b[2Jlogin: "));
    assert_eq!(server.seen(), ["GET /v1/vms/web/log?follow=false&tail=4096"]);
}

#[tokio::test]
async fn events_are_followed_line_by_line() {
    let event = |message: &str, id: u128| {
        json!({"metadata": {"id": uuid::Uuid::from_u128(id), "name": format!("e{id}"), "revision": 5 + id as u64,
                            "created": "2026-01-02T03:04:05Z"},
               "spec": {"code": "vm.started", "severity": "info", "message": message,
                        "target": {"kind": "vm", "id": uuid::Uuid::nil(), "name": "web"}}})
    };
    let server = Server::new(move |seen: &Seen| match seen.parameter("watch") {
        None => list(&[event("first", 0)]),
        Some(_) => {
            assert_eq!(seen.parameter("from"), Some("6"));
            Answer::open_lines(&[WatchLine::Added { object: event("second\u{1b}[2J", 1) }])
        }
    });
    for line in ["events --follow", "events --follow -o json"] {
        let mut child = server.command(line).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut text = String::new();
        while !text.contains("second") {
            text += &lines.next_line().await.unwrap().expect("one more line");
            text += "\n";
        }
        assert!(text.contains("first") && !text.contains('\u{1b}'), "{text:?}");
        child.kill().await.unwrap();
    }
}

#[tokio::test]
async fn a_token_s_secret_is_all_that_is_on_standard_output() {
    let server = Server::new(|_| {
        Answer::json(
            201,
            &json!({"token": {"metadata": vm("ci", VmPhase::Running).metadata, "spec": {"role": "reader"}},
                    "secret": "ostler_1_hush"}),
        )
    });
    let run = server.run("token create ci --role reader --ttl 90d").await;
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), "ostler_1_hush\n"));
    assert!(!run.stderr.contains("hush") && run.stderr.contains("not shown again"), "{run:?}");
}

#[tokio::test]
async fn contexts_are_kept_privately_and_used() {
    let server = Server::new(|seen: &Seen| {
        assert_eq!(seen.header("authorization"), Some("Bearer ostler_1_hush"));
        list(&[vm("web", VmPhase::Running)])
    });
    let home = server.dir.path();
    let host = format!("unix://{}", server.path("s.sock").display());
    let mut set = ostler(home, &format!("context set here --host {host} --project lab"));
    set.env("OSTLER_TOKEN", "ostler_1_hush");
    let set = run(set, b"").await;
    assert_eq!(set.code, Some(0), "{set:?}");
    let file = home.join(".config/ostler/config.toml");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let listed = run(ostler(home, "context list"), b"").await.stdout;
    assert!(listed.contains("* ") && listed.contains(&host) && !listed.contains("hush"), "{listed}");
    assert_eq!(run(ostler(home, "vm list -o name"), b"").await.stdout, "web\n");
    assert!(server.seen()[0].contains("project=lab"));
    assert_eq!(run(ostler(home, "context use moon"), b"").await.code, Some(3));
    assert_eq!(run(ostler(home, "context set empty"), b"").await.code, Some(2));
}

#[tokio::test]
async fn the_version_is_known_without_a_server() {
    let home = tempfile::tempdir().unwrap();
    let run = run(ostler(home.path(), "version --client"), b"").await;
    assert_eq!((run.code, run.stdout), (Some(0), format!("ostler {}\n", env!("CARGO_PKG_VERSION"))));
    let server = Server::new(|_| {
        Answer::json(200, &json!({"version": "9.9.9", "cloud": uuid::Uuid::nil(), "schema": 1}))
    });
    assert!(server.run("version").await.stdout.contains("server 9.9.9"));
}

#[tokio::test]
async fn bash_takes_the_completion_script() {
    let home = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let script = run(ostler(home.path(), &format!("completion {shell}")), b"").await;
        assert_eq!(script.code, Some(0));
        assert!(script.stdout.contains("console"), "{shell}");
        if shell == "bash" {
            let mut bash = Command::new("bash");
            bash.arg("-n").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let checked = run(bash, script.stdout.as_bytes()).await;
            assert_eq!((checked.code, checked.stderr.as_str()), (Some(0), ""));
        }
    }
}
