//! The life of a VM from create to delete, as a person with the command line sees it and as the guest sees it.

#[path = "e2e/mod.rs"]
mod e2e;

use e2e::{TestServer, answer_of, ends, guest_file, is_alive, wait_until};
use ostler_api::vm::Vm;
use ostler_api::volume::Volume;

/// A server with the guest's disk and kernel.
fn server() -> TestServer {
    let server = TestServer::new();
    server.import_guest();
    server.import_kernel();
    server
}

/// A VM on a disk of its own, whose web server is behind the port that is returned.
fn create(server: &mut TestServer, vm: &str) -> u16 {
    let port = server.port();
    server.create_direct(vm, "", &["--image", "guest", "--publish", &format!("{port}:80")]);
    port
}

fn root_volume(server: &TestServer, vm: &Vm) -> Volume {
    server.json(&["volume", "show", &vm.spec.disks[0].volume.to_string()])
}

#[test]
fn a_vm_runs_answers_pauses_and_is_renamed() {
    let mut server = server();
    let port = create(&mut server, "a");
    assert_eq!(server.phase("a"), "running");
    let shown: serde_json::Value = server.json(&["vm", "show", "a"]);
    assert_eq!(shown["status"]["phase"], "running");
    assert!(shown["status"]["node"].is_string(), "{shown}");
    assert_eq!(server.booted("a", 1).get("root"), "/dev/vda2");
    let before = server.status_of(port);

    server.ok(&["vm", "pause", "a", "--wait"]);
    assert_eq!(server.phase("a"), "paused");
    assert_eq!(answer_of(port), None, "a paused guest answers");
    server.ok(&["vm", "resume", "a", "--wait"]);
    let after = server.status_of(port);
    assert!(after.0 == 1 && after.1 > before.1, "{before:?} {after:?}");

    server.ok(&["vm", "rename", "a", "b"]);
    server.fails(3, &["vm", "show", "a"]);
    assert_eq!(server.phase("b"), "running");
    assert!(server.status_of(port).1 >= after.1, "a rename touched the guest");
    server.nothing_left();
}

#[test]
fn a_suspended_vm_keeps_its_memory_and_no_process() {
    let mut server = server();
    let port = create(&mut server, "a");
    let before = server.status_of(port);
    let pid = server.qemu_pid("a");
    server.ok(&["vm", "suspend", "a", "--wait"]);
    assert_eq!(server.phase("a"), "suspended");
    ends(pid);
    assert_eq!(server.qemus(), []);

    // Its memory is on disk: neither the server nor its agent need to have seen it.
    server.restart();
    server.wait_phase("a", "suspended");
    server.ok(&["vm", "resume", "a", "--wait"]);
    let after = server.status_of(port);
    assert!(after.0 == 1 && after.1 >= before.1, "it booted anew: {before:?} {after:?}");
    server.nothing_left();
}

#[test]
fn writes_survive_shutdown_reboot_and_reset() {
    let mut server = server();
    create(&mut server, "a");
    server.booted("a", 1);
    // The power button: the guest says goodbye and nobody has to force it.
    server.ok(&["vm", "shutdown", "a", "--grace", "60", "--wait"]);
    assert_eq!(server.phase("a"), "stopped");
    server.marker("a", "powering-off");
    assert_eq!(server.qemus(), []);

    server.ok(&["vm", "start", "a", "--wait"]);
    server.booted("a", 2);
    let pid = server.qemu_pid("a");
    server.ok(&["vm", "reset", "a", "--wait"]);
    server.booted("a", 3);
    assert_eq!(server.qemu_pid("a"), pid, "a reset is not a new process");
    server.ok(&["vm", "reboot", "a", "--wait"]);
    server.booted("a", 4);
    server.ok(&["vm", "stop", "a", "--wait"]);
    assert_eq!(server.phase("a"), "stopped");
    server.nothing_left();
}

#[test]
fn a_rebuilt_vm_has_a_new_disk_and_the_same_identity() {
    let mut server = server();
    server.ok(&["image", "import", "other", guest_file("ostler-guest.qcow2").to_str().unwrap()]);
    create(&mut server, "a");
    server.booted("a", 1);
    server.ok(&["vm", "reset", "a", "--wait"]);
    server.booted("a", 2);
    let before = server.vm("a");
    let old = root_volume(&server, &before);
    server.ok(&["vm", "rebuild", "a", "--image", "other", "--disk", "384M", "--wait"]);
    let after = server.vm("a");
    assert_eq!(after.metadata.id, before.metadata.id);
    assert_eq!(after.spec.nics, before.spec.nics);
    let new = root_volume(&server, &after);
    assert_ne!(new.metadata.id, old.metadata.id);
    server.booted("a", 1);
    assert_grown(&server, "a", 384);
    let file = server.node_dir().join(format!("pool/volumes/{}.qcow2", old.metadata.id));
    wait_until("the old disk's file goes", || !file.exists());
    server.nothing_left();
}

/// The guest has grown its root to a disk of this size.
fn assert_grown(server: &TestServer, vm: &str, mib: u64) {
    let bytes: u64 = server.marker(vm, "disk").get("root-bytes").parse().unwrap();
    // The boot partition is on the disk too.
    assert!(bytes > (mib - 40) << 20 && bytes < mib << 20, "{bytes} bytes on a disk of {mib} MiB");
}

#[test]
fn a_disk_has_the_size_that_was_asked_for() {
    let server = server();
    server.create_direct("a", "", &["--image", "guest", "--disk", "512M"]);
    assert_grown(&server, "a", 512);
    let small = server.fails(2, &["vm", "create", "b", "--image", "guest", "--disk", "16M"]);
    assert!(small.contains("disk"), "{small}");
    server.nothing_left();
}

#[test]
fn a_guest_that_ignores_the_power_button_is_forced_only_when_told() {
    let server = server();
    server.create_direct("a", "ostler.acpi=off", &[]);
    server.marker("a", "ready");
    let pid = server.qemu_pid("a");
    let said = server.fails(1, &["vm", "shutdown", "a", "--grace", "1", "--no-force", "--wait"]);
    assert!(said.contains("did not power off within 1 s"), "{said}");
    assert_eq!(server.phase("a"), "running");
    assert!(is_alive(pid));
    let failed = |server: &TestServer| {
        let mut all = server.operations().into_iter();
        all.any(|o| o.spec.action == "vm.shutdown" && o.status.phase.as_str() == "failed")
    };
    assert!(failed(&server));
    server.ok(&["vm", "shutdown", "a", "--grace", "1", "--wait"]);
    assert_eq!(server.phase("a"), "stopped");
    ends(pid);
    server.nothing_left();
}

#[test]
fn a_guest_that_ends_by_itself_is_seen_as_such() {
    let server = server();
    server.create_direct("off", "ostler.poweroff=0", &[]);
    server.create_direct("broken", "ostler.panic=1", &[]);
    let off = server.wait_phase("off", "stopped");
    assert_eq!(off.status.reason, None);
    let broken = server.wait_phase("broken", "error");
    let reason = broken.status.reason.expect("a reason");
    assert!(reason.message.contains("panic"), "{reason:?}");
    // From an error everything works that could work.
    server.ok(&["vm", "stop", "broken", "--wait"]);
    assert_eq!(server.phase("broken"), "stopped");
    server.nothing_left();
}
