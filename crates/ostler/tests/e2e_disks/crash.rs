//! Server and QEMU are killed in the middle of what is done with disks: everything that was begun ends, nothing is
//! doubled, lost or left, and what the guest flushed is there.

use std::collections::HashSet;
use std::fs;
use std::time::Duration;

use ostler_api::snapshot::{Snapshot, SnapshotPhase};
use ostler_api::vm::Vm;
use ostler_api::volume::{Volume, VolumePhase};
use uuid::Uuid;

use crate::e2e::{Random, TestServer, calm, kill_qemu, wait_until};
use crate::{serial, server, up_with};

/// Longer than any of them takes when nothing is in its way.
const LONGEST: Duration = Duration::from_millis(500);

const ROUND: [&[&str]; 9] = [
    &["snapshot", "create", "one", "--vm", "a"],
    &["volume", "create", "more", "--size", "8M"],
    &["volume", "attach", "more", "a"],
    &["snapshot", "create", "two", "--vm", "a"],
    &["volume", "resize", "more", "16M"],
    &["snapshot", "delete", "one"],
    &["volume", "detach", "more"],
    &["snapshot", "delete", "two"],
    &["volume", "delete", "more"],
];

/// How often QEMU is killed.
const KILLS: usize = 2;

/// What is not as it must be once everything that was begun has ended.
fn unrest(server: &TestServer) -> Vec<String> {
    let mut found = Vec::new();
    for vm in server.json::<Vec<Vm>>(&["vm", "list"]) {
        if !vm.status.phase.is_settled() || vm.status.task.is_some() {
            found.push(format!("{} is {} with {:?}", vm.metadata.name, vm.status.phase, vm.status.task));
        }
    }
    for volume in server.json::<Vec<Volume>>(&["volume", "list"]) {
        let grown = volume.status.size.is_none_or(|size| size == volume.spec.size);
        if volume.status.phase != VolumePhase::Ready || !grown {
            found.push(format!("{} is {:?} of {}", volume.metadata.name, volume.status, volume.spec.size));
        }
    }
    let snapshots: Vec<Snapshot> = server.json(&["snapshot", "list"]);
    for snapshot in &snapshots {
        match snapshot.status.phase {
            SnapshotPhase::Ready | SnapshotPhase::Error => {}
            SnapshotPhase::Creating | SnapshotPhase::Reverting | SnapshotPhase::Deleting => {
                found.push(format!("{} is {:?}", snapshot.metadata.name, snapshot.status));
            }
        }
    }
    let unfinished = server.operations().into_iter().filter(|operation| !operation.status.phase.is_final());
    found.extend(
        unfinished.map(|operation| format!("{} is {}", operation.spec.action, operation.status.phase)),
    );
    found.extend(untrue(server, &snapshots));
    found
}

/// Where the pool's files say otherwise than the lists.
fn untrue(server: &TestServer, snapshots: &[Snapshot]) -> Vec<String> {
    let pool = server.node_dir().join("pool");
    let mut found = Vec::new();
    let parts = |snapshot: &Snapshot| snapshot.spec.disks.iter().map(|disk| disk.part).collect::<Vec<_>>();
    let listed: HashSet<Uuid> = snapshots.iter().flat_map(parts).collect();
    // One in error may have something there, or not.
    let ready = snapshots.iter().filter(|snapshot| snapshot.status.phase == SnapshotPhase::Ready);
    let ready: HashSet<Uuid> = ready.flat_map(parts).collect();
    let mut there = HashSet::new();
    for entry in fs::read_dir(pool.join("snapshots")).into_iter().flatten().flatten() {
        let path = entry.path();
        let text = fs::read_to_string(&path).unwrap_or_default();
        let id = path.file_stem().and_then(|stem| Uuid::parse_str(stem.to_str()?).ok());
        match id {
            Some(id) if !text.contains("\"next\"") => drop(there.insert(id)),
            Some(_) | None => found.push(format!("{} is not settled: {text}", path.display())),
        }
    }
    if !ready.is_subset(&there) || !there.is_subset(&listed) {
        found.push(format!("snapshots of disks: {listed:?} are listed, {there:?} are there"));
    }
    for volume in server.json::<Vec<Volume>>(&["volume", "list"]) {
        let id = volume.metadata.id;
        if !["qcow2", "json"].iter().any(|end| pool.join(format!("volumes/{id}.{end}")).is_file()) {
            found.push(format!("volume {} has no file", volume.metadata.name));
        }
    }
    found
}

/// Waits until all that was begun has ended, and nothing has gone wrong.
fn converges(server: &TestServer) {
    calm("everything that was begun ends", || unrest(server));
    for snapshot in server.json::<Vec<Snapshot>>(&["snapshot", "list"]) {
        assert_eq!(snapshot.status.phase, SnapshotPhase::Ready, "{:?}", snapshot.status.reason);
    }
}

/// The guest has the disks that its VM lists, no others.
fn guest_agrees(server: &TestServer) {
    let vm = server.vm("a");
    let mut listed: Vec<_> = vm.spec.disks.iter().map(|disk| serial(disk.volume.0)).collect();
    listed.sort();
    wait_until("the guest has the disks of the list", || {
        let mut seen: Vec<_> = server.serials("a").into_iter().map(|(_, serial)| serial).collect();
        seen.sort();
        seen == listed
    });
}

/// The first so many megabytes of `vdb` hold what was written there.
fn holds_until(server: &TestServer, end: usize) {
    let words: Vec<_> = (0..end).map(|number| (number as u64, format!("word-{number}"))).collect();
    let words: Vec<_> = words.iter().map(|(at, word)| (*at, word.as_str())).collect();
    server.disk_holds_all("a", "vdb", &words);
}

#[test]
fn killed_at_any_moment_the_server_settles_what_is_done_with_disks() {
    let mut server = server();
    up_with(&server, "a", "data");
    let pid = server.qemu_pid("a");
    let mut random = Random::new();
    server.shell("a", "ostler-write first 64");
    for (number, action) in ROUND.into_iter().enumerate() {
        let begun = server.command(action).output();
        println!("{action:?} begun with {:?}", begun.map(|output| output.status.code()));
        std::thread::sleep(random.moment(LONGEST));
        server.restart();
        converges(&server);
        // It may have been done, or never have been heard of.
        let again = server.cli(&[action, &["--wait"]].concat());
        assert!(matches!(again.code, 0 | 3 | 4), "{action:?}: {}", again.stderr);
        converges(&server);
        guest_agrees(&server);
        server.disk_write("a", "vdb", number as u64, &format!("word-{number}"));
    }
    holds_until(&server, ROUND.len());
    server.root_holds("a", "first");
    assert_eq!(server.qemu_pid("a"), pid, "the guest did not go on");
    // What is on the host's disk is whole, too.
    server.ok(&["vm", "stop", "a", "--wait"]);
    server.ok(&["vm", "start", "a", "--wait"]);
    server.booted("a", 2);
    holds_until(&server, ROUND.len());
    server.ok(&["vm", "delete", "a", "--wait"]);
    server.ok(&["volume", "delete", "data", "--wait"]);
    server.nothing_left();
}

#[test]
fn a_revert_that_is_cut_off_is_done_or_not_done() {
    let mut server = server();
    up_with(&server, "a", "data");
    let mut random = Random::new();
    server.shell("a", "ostler-write one 64");
    server.disk_write("a", "vdb", 2, "one");
    server.ok(&["snapshot", "create", "one", "--vm", "a", "--wait"]);
    server.shell("a", "ostler-write two 64");
    server.disk_write("a", "vdb", 2, "two");
    server.ok(&["vm", "stop", "a", "--wait"]);
    server.ok(&["snapshot", "create", "two", "--vm", "a", "--wait"]);
    for number in 0..6 {
        let to = if number % 2 == 0 { "one" } else { "two" };
        server.ok(&["snapshot", "revert", to]);
        std::thread::sleep(random.moment(Duration::from_millis(60)));
        server.restart();
        converges(&server);
        let stands_on: Vec<Volume> = server.json(&["volume", "list"]);
        let stands_on: HashSet<_> = stands_on.iter().map(|volume| volume.status.snapshot).collect();
        assert_eq!(stands_on.len(), 1, "the disks stand on different snapshots: {stands_on:?}");
    }
    for (to, boots) in [("one", 2), ("two", 2)] {
        server.ok(&["snapshot", "revert", to, "--wait"]);
        server.ok(&["vm", "start", "a", "--wait"]);
        server.booted("a", boots);
        server.root_holds("a", to);
        server.disk_holds("a", "vdb", 2, to);
        server.ok(&["vm", "stop", "a", "--wait"]);
    }
    server.ok(&["snapshot", "delete", "one", "two", "--wait"]);
    server.ok(&["vm", "delete", "a", "--wait"]);
    server.ok(&["volume", "delete", "data", "--wait"]);
    server.nothing_left();
}

#[test]
fn qemu_killed_in_the_middle_of_snapshots_loses_nothing_that_was_flushed() {
    let server = server();
    up_with(&server, "a", "data");
    let mut random = Random::new();
    for number in 0..KILLS {
        let word = format!("word-{number}");
        server.shell("a", &format!("ostler-write {word} 64"));
        server.disk_write("a", "vdb", number as u64, &word);
        let name = format!("s{number}");
        server.ok(&["snapshot", "create", &name, "--vm", "a"]);
        // Most are begun and ended within it.
        std::thread::sleep(random.moment(Duration::from_millis(80)));
        kill_qemu(server.qemu_pid("a"));
        server.wait_phase("a", "error");
        assert!(server.reason("a").contains("signal 9"), "{}", server.reason("a"));
        server.ok(&["vm", "start", "a", "--wait"]);
        server.booted("a", 2 + number as u32);
        server.root_holds("a", &word);
        holds_until(&server, number + 1);
        calm("everything that was begun ends", || unrest(&server));
    }
    let names = server.ok(&["snapshot", "list", "-o", "name"]);
    let names: Vec<_> = names.lines().collect();
    assert_eq!(names.len(), KILLS, "{names:?}");
    server.ok(&[&["snapshot", "delete", "--wait"], &names[..]].concat());
    holds_until(&server, KILLS);
    server.ok(&["vm", "delete", "a", "--wait"]);
    server.ok(&["volume", "delete", "data", "--wait"]);
    server.nothing_left();
}
