//! Disks as things of their own, as an operator handles them and as the guest sees them: attached, grown and detached
//! while the guest writes, snapshots in a tree, linked clones.

#[path = "e2e/mod.rs"]
mod e2e;

#[path = "e2e_disks/crash.rs"]
mod crash;
#[path = "e2e_disks/full.rs"]
mod full;
#[path = "e2e_disks/refused.rs"]
mod refused;
#[path = "e2e_disks/snapshots.rs"]
mod snapshots;

use e2e::TestServer;
use ostler_api::snapshot::Snapshot;
use ostler_api::volume::Volume;
use uuid::Uuid;

/// A server with the guest's disk and kernel.
fn server() -> TestServer {
    let server = TestServer::new();
    server.import_guest();
    server.import_kernel();
    server
}

/// A VM with a root disk, `vda`, whose guest is up.
fn up(server: &TestServer, vm: &str) {
    server.create_direct(vm, "", &["--image", "guest"]);
    server.booted(vm, 1);
}

/// The same with a further volume of 64 MiB, `vdb`.
fn up_with(server: &TestServer, vm: &str, volume: &str) {
    server.ok(&["volume", "create", volume, "--size", "64M", "--wait"]);
    up(server, vm);
    server.ok(&["volume", "attach", volume, vm, "--wait"]);
    server.guest_has(vm, "vda vdb");
}

fn volume(server: &TestServer, name: &str) -> Volume {
    server.json(&["volume", "show", name])
}

fn snapshot(server: &TestServer, name: &str) -> Snapshot {
    server.json(&["snapshot", "show", name])
}

/// The snapshot that this one was taken upon, by name.
fn parent(server: &TestServer, name: &str) -> Option<String> {
    let parent = snapshot(server, name).status.parent?;
    Some(snapshot(server, &parent.to_string()).metadata.name.to_string())
}

/// What a guest sees of a volume's id.
fn serial(volume: Uuid) -> String {
    volume.simple().to_string().split_off(12)
}

#[test]
fn a_volume_goes_from_one_running_guest_to_another_with_its_data() {
    let server = server();
    up(&server, "a");
    up(&server, "b");
    server.ok(&["volume", "create", "data", "--size", "32M", "--wait"]);
    server.ok(&["volume", "attach", "data", "a", "--wait"]);
    server.guest_has("a", "vda vdb");
    let id = volume(&server, "data").metadata.id;
    let serials = server.serials("a");
    assert_eq!(serials[1], ("vdb".to_owned(), serial(id)), "{serials:?}");
    server.disk_write("a", "vdb", 31, "heron");

    // Grown while the guest has it, it has room where there was none.
    server.ok(&["volume", "resize", "data", "+32M", "--wait"]);
    assert_eq!(server.shell("a", "cat /sys/block/vdb/size"), (64 << 11).to_string());
    assert_eq!(volume(&server, "data").status.size.map(|size| size.0), Some(64 << 20));
    server.disk_write("a", "vdb", 63, "stork");
    server.disk_holds("a", "vdb", 31, "heron");

    server.ok(&["volume", "detach", "data", "--wait"]);
    server.guest_has("a", "vda");
    assert_eq!(volume(&server, "data").spec.vm, None);
    server.ok(&["volume", "attach", "data", "b", "--wait"]);
    server.guest_has("b", "vda vdb");
    assert_eq!(server.shell("b", "cat /sys/block/vdb/size"), (64 << 11).to_string());
    server.disk_holds_all("b", "vdb", &[(31, "heron"), (63, "stork")]);

    // A stop and a start take it along.
    server.ok(&["vm", "stop", "b", "--wait"]);
    server.ok(&["vm", "start", "b", "--wait"]);
    server.booted("b", 2);
    server.disk_holds("b", "vdb", 63, "stork");
    // It is not the VM's own and stays when that goes.
    server.ok(&["vm", "delete", "b", "--wait"]);
    assert_eq!(
        server.ok(&["volume", "list", "-o", "name"]).lines().filter(|name| *name == "data").count(),
        1
    );
    server.ok(&["volume", "delete", "data", "--wait"]);
    server.nothing_left();
}

#[test]
fn a_clone_of_a_running_vm_has_the_data_of_the_instant_and_outlives_its_source() {
    let server = TestServer::new();
    server.import_guest();
    // From its own boot loader: a clone does not take a kernel along.
    server.ok(&["vm", "create", "a", "--image", "guest", "--memory", "96M", "--wait"]);
    server.booted("a", 1);
    server.ok(&["volume", "create", "data", "--size", "64M", "--wait"]);
    server.ok(&["volume", "attach", "data", "a", "--wait"]);
    server.guest_has("a", "vda vdb");
    server.shell("a", "ostler-write then 64");
    server.disk_write("a", "vdb", 3, "then");
    server.ok(&["vm", "clone", "a", "b", "--wait"]);
    server.shell("a", "ostler-write later 64");
    server.disk_write("a", "vdb", 3, "later");

    let (a, b) = (server.vm("a"), server.vm("b"));
    assert_ne!(a.metadata.id, b.metadata.id);
    assert_ne!(a.spec.nics[0].mac, b.spec.nics[0].mac);
    server.booted("b", 2);
    server.guest_has("b", "vda vdb");
    server.root_holds("b", "then");
    server.disk_holds("b", "vdb", 3, "then");
    let mac = |vm| server.shell(vm, "cat /sys/class/net/eth0/address");
    assert_eq!((mac("a"), mac("b")), (a.spec.nics[0].mac.to_string(), b.spec.nics[0].mac.to_string()));
    let uuid = |vm| server.shell(vm, "cat /sys/class/dmi/id/product_uuid").to_lowercase();
    assert_eq!((uuid("a"), uuid("b")), (a.metadata.id.to_string(), b.metadata.id.to_string()));
    server.root_holds("a", "later");
    server.disk_holds("a", "vdb", 3, "later");

    // What the clone stands on is not deleted by accident.
    let said = server.fails(4, &["snapshot", "delete", "b-base", "--wait"]);
    assert!(said.contains("b-root") && said.contains("b-disk1") && said.contains("--force"), "{said}");
    server.ok(&["snapshot", "delete", "b-base", "--force", "--wait"]);
    server.ok(&["vm", "delete", "a", "--wait"]);
    server.ok(&["volume", "delete", "data", "--wait"]);
    server.disk_write("b", "vdb", 5, "own");
    server.ok(&["vm", "stop", "b", "--wait"]);
    server.ok(&["vm", "start", "b", "--wait"]);
    server.booted("b", 3);
    server.root_holds("b", "then");
    server.disk_holds_all("b", "vdb", &[(3, "then"), (5, "own")]);
    server.nothing_left();
}
