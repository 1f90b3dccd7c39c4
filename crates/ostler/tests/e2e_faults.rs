//! What goes wrong on a host: each fault has a clear error, nothing is lost or half done, and it can be mended.

#[path = "e2e/mod.rs"]
mod e2e;

use std::fs::{self, OpenOptions};
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::{TestServer, cli_command, guest_file, wait_for, wait_until};
use ostler_api::node::Node;

/// A disk that boots nothing: its VM runs and never reacts.
fn import_blank(server: &TestServer) {
    let blank = server.file("blank.raw");
    fs::write(&blank, vec![0; 1 << 20]).unwrap();
    server.ok(&["image", "import", "blank", &blank]);
}

const BLANK: [&str; 8] = ["vm", "create", "a", "--image", "blank", "--memory", "32M", "--wait"];

/// The settings for a QEMU at this path.
fn with_qemu(path: &Path) -> String {
    format!("[node]\nqemu = {path:?}\n")
}

#[test]
fn without_qemu_it_serves_and_says_what_is_missing() {
    let mut server = TestServer::with(&with_qemu(Path::new("/nonexistent/qemu")), &[]);
    import_blank(&server);
    let node = wait_for("the node is registered", || {
        let nodes: Vec<Node> = server.json(&["node", "list"]);
        nodes.into_iter().find(|node| node.status.phase.as_str() == "ready")
    });
    let facts = node.status.facts.unwrap();
    assert_eq!(facts.hypervisor, None);
    assert!(facts.warnings.iter().any(|text| text.contains("/nonexistent/qemu")), "{:?}", facts.warnings);
    let said = server.fails(1, &BLANK);
    assert!(said.contains("without QEMU"), "{said}");
    assert_eq!(server.phase("a"), "error");
    // QEMU is installed.
    assert!(server.sigterm().success());
    server.settings("");
    server.start();
    wait_until("the node has QEMU", || {
        let node: Node = server.json(&["node", "show", node.metadata.name.as_str()]);
        node.status.facts.is_some_and(|facts| facts.hypervisor.is_some())
    });
    server.ok(&["vm", "start", "a", "--wait"]);
    assert_eq!(server.phase("a"), "running");
    server.nothing_left();
}

/// A stand-in for QEMU that everybody may execute, in a directory that goes with it.
struct Wrapper(tempfile::TempDir);

impl Wrapper {
    fn new() -> Self {
        let open = fs::Permissions::from_mode(0o755);
        Self(tempfile::Builder::new().prefix("ostler-e2e-qemu-").permissions(open).tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("qemu")
    }

    /// In one step: one that is being executed cannot be written to.
    fn write(&self, script: &str) {
        let new = self.0.path().join("new");
        fs::write(&new, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(new, self.path()).unwrap();
    }
}

#[test]
fn a_qemu_that_dies_at_start_has_its_last_words_told() {
    let wrapper = Wrapper::new();
    let qemu = r#"exec qemu-system-x86_64 "$@""#;
    wrapper.write(&format!(
        r#"case "$*" in *"-machine none"*) {qemu} ;; esac; echo "the flux capacitor is empty" >&2; exit 3"#
    ));
    let server = TestServer::with(&with_qemu(&wrapper.path()), &[]);
    import_blank(&server);
    let said = server.fails(1, &BLANK);
    assert!(said.contains("the flux capacitor is empty"), "{said}");
    assert_eq!(server.phase("a"), "error");
    assert!(server.reason("a").contains("the flux capacitor is empty"), "{}", server.reason("a"));
    assert_eq!(server.qemus(), []);
    wrapper.write(qemu);
    server.ok(&["vm", "start", "a", "--wait"]);
    assert_eq!(server.phase("a"), "running");
    server.nothing_left();
}

#[test]
fn a_published_port_in_use_is_named() {
    let mut server = TestServer::new();
    import_blank(&server);
    let port = server.port();
    let publish = format!("{port}:80");
    let taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let said = server.fails(1, &[&BLANK[..], &["--publish", &publish]].concat());
    assert!(said.contains(&port.to_string()), "{said}");
    assert_eq!(server.phase("a"), "error");
    drop(taken);
    server.ok(&["vm", "start", "a", "--wait"]);
    // Another VM does not get it either.
    let other = ["vm", "create", "b", "--image", "blank", "--memory", "32M", "--wait", "--publish", &publish];
    let said = server.cli(&other);
    assert!(said.code != 0 && said.stderr.contains(&port.to_string()), "{} {}", said.code, said.stderr);
    server.nothing_left();
}

#[test]
fn a_damaged_or_newer_database_is_refused_and_can_be_restored() {
    let mut server = TestServer::new();
    import_blank(&server);
    server.ok(&["vm", "create", "a", "--image", "blank", "--no-start", "--wait"]);
    assert!(server.sigterm().success());
    let path = server.data().join("ostler.db");
    let good = fs::read(&path).unwrap();
    let version = 9_999u32.to_be_bytes();
    for (what, at, bytes, words) in [
        ("head", 0, [0xa5; 64].as_slice(), "not a database of Ostler"),
        ("middle", good.len() as u64 / 2, &[0xa5; 256], "is damaged"),
        ("newer", 60, &version, "9999"),
    ] {
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(bytes, at).unwrap();
        let before = fs::read(&path).unwrap();
        let (status, said) = server.start_refused();
        assert_eq!(status.code(), Some(1), "{what}: {said}");
        assert!(said.contains(words), "{what}: {said}");
        let ways_out = ["copy a backup to", "restore the copy", "choose another data directory"];
        assert!(ways_out.iter().any(|way| said.contains(way)), "{what}: {said}");
        assert_eq!(fs::read(&path).unwrap(), before, "{what}: a refused database was touched");
        fs::write(&path, &good).unwrap();
    }
    server.start();
    assert_eq!(server.phase("a"), "stopped");
    server.nothing_left();
}

/// A small file system of its own; needs root.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(size: &str) -> Option<Self> {
        let dir = tempfile::Builder::new().prefix("ostler-e2e-disk-").tempdir().unwrap();
        let options = format!("size={size}");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).output();
        mount.is_ok_and(|output| output.status.success()).then(|| Self(dir))
    }

    /// Takes all of the room but `left` bytes.
    fn fill(&self, left: u64) {
        let stat = rustix::fs::statvfs(self.0.path()).unwrap();
        let free = stat.f_bavail * stat.f_frsize;
        fs::write(self.0.path().join("filler"), vec![1; free.saturating_sub(left) as usize]).unwrap();
    }

    fn make_room(&self) {
        fs::remove_file(self.0.path().join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: what of a failed test still has a file open there ends on its own.
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing_half_done() {
    let Some(disk) = SmallDisk::new("128M") else {
        println!("skipped: only root can mount a small file system");
        return;
    };
    let dir = tempfile::tempdir_in(disk.0.path()).unwrap();
    let mut server = TestServer::prepare_in(dir, "", &[]);
    server.start();
    for (name, file) in [("kernel", "vmlinuz"), ("initrd", "initrd")] {
        server.ok(&["image", "import", name, guest_file(file).to_str().unwrap()]);
    }
    import_blank(&server);
    server.create_direct("up", "", &[]);
    server.marker("up", "ready");

    // Room for small things only.
    disk.fill(4 << 20);
    let said =
        server.fails(1, &["image", "import", "large", guest_file("ostler-guest.qcow2").to_str().unwrap()]);
    assert!(said.contains("space") || said.contains("room"), "{said}");
    server.ok(&["image", "delete", "large", "--wait"]);
    let said = server.fails(1, &["vm", "suspend", "up", "--wait"]);
    assert!(said.contains("no_space"), "{said}");
    assert_eq!(server.phase("up"), "running");

    // Room for nothing.
    fs::remove_file(disk.0.path().join("filler")).unwrap();
    disk.fill(0);
    let said = wait_for("the database is full", || {
        let done = server.cli(&["token", "create", "x"]);
        if done.code == 0 {
            server.ok(&["token", "revoke", "x"]);
        }
        (done.code != 0).then_some(done)
    });
    assert!(said.code == 1 && said.stderr.contains("space"), "{} {}", said.code, said.stderr);
    assert_eq!(server.phase("up"), "running");

    disk.make_room();
    server.ok(&["token", "create", "x"]);
    server.ok(&["vm", "suspend", "up", "--wait"]);
    server.ok(&["vm", "resume", "up", "--wait"]);
    server.ok(&BLANK);
    server.nothing_left();
}

#[test]
fn settings_are_checked_before_anything_is_done() {
    let server = TestServer::prepare("", &[]);
    let data = server.file("data");
    let check = |text: &str| {
        server.settings(text);
        server.cli(&["config", "check", "--data-dir", &data])
    };
    let good = check("[limits]\nnode_lease = \"30s\"\n");
    assert_eq!(good.code, 0, "{}", good.stderr);
    assert!(good.text().contains("node lease       30 s"), "{}", good.text());
    for (text, words) in [
        ("colour = \"blue\"", "colour"),
        ("[node]\nqemu = 5", "qemu"),
        ("plain_http = \"0.0.0.0:80\"", "loopback"),
        ("[images]\nmax_size = \"much\"", "much"),
        ("not toml at all", "ostler.toml"),
    ] {
        let bad = check(text);
        assert_eq!(bad.code, 2, "{text}: {}", bad.stderr);
        assert!(bad.stderr.contains(words), "{text}: {}", bad.stderr);
        let (status, said) = server.start_refused();
        assert!(status.code() == Some(2) && said.contains(words), "{text}: {said}");
    }
    assert!(!server.data().join("ostler.db").exists(), "a refused server has made a database");
}

#[test]
fn each_exit_code_comes_from_a_real_situation() {
    let server = TestServer::with("", &["--plain-http", "127.0.0.1:0"]);
    import_blank(&server);
    server.ok(&BLANK);
    server.fails(1, &["image", "import", "x", "/nonexistent"]);
    server.fails(2, &["vm", "create", "b", "--image", "blank", "--cpus", "0"]);
    server.fails(2, &["vm", "fly", "a"]);
    server.fails(3, &["vm", "show", "nobody"]);
    server.fails(3, &["vm", "create", "b", "--image", "nothing"]);
    server.fails(4, &BLANK);
    // Nothing in it hears the power button.
    let said = server.fails(5, &["vm", "shutdown", "a", "--grace", "300", "--wait", "--timeout", "1"]);
    assert!(said.contains("operation show"), "{said}");
    server.ok(&["vm", "stop", "a", "--wait"]);
    // Without TLS as well, nobody comes in without a token.
    let addr = wait_for("the address is in the log", || {
        let log = server.server_log();
        let line = log.lines().find(|line| line.contains("without TLS"))?;
        line.split("addr=").nth(1).map(|addr| addr.split_whitespace().next().unwrap_or_default().to_owned())
    });
    let mut stranger = cli_command(&server.home());
    let stranger = stranger.args(["vm", "list", "--host", &format!("http://{addr}")]).output().unwrap();
    assert_eq!(stranger.status.code(), Some(6), "{}", String::from_utf8_lossy(&stranger.stderr));
    let mut alone = cli_command(&server.home());
    let alone = alone.args(["vm", "list", "--host", "unix:///nonexistent.sock"]).output().unwrap();
    assert_eq!(alone.status.code(), Some(1));
    server.nothing_left();
}

#[test]
fn bad_input_gets_a_problem_document_that_names_the_field() {
    let server = TestServer::new();
    import_blank(&server);
    let long = format!(r#"{{"name": "{}", "image": "blank"}}"#, "a".repeat(64));
    for (body, status, code, word) in [
        (r#"{"name": "a", "image": "blank", "colour": "blue"}"#, 400, "invalid", "colour"),
        (r#"{"name": "a", "image": "blank", "cpus": "two"}"#, 400, "invalid", "cpus"),
        (r#"{"name": "a", "image": "blank", "cpus": 0}"#, 400, "invalid", "cpus"),
        (r#"{"name": "a", "image": "blank", "cpus": 100000}"#, 400, "invalid", "cpus"),
        (r#"{"name": "a", "image": "blank", "memory": 0}"#, 400, "invalid", "memory"),
        (r#"{"name": "a", "image": "blank", "memory": -1}"#, 400, "invalid", "memory"),
        (r#"{"name": "a", "image": "blank", "disk": 0}"#, 400, "invalid", "disk"),
        (r#"{"name": "Bad_Name", "image": "blank"}"#, 400, "invalid", "name"),
        (r#"{"name": "-a", "image": "blank"}"#, 400, "invalid", "name"),
        (&long, 400, "invalid", "name"),
        (r#"{"name": "a"}"#, 400, "invalid", "image"),
        (r#"{"name": "a", "image": "nothing"}"#, 404, "not_found", "nothing"),
        (r#"{"name": "a", "image": "blank""#, 400, "invalid", ""),
        ("", 400, "invalid", ""),
    ] {
        let answer = server.post("/v1/vms", body);
        assert_eq!(answer.status, status, "{body}: {}", answer.text());
        assert!(answer.head.contains("content-type: application/problem+json"), "{body}: {}", answer.head);
        let problem = answer.json();
        assert_eq!((problem["status"].as_u64(), problem["code"].as_str()), (Some(status.into()), Some(code)));
        assert!(problem["detail"].is_string() && problem["request_id"].is_string(), "{problem}");
        assert!(answer.text().contains(word), "{body}: {problem}");
    }
    assert_eq!(server.post("/v1/vms", r#"{"name": "a", "image": "blank", "start": false}"#).status, 201);
    let taken = server.post("/v1/vms", r#"{"name": "a", "image": "blank"}"#);
    assert_eq!((taken.status, taken.json()["code"].as_str()), (409, Some("already_exists")));
    let missing = server.http("GET", "/v1/nowhere").unwrap();
    assert_eq!(missing.status, 404);
    assert!(missing.head.contains("application/problem+json"), "{}", missing.head);
    assert_eq!(server.ok(&["vm", "list", "-o", "name"]), "a\n");
    server.nothing_left();
}
