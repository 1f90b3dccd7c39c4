//! The lock-down, tried with ordinary programs in place of `qemu-img`.

use std::{ffi::OsString, fs, path::Path, path::PathBuf, time::Duration, time::Instant};

use tokio_util::sync::CancellationToken;

use super::{
    QemuImg, ToolError, ToolLimits,
    run::{Job, Output, run},
};

fn tool(program: &str) -> QemuImg {
    let limits = ToolLimits { deadline: Duration::from_secs(30), ..ToolLimits::default() };
    QemuImg { program: PathBuf::from(program), limits }
}

fn job(args: &[&str]) -> Job {
    let args = args.iter().map(OsString::from).collect();
    Job { action: "test", args, read: Vec::new(), write: Vec::new(), file_size: 1 << 20 }
}

fn done(tool: &QemuImg, job: &Job) -> Output {
    run(tool, job, &CancellationToken::new(), &mut |_| {}).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn has_landlock() -> bool {
    fs::read_to_string("/sys/kernel/security/lsm").is_ok_and(|list| list.contains("landlock"))
        // Where that file is not mounted, a denied read tells.
        || !done(&tool("/bin/cat"), &job(&["/etc/passwd"])).status.success()
}

/// True when the process is gone, or waits only to be collected by whoever inherited it.
fn is_gone(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_or(true, |stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])))
}

fn wait_until_gone(pid: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_gone(pid) {
        assert!(Instant::now() < deadline, "process {pid} is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a shell that starts a child, both of which say their ids and then do nothing.
fn idle(tool: &QemuImg, cancel: &CancellationToken, on_start: impl FnOnce()) -> (ToolError, Vec<String>) {
    let mut said = Vec::new();
    let mut on_start = Some(on_start);
    let job = job(&["-c", "sleep 1000 & echo $$ $!; wait"]);
    let error = run(tool, &job, cancel, &mut |bytes| {
        said.extend_from_slice(bytes);
        if said.ends_with(b"\n")
            && let Some(start) = on_start.take()
        {
            start();
        }
    })
    .unwrap_err();
    let pids = String::from_utf8(said).unwrap().split_whitespace().map(str::to_owned).collect();
    (error, pids)
}

#[test]
fn at_the_deadline_the_whole_group_is_killed() {
    let mut tool = tool("/bin/sh");
    tool.limits.deadline = Duration::from_secs(1);
    let (error, pids) = idle(&tool, &CancellationToken::new(), || {});
    assert_eq!(error.code(), "timed_out");
    assert_eq!(pids.len(), 2);
    pids.iter().for_each(|pid| wait_until_gone(pid));
}

#[test]
fn when_cancelled_the_whole_group_is_killed() {
    let cancel = CancellationToken::new();
    let (error, pids) = idle(&tool("/bin/sh"), &cancel, || cancel.cancel());
    assert_eq!(error.code(), "cancelled");
    pids.iter().for_each(|pid| wait_until_gone(pid));
}

#[test]
fn a_child_dies_with_the_thread_that_started_it() {
    let confinement = super::sandbox::Confinement {
        read: Vec::new(),
        write: Vec::new(),
        file_size: 0,
        address_space: 1 << 30,
        cpu_seconds: 10,
    };
    let spawn =
        move || super::sandbox::spawn(Path::new("/bin/sleep"), &["1000".into()], &confinement).unwrap();
    let mut child = std::thread::spawn(spawn).join().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
}

#[test]
fn a_file_cannot_grow_beyond_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    fs::write(&path, b"").unwrap();
    let target = format!("of={}", path.display());
    let mut job = job(&["if=/dev/zero", &target, "bs=64k", "count=64"]);
    job.write = vec![path.clone()];
    let output = done(&tool("/bin/dd"), &job);
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&output.status), Some(libc::SIGXFSZ));
    assert_eq!(fs::metadata(path).unwrap().len(), 1 << 20);
}

#[test]
fn memory_is_limited() {
    let mut tool = tool("/bin/dd");
    tool.limits.address_space = 256 << 20;
    let output = done(&tool, &job(&["if=/dev/zero", "of=/dev/null", "bs=1G", "count=1"]));
    assert!(!output.status.success());
    assert!(stderr(&output).contains("memory"), "{}", stderr(&output));
}

#[test]
fn processor_time_is_limited() {
    let mut tool = tool("/bin/sh");
    tool.limits.cpu = Duration::from_secs(1);
    let output = done(&tool, &job(&["-c", "while :; do :; done"]));
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&output.status), Some(libc::SIGKILL));
}

#[test]
fn output_is_cut() {
    let mut tool = tool("/usr/bin/head");
    tool.limits.output = 1000;
    let output = done(&tool, &job(&["-c", "1000000", "/dev/zero"]));
    assert!(output.status.success());
    assert_eq!(output.stdout.len(), 1000);
}

#[test]
fn only_the_named_files_can_be_opened() {
    if !has_landlock() {
        eprintln!("this kernel has no Landlock");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (named, other) = (dir.path().join("named"), dir.path().join("other"));
    fs::write(&named, b"fine").unwrap();
    fs::write(&other, b"secret").unwrap();
    let mut job =
        job(&[named.to_str().unwrap(), other.to_str().unwrap(), "/etc/passwd", "/proc/self/status"]);
    job.read = vec![named.clone()];
    let output = done(&tool("/bin/cat"), &job);
    assert_eq!(output.stdout, b"fine");
    assert_eq!(stderr(&output).matches("Permission denied").count(), 3, "{}", stderr(&output));

    // Reading is not writing, and nothing new can be made.
    for path in [&named, &dir.path().join("new")] {
        let target = format!("of={}", path.display());
        let mut job = self::job(&["if=/dev/zero", &target, "bs=1", "count=1"]);
        job.read = vec![named.clone()];
        assert!(!done(&tool("/bin/dd"), &job).status.success());
    }
    assert_eq!(fs::read(named).unwrap(), b"fine");
}

#[test]
fn there_is_no_network() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let script = format!("exec 3<>/dev/tcp/127.0.0.1/{}", listener.local_addr().unwrap().port());
    let output = done(&tool("/bin/bash"), &job(&["-c", &script]));
    assert!(!output.status.success());
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err(), "nobody came through");
}

#[test]
fn privileges_are_dropped_and_the_environment_is_empty() {
    let mut job = job(&["/proc/self/status", "/proc/self/environ"]);
    job.read = vec![PathBuf::from("/proc")];
    let output = done(&tool("/bin/cat"), &job);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(text.contains(line), "{line} in {text}");
    }
    assert!(text.ends_with("LC_ALL=C\0"), "{text}");
}

#[test]
fn progress_is_read_from_what_the_tool_prints() {
    let mut line = b"    (0.00/100%)\r    (12.34/100%)\r    (56.7".to_vec();
    assert_eq!(super::last_progress(&mut line), Some(1234));
    line.extend(b"8/100%)\r");
    assert_eq!(super::last_progress(&mut line), Some(5678));
    assert_eq!(super::last_progress(&mut line), None);
    assert_eq!(super::last_progress(&mut b"100%".to_vec()), None);
}

#[test]
fn file_names_are_options_and_never_syntax() {
    let disk = super::Disk { path: Path::new("/a,b/json:{}"), format: crate::ImageFormat::Vmdk };
    assert_eq!(super::image_opts(disk), "driver=vmdk,file.driver=file,file.filename=/a,,b/json:{}");
}
