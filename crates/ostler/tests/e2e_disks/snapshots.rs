//! Snapshots of a guest that writes: several disks at one instant, a tree, the way back to each.

use crate::e2e::TestServer;
use crate::{parent, server, snapshot, up_with, volume};

/// Counts up for ever, first on `vdb` and then on `vda`, each number down to the host's file before the next.
const COUNT: &str = "number=0; while [ ! -e /run/enough ]; do number=$((number + 1)); \
    for place in /dev/vdb /var/lib/ostler/number; do \
    printf %-512s $number | dd of=$place bs=512 count=1 conv=fsync,notrunc 2>/dev/null; done; done";

/// The two numbers, of `vdb` and `vda`.
fn numbers(server: &TestServer, vm: &str) -> (u64, u64) {
    let read = "sync; echo 3 >/proc/sys/vm/drop_caches; \
        for place in /dev/vdb /var/lib/ostler/number; do head -c 512 $place; done";
    let said = server.shell(vm, read);
    let numbers: Vec<u64> = said.split_whitespace().map(|word| word.parse().unwrap()).collect();
    (numbers[0], numbers[1])
}

/// Writes a word to both disks.
fn write(server: &TestServer, word: &str) {
    server.shell("a", &format!("ostler-write {word} 64"));
    server.disk_write("a", "vdb", 7, word);
}

/// The word is on both.
fn holds(server: &TestServer, word: &str) {
    server.root_holds("a", word);
    server.disk_holds("a", "vdb", 7, word);
}

fn go_back(server: &TestServer, snapshot: &str) {
    server.ok(&["vm", "stop", "a", "--wait"]);
    server.ok(&["snapshot", "revert", snapshot, "--wait"]);
    server.ok(&["vm", "start", "a", "--wait"]);
}

#[test]
fn all_disks_of_a_running_vm_at_one_instant() {
    let server = server();
    up_with(&server, "a", "data");
    write(&server, "one");
    server.shell("a", &format!("printf %-512s 0 >/var/lib/ostler/number; ({COUNT}) >/dev/null 2>&1 & true"));
    let before = numbers(&server, "a");
    server.ok(&["snapshot", "create", "s", "--vm", "a", "--wait"]);
    let after = numbers(&server, "a");
    assert!(after.0 > before.0, "the guest does not count on: {before:?} {after:?}");
    write(&server, "later");

    go_back(&server, "s");
    // One boot before the snapshot and one after it.
    server.booted("a", 2);
    holds(&server, "one");
    let (data, root) = numbers(&server, "a");
    assert!(data == root || data == root + 1, "not one instant: {data} and {root}");
    assert!(before.1 <= root && data <= after.0, "{before:?} {after:?}: {data} and {root}");
    server.ok(&["snapshot", "delete", "s", "--wait"]);
    holds(&server, "one");
    server.ok(&["vm", "delete", "a", "--wait"]);
    server.ok(&["volume", "delete", "data", "--wait"]);
    server.nothing_left();
}

#[test]
fn a_tree_of_snapshots_whose_middle_goes() {
    let server = server();
    up_with(&server, "a", "data");
    for word in ["one", "two", "three"] {
        write(&server, word);
        server.ok(&["snapshot", "create", word, "--vm", "a", "--wait"]);
    }
    // The disk is as large again as it was then.
    server.ok(&["volume", "resize", "data", "96M", "--wait"]);
    server.disk_write("a", "vdb", 90, "beyond");
    write(&server, "four");
    let parents = ["one", "two", "three"].map(|name| parent(&server, name));
    assert_eq!(parents, [None, Some("one".to_owned()), Some("two".to_owned())]);
    assert_eq!(snapshot(&server, "two").spec.disks.len(), 2);

    server.ok(&["snapshot", "delete", "two", "--wait"]);
    assert_eq!(parent(&server, "three").as_deref(), Some("one"));
    holds(&server, "four");
    server.disk_holds("a", "vdb", 90, "beyond");

    go_back(&server, "one");
    server.booted("a", 2);
    holds(&server, "one");
    assert_eq!(server.shell("a", "cat /sys/block/vdb/size"), (64 << 11).to_string());
    write(&server, "branch");
    server.ok(&["snapshot", "create", "branch", "--vm", "a", "--wait"]);
    assert_eq!(parent(&server, "branch").as_deref(), Some("one"));

    go_back(&server, "three");
    server.booted("a", 2);
    holds(&server, "three");
    let stands_on = volume(&server, "data").status.snapshot.map(|id| id.0);
    assert_eq!(stands_on, Some(snapshot(&server, "three").metadata.id));
    // The root of both branches goes while the VM stands on one of them.
    server.ok(&["snapshot", "delete", "one", "--wait"]);
    holds(&server, "three");
    go_back(&server, "branch");
    server.booted("a", 3);
    holds(&server, "branch");
    server.ok(&["snapshot", "delete", "three", "branch", "--wait"]);
    holds(&server, "branch");
    server.ok(&["vm", "delete", "a", "--wait"]);
    server.ok(&["volume", "delete", "data", "--wait"]);
    server.nothing_left();
}
