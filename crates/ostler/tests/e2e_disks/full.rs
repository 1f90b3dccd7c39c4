//! A pool that has no room left.

use crate::e2e::{SmallDisk, TestServer, disk_write};
use crate::{snapshot, volume};

const WRITTEN_KIB: u64 = 12 << 10;

/// What was written before the pool was full, and what was written while it was.
fn holds(server: &TestServer) {
    // The pattern repeats in step with these places.
    server.disk_holds_all("a", "vdb", &[(1, "before"), (8, "wait---"), (14, "wait---"), (19, "wait---")]);
}

#[test]
fn a_guest_waits_while_its_pool_is_full_and_others_go_on() {
    let mut server = TestServer::prepare("", &[]);
    // Only the pool: what the server knows is elsewhere.
    let Some(pool) = SmallDisk::over(&server.node_dir().join("pool"), "96M") else {
        println!("skipped: only root can mount a small file system");
        return;
    };
    server.start();
    server.import_guest();
    for vm in ["a", "b"] {
        server.ok(&["vm", "create", vm, "--image", "guest", "--memory", "96M", "--wait"]);
    }
    server.ok(&["volume", "create", "data", "--size", "64M", "--wait"]);
    server.booted("a", 1);
    server.booted("b", 1);
    server.ok(&["volume", "attach", "data", "a", "--wait"]);
    server.guest_has("a", "vda vdb");
    server.disk_write("a", "vdb", 1, "before");
    let pid = server.qemu_pid("a");

    // No room for what the guest writes.
    pool.fill(2 << 20);
    let write = disk_write("vdb", 8, WRITTEN_KIB, "wait---");
    server.shell("a", &format!("({write}; mark filled code=$?) >/dev/null 2>&1 & true"));
    let waiting = server.wait_phase("a", "error");
    let reason = waiting.status.reason.expect("a reason");
    assert_eq!(reason.code, "disk_full", "{reason:?}");
    assert!(reason.message.contains("ostler vm start"), "{reason:?}");
    assert_eq!(waiting.status.observed.map(|seen| seen.state.as_str()), Some("io_error"));
    assert_eq!(server.shell("b", "echo $((6 * 7))"), "42");
    assert_eq!(server.phase("b"), "running");
    // It waits for room, however often it is told to go on.
    server.cli(&["vm", "start", "a", "--wait"]);
    server.wait_phase("a", "error");
    // Not even the end of the server changes that.
    server.restart();
    server.wait_phase("a", "error");

    pool.make_room();
    server.ok(&["vm", "start", "a", "--wait"]);
    assert_eq!(server.phase("a"), "running");
    assert_eq!(server.marker("a", "filled").get("code"), "0", "the guest got an error");
    holds(&server);
    assert_eq!(server.qemu_pid("a"), pid, "it was started anew");

    // No room for anything: what cannot be done is said and leaves everything as it was.
    pool.fill(0);
    let said = server.fails(1, &["snapshot", "create", "s", "--vm", "a", "--wait"]);
    assert!(said.contains("no_space") || said.contains("space") || said.contains("room"), "{said}");
    assert_eq!(snapshot(&server, "s").status.phase.as_str(), "error");
    let said = server.fails(1, &["volume", "create", "more", "--size", "8M", "--wait"]);
    assert!(said.contains("space") || said.contains("room"), "{said}");
    server.disk_holds("a", "vdb", 1, "before");
    pool.make_room();
    server.ok(&["snapshot", "delete", "s", "--wait"]);
    server.ok(&["snapshot", "create", "s", "--vm", "a", "--wait"]);
    server.disk_write("a", "vdb", 1, "after");
    server.ok(&["vm", "stop", "a", "--wait"]);
    server.ok(&["snapshot", "revert", "s", "--wait"]);
    server.ok(&["vm", "start", "a", "--wait"]);
    server.booted("a", 2);
    holds(&server);
    assert_eq!(volume(&server, "data").status.phase.as_str(), "ready");
    server.ok(&["snapshot", "delete", "s", "--wait"]);
    server.ok(&["vm", "delete", "a", "--wait"]);
    server.ok(&["volume", "delete", "data", "more", "--wait"]);
    server.nothing_left();
}
