//! A server of the built binary with a data directory of its own, and the command line as its client.

use std::fs::{self, File, OpenOptions};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use ostler_api::operation::Operation;
use ostler_api::vm::Vm;
use rustix::process::Signal;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::http::{Response, http};
use super::process;
use super::wait::{wait_for, wait_until};

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_ostler");
/// Lines of the log that a failed test shows.
const LOG_SHOWN: usize = 150;

/// The binary as a person without any settings would call it.
pub(crate) fn cli_command(home: &Path) -> Command {
    let mut command = Command::new(BINARY);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OSTLER_") {
            command.env_remove(name);
        }
    }
    command.env("HOME", home).env_remove("XDG_CONFIG_HOME").stdin(Stdio::null());
    command
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Done {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

pub(crate) struct TestServer {
    dir: tempfile::TempDir,
    /// How `serve` is called besides its data directory.
    pub(crate) args: Vec<String>,
    server: Option<Child>,
    agent: Option<Child>,
    /// Published ports.
    pub(crate) ports: Vec<u16>,
}

impl TestServer {
    /// One that runs and is ready.
    pub(crate) fn new() -> Self {
        Self::with("", &[])
    }

    /// One with a settings file and more arguments.
    pub(crate) fn with(settings: &str, args: &[&str]) -> Self {
        let mut server = Self::prepare(settings, args);
        server.start();
        server
    }

    /// One that does not run yet.
    pub(crate) fn prepare(settings: &str, args: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("ostler-e2e-").tempdir().unwrap();
        Self::prepare_in(dir, settings, args)
    }

    pub(crate) fn prepare_in(dir: tempfile::TempDir, settings: &str, args: &[&str]) -> Self {
        process::adopt_orphans();
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let server = Self { dir, args, server: None, agent: None, ports: Vec::new() };
        fs::create_dir_all(server.home()).unwrap();
        fs::create_dir_all(server.data()).unwrap();
        server.settings(settings);
        server
    }

    /// Replaces the settings file; the next start reads it.
    pub(crate) fn settings(&self, text: &str) {
        fs::write(self.data().join("ostler.toml"), text).unwrap();
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.dir().join("home")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir().join("data")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.data().join("ostler.sock")
    }

    pub(crate) fn node_dir(&self) -> PathBuf {
        self.data().join("node")
    }

    /// A path in the test's own directory, as an argument.
    pub(crate) fn file(&self, name: &str) -> String {
        self.dir().join(name).to_str().unwrap().to_owned()
    }

    /// A free port to publish; at the end nobody may be listening there.
    pub(crate) fn port(&mut self) -> u16 {
        let port = self.free_port();
        self.ports.push(port);
        port
    }

    /// A port of loopback that is free.
    pub(crate) fn free_port(&self) -> u16 {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        // Below the range that the kernel hands out, and each test process in a part of its own.
        let base = 12_000 + (std::process::id() % 1_000) as u16 * 20;
        (0..1_000)
            .map(|_| base + NEXT.fetch_add(1, Ordering::Relaxed) % 20)
            .find(|port| !self.ports.contains(port) && TcpListener::bind(("127.0.0.1", *port)).is_ok())
            .expect("a free port")
    }

    fn daemon(&self, name: &str, words: &[&str], args: &[String]) -> Child {
        let log = OpenOptions::new().create(true).append(true).open(self.log_of(name)).unwrap();
        let mut command = cli_command(&self.home());
        command.args(words).arg("--data-dir").arg(self.data()).args(args);
        command.stdout(log.try_clone().unwrap()).stderr(log);
        command.spawn().unwrap()
    }

    fn log_of(&self, name: &str) -> PathBuf {
        self.dir().join(format!("{name}.log"))
    }

    /// What the server has written since it was first started.
    pub(crate) fn server_log(&self) -> String {
        fs::read_to_string(self.log_of("serve")).unwrap_or_default()
    }

    /// Starts it and waits until it is ready.
    pub(crate) fn start(&mut self) {
        self.start_only();
        let mut child = self.server.take().unwrap();
        wait_until("the server is ready", || {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "the server ended ({}):\n{}", ended.unwrap(), self.server_log());
            self.http("GET", "/readyz").is_some_and(|answer| answer.status == 200)
        });
        self.server = Some(child);
    }

    /// Starts it and waits for nothing.
    pub(crate) fn start_only(&mut self) {
        assert!(self.server.is_none(), "it runs already");
        self.server = Some(self.daemon("serve", &["serve"], &self.args));
    }

    /// Starts one that is expected to refuse; how it ended, and what it said.
    pub(crate) fn start_refused(&self) -> (ExitStatus, String) {
        let mut child = self.daemon("refused", &["serve"], &self.args);
        let status = wait_for("the server refuses to start", || child.try_wait().unwrap());
        let said = fs::read_to_string(self.log_of("refused")).unwrap();
        fs::remove_file(self.log_of("refused")).unwrap();
        (status, said)
    }

    /// The agent in a process of its own (`ostler node run`), beside a server with `--no-node`.
    pub(crate) fn start_agent(&mut self) {
        assert!(self.agent.is_none(), "it runs already");
        self.agent = Some(self.daemon("agent", &["node", "run"], &[]));
    }

    pub(crate) fn server_pid(&self) -> u32 {
        self.server.as_ref().expect("the server runs").id()
    }

    pub(crate) fn kill_9(&mut self) {
        kill(&mut self.server);
    }

    pub(crate) fn kill_9_agent(&mut self) {
        kill(&mut self.agent);
    }

    /// Asks it to end; how it ended.
    pub(crate) fn sigterm(&mut self) -> ExitStatus {
        let mut child = self.server.take().expect("the server runs");
        process::signal(child.id(), Signal::TERM);
        wait_for("the server ends when asked", || child.try_wait().unwrap())
    }

    /// kill -9 and start.
    pub(crate) fn restart(&mut self) {
        self.kill_9();
        self.start();
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = cli_command(&self.home());
        command.env("OSTLER_HOST", format!("unix://{}", self.socket().display())).args(args);
        command
    }

    /// Runs the command line against this server.
    pub(crate) fn cli(&self, args: &[&str]) -> Done {
        self.command(args).output().unwrap().into()
    }

    /// Runs what must succeed; its standard output.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let done = self.cli(args);
        assert_eq!(done.code, 0, "ostler {args:?}\n{}\n{}", done.text(), done.stderr);
        done.text()
    }

    /// Runs what must fail with this exit code; its standard error.
    pub(crate) fn fails(&self, code: i32, args: &[&str]) -> String {
        let done = self.cli(args);
        assert_eq!(done.code, code, "ostler {args:?}\n{}\n{}", done.text(), done.stderr);
        done.stderr
    }

    /// Runs what prints JSON.
    pub(crate) fn json<T: DeserializeOwned>(&self, args: &[&str]) -> T {
        let text = self.ok(&[args, &["-o", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
    }

    pub(crate) fn vm(&self, name: &str) -> Vm {
        self.json(&["vm", "show", name])
    }

    pub(crate) fn phase(&self, name: &str) -> &'static str {
        self.vm(name).status.phase.as_str()
    }

    pub(crate) fn wait_phase(&self, name: &str, phase: &str) -> Vm {
        wait_for(&format!("{name} is {phase}"), || {
            let vm = self.vm(name);
            (vm.status.phase.as_str() == phase && vm.status.task.is_none()).then_some(vm)
        })
    }

    /// What a status says went wrong.
    pub(crate) fn reason(&self, name: &str) -> String {
        self.vm(name)
            .status
            .reason
            .map(|fault| format!("{}: {}", fault.code, fault.message))
            .unwrap_or_default()
    }

    pub(crate) fn operations(&self) -> Vec<Operation> {
        self.json(&["operation", "list"])
    }

    /// A request over the unix socket. None when nobody answers.
    pub(crate) fn http(&self, method: &str, path: &str) -> Option<Response> {
        http(&self.socket(), method, path, &[], b"")
    }

    pub(crate) fn post(&self, path: &str, body: &str) -> Response {
        let headers = [("content-type", "application/json")];
        http(&self.socket(), "POST", path, &headers, body.as_bytes()).expect("an answer")
    }

    /// QEMU's process id, as the VM's status has it.
    pub(crate) fn qemu_pid(&self, name: &str) -> u32 {
        self.vm(name).status.observed.and_then(|seen| seen.facts).expect("it runs").pid
    }

    /// The living QEMUs of this server's node by machine, whoever thinks what of them.
    pub(crate) fn qemus(&self) -> Vec<(Uuid, u32)> {
        let of_machine = |pid: u32| {
            let cwd = fs::read_link(format!("/proc/{pid}/cwd")).ok()?;
            Some((Uuid::parse_str(cwd.file_name()?.to_str()?).ok()?, pid))
        };
        process::working_in(&self.node_dir().join("run")).into_iter().filter_map(of_machine).collect()
    }

    /// Everything that works in this server's directories: QEMUs and helpers.
    pub(crate) fn processes(&self) -> Vec<u32> {
        process::working_in(&self.data())
    }
}

fn kill(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["serve", "agent"] {
                let log = fs::read_to_string(self.log_of(name)).unwrap_or_default();
                let lines: Vec<_> = log.lines().collect();
                let shown = lines.len().saturating_sub(LOG_SHOWN);
                eprintln!(
                    "--- {name}, its last {} lines:\n{}",
                    lines.len() - shown,
                    lines[shown..].join("\n")
                );
            }
        }
        kill(&mut self.server);
        kill(&mut self.agent);
        // One that is just being started may appear late.
        for _ in 0..200 {
            let left = process::working_in(self.dir());
            if left.is_empty() {
                break;
            }
            left.iter().for_each(|pid| process::signal(*pid, Signal::KILL));
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// An empty file of this size.
pub(crate) fn sparse(path: &str, bytes: u64) {
    File::create(path).and_then(|file| file.set_len(bytes)).unwrap();
}
