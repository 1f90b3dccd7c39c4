//! Any process is killed at any moment and started again: VMs run on, what was begun ends, nothing is doubled or left.

#[path = "e2e/mod.rs"]
mod e2e;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use e2e::{Random, TestServer, calm, ends, is_alive, wait_until};
use ostler_api::vm::Vm;
use ostler_api::vm_phase::VmPhase;

fn import_all(server: &TestServer) {
    server.import_guest();
    server.import_kernel();
}

/// A VM with a disk whose web server is behind the port that is returned; the guest is up.
fn up(server: &mut TestServer, vm: &str) -> u16 {
    let port = server.port();
    server.create_direct(vm, "", &["--image", "guest", "--publish", &format!("{port}:80")]);
    assert_eq!(server.status_of(port).0, 1);
    port
}

/// Has the guest power itself off while there is no agent, and waits until it has.
fn powers_off_unseen(server: &TestServer, vm: &Vm) {
    let dir = server.node_dir().join("run").join(vm.metadata.id.to_string());
    let says =
        |text: &str| String::from_utf8_lossy(&std::fs::read(dir.join("console.log")).unwrap()).contains(text);
    // A shell that is just starting drops what was typed before it.
    wait_until("a prompt", || says("guest# "));
    // Kept open meanwhile: QEMU drops what it has not read of a connection that ends.
    let mut console = UnixStream::connect(dir.join("console.sock")).unwrap();
    let mut typed: Option<Instant> = None;
    wait_until("the guest is off", || {
        if typed.is_none_or(|at| at.elapsed() > Duration::from_secs(10)) {
            console.write_all(b"\npoweroff\n").unwrap();
            typed = Some(Instant::now());
        }
        says("reboot: Power down")
    });
}

/// kill -9 of a QEMU.
fn kill_qemu(pid: u32) {
    let process = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    ends(pid);
}

#[test]
fn vms_outlive_the_server_however_it_ends() {
    let mut server = TestServer::new();
    import_all(&server);
    let port = up(&mut server, "a");
    let pid = server.qemu_pid("a");
    let mut last = server.status_of(port);
    for by_force in [true, false] {
        if by_force {
            server.kill_9();
        } else {
            assert!(server.sigterm().success());
        }
        let alone = server.status_of(port);
        assert!(alone.0 == 1 && alone.1 >= last.1, "the guest noticed: {last:?} {alone:?}");
        server.start();
        let vm = server.wait_phase("a", "running");
        assert_eq!(vm.status.observed.and_then(|seen| seen.facts).map(|facts| facts.pid), Some(pid));
        last = server.status_of(port);
        assert!(last.0 == 1 && last.1 >= alone.1, "the guest noticed: {alone:?} {last:?}");
        assert_eq!(server.qemus().len(), 1);
    }
    // An adopted VM obeys like any other.
    server.ok(&["vm", "shutdown", "a", "--wait"]);
    ends(pid);
    server.nothing_left();
}

#[test]
fn what_happened_to_vms_meanwhile_is_seen() {
    let mut server = TestServer::new();
    import_all(&server);
    server.create_direct("killed", "", &[]);
    server.create_direct("off", "", &[]);
    server.marker("off", "ready");
    // While it looks on.
    kill_qemu(server.qemu_pid("killed"));
    server.wait_phase("killed", "error");
    assert!(server.reason("killed").contains("signal 9"), "{}", server.reason("killed"));
    server.ok(&["vm", "start", "killed", "--wait"]);
    assert_eq!(server.phase("killed"), "running");
    // While it is dead.
    let off = server.vm("off");
    let pid = server.qemu_pid("killed");
    server.kill_9();
    powers_off_unseen(&server, &off);
    kill_qemu(pid);
    server.start();
    let killed = server.wait_phase("killed", "error");
    assert!(killed.status.reason.is_some());
    assert_eq!(server.wait_phase("off", "stopped").status.reason, None);
    wait_until("no QEMU is left", || server.qemus().is_empty());
    server.ok(&["vm", "start", "killed", "off", "--wait"]);
    assert_eq!((server.phase("killed"), server.phase("off")), ("running", "running"));
    server.nothing_left();
}

#[test]
fn server_and_agent_die_apart_from_each_other() {
    let mut server = TestServer::with("", &["--no-node"]);
    server.start_agent();
    import_all(&server);
    let port = up(&mut server, "a");
    server.create_direct("killed", "", &[]);
    let (pid, killed) = (server.qemu_pid("a"), server.qemu_pid("killed"));

    // The server alone: the agent goes on, and has news for it when it is back.
    server.kill_9();
    kill_qemu(killed);
    server.start();
    server.wait_phase("killed", "error");
    server.wait_phase("a", "running");
    // The agent alone; then both, the one first and then the other.
    for order in [["agent"].as_slice(), &["server", "agent"], &["agent", "server"]] {
        for who in order {
            match *who {
                "agent" => server.kill_9_agent(),
                _ => server.kill_9(),
            }
        }
        for who in order {
            match *who {
                "agent" => server.start_agent(),
                _ => server.start(),
            }
        }
        server.wait_phase("a", "running");
        // What is asked now is done by the agent of now.
        server.ok(&["vm", "pause", "a", "--wait"]);
        server.ok(&["vm", "resume", "a", "--wait"]);
        assert!(is_alive(pid) && server.qemu_pid("a") == pid, "not adopted after {order:?}");
        assert_eq!(server.status_of(port).0, 1);
    }
    server.nothing_left();
}

#[test]
fn one_server_and_one_agent_for_a_data_directory() {
    let mut server = TestServer::new();
    let (status, said) = server.start_refused();
    assert_eq!(status.code(), Some(1), "{said}");
    let pid = format!("process {}", server.server_pid());
    assert!(said.contains(&pid) && said.contains("in use by another server"), "{pid}: {said}");

    let dir = server.file("data");
    let agent = server.cli(&["node", "run", "--data-dir", &dir]);
    assert_eq!(agent.code, 1, "{}", agent.stderr);
    assert!(agent.stderr.contains("another agent runs on"), "{}", agent.stderr);
    // The first one did not mind.
    server.ok(&["vm", "list"]);
    server.restart();
    server.nothing_left();
}

/// One VM's way through everything that can be cut off.
const ROUND: [&[&str]; 7] = [
    &["vm", "create", "a", "--image", "guest", "--memory", "64M"],
    &["vm", "stop", "a"],
    &["vm", "start", "a"],
    &["vm", "suspend", "a"],
    &["vm", "resume", "a"],
    &["vm", "rebuild", "a", "--image", "guest"],
    &["vm", "delete", "a"],
];

/// Longer than any of them takes when nothing is in its way.
const LONGEST: Duration = Duration::from_millis(900);

/// What is not as it must be once everything that was begun has ended.
fn unrest(server: &TestServer) -> Vec<String> {
    let mut found = Vec::new();
    let (vms, qemus): (Vec<Vm>, _) = (server.json(&["vm", "list"]), server.qemus());
    for vm in &vms {
        let status = &vm.status;
        if !status.phase.is_settled() || status.task.is_some() {
            found.push(format!("it is {} with task {:?}", status.phase, status.task));
        }
        let has = qemus.iter().filter(|(id, _)| *id == vm.metadata.id).count();
        let must = usize::from(matches!(status.phase, VmPhase::Running | VmPhase::Paused));
        if has != must {
            found.push(format!("it is {} with {has} QEMUs", status.phase));
        }
    }
    let strange = qemus.iter().filter(|(id, _)| !vms.iter().any(|vm| vm.metadata.id == *id));
    found.extend(strange.map(|(id, pid)| format!("QEMU {pid} of {id}, which there is not")));
    let unfinished = server.operations().into_iter().filter(|operation| !operation.status.phase.is_final());
    found.extend(
        unfinished.map(|operation| format!("{} is {}", operation.spec.action, operation.status.phase)),
    );
    found
}

/// Waits until each VM has the processes that its phase promises, nothing is under way and nothing went wrong.
fn converges(server: &TestServer) {
    calm("everything that was begun ends", || unrest(server));
    let vms: Vec<Vm> = server.json(&["vm", "list"]);
    for vm in vms {
        assert_ne!(vm.status.phase, VmPhase::Error, "{:?}", vm.status.reason);
    }
}

/// Begins an action, kills at some moment after, starts again, looks; then does the action to its end.
fn rounds(server: &mut TestServer, random: &mut Random, kill: impl Fn(&mut TestServer, &mut Random)) {
    for action in ROUND {
        let begun = server.command(action).output();
        println!("{action:?} begun with {:?}", begun.map(|output| output.status.code()));
        std::thread::sleep(random.moment(LONGEST));
        kill(server, random);
        converges(server);
        // It may have been done, or never have been heard of.
        let again = server.cli(&[action, &["--wait"]].concat());
        assert!(matches!(again.code, 0 | 3 | 4), "{action:?}: {}", again.stderr);
        converges(server);
    }
}

#[test]
fn killed_at_any_moment_the_server_converges() {
    let mut server = TestServer::new();
    server.import_guest();
    let mut random = Random::new();
    for _ in 0..2 {
        rounds(&mut server, &mut random, |server, _| server.restart());
    }
    server.nothing_left();
}

#[test]
fn killed_at_any_moment_the_agent_or_both_converge() {
    let mut server = TestServer::with("", &["--no-node"]);
    server.start_agent();
    server.import_guest();
    let mut random = Random::new();
    rounds(&mut server, &mut random, |server, _| {
        server.kill_9_agent();
        server.start_agent();
    });
    rounds(&mut server, &mut random, |server, random| {
        server.kill_9();
        std::thread::sleep(random.moment(LONGEST));
        server.kill_9_agent();
        server.start();
        server.start_agent();
    });
    server.nothing_left();
}
