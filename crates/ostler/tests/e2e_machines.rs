//! Every kind of machine brings the guest up: machine types, firmware, buses, cards, and the ways to boot.

#[path = "e2e/mod.rs"]
mod e2e;

use std::fs;

use e2e::{Marker, TestServer, guest_file};

/// Boots the guest's disk in a machine with these options; the server, and what the guest says of itself.
fn boots_from_disk(options: &[&str]) -> (TestServer, Marker) {
    let server = TestServer::new();
    server.import_guest();
    let fixed = ["vm", "create", "a", "--image", "guest", "--memory", "256M", "--wait"];
    server.ok(&[&fixed, options].concat());
    let ready = server.booted("a", 1);
    (server, ready)
}

/// The guest has an address from QEMU's network.
fn has_network(server: &TestServer, vm: &str) {
    let net = server.marker(vm, "net");
    assert_eq!(net.get("ip"), "10.0.2.15");
    assert_eq!(net.get("mac"), server.vm(vm).spec.nics[0].mac);
}

#[test]
fn q35_with_bios() {
    let (server, ready) = boots_from_disk(&["--machine", "q35", "--firmware", "bios"]);
    assert_eq!(ready.get("root"), "/dev/vda2");
    has_network(&server, "a");
    let facts = server.vm("a").status.observed.and_then(|seen| seen.facts).unwrap();
    assert!(facts.machine_version.starts_with("pc-q35-"), "{}", facts.machine_version);
    server.nothing_left();
}

#[test]
fn q35_with_uefi_keeps_its_variables() {
    let (server, ready) = boots_from_disk(&["--firmware", "uefi"]);
    assert_eq!(ready.get("root"), "/dev/vda2");
    let id = server.vm("a").metadata.id;
    let vm_dir = server.node_dir().join("vms").join(id.to_string());
    let variables = || {
        let files = fs::read_dir(&vm_dir).unwrap().flatten().map(|entry| entry.path());
        let path = files.into_iter().find(|path| path.to_string_lossy().contains("vars")).expect("variables");
        (path.clone(), fs::read(path).unwrap())
    };
    server.ok(&["vm", "stop", "a", "--wait"]);
    let (path, first) = variables();
    let template = fs::read_dir("/usr/share/OVMF").unwrap().flatten().map(|entry| entry.path());
    let untouched = template.filter(|path| path.to_string_lossy().contains("VARS"));
    for template in untouched {
        assert_ne!(
            fs::read(&template).unwrap(),
            first,
            "the firmware has written nothing: {}",
            template.display()
        );
    }
    server.ok(&["vm", "start", "a", "--wait"]);
    server.booted("a", 2);
    assert_eq!(variables().0, path);
    server.nothing_left();
    assert!(!path.exists());
}

#[test]
fn i440fx_with_an_ide_disk() {
    let (server, ready) = boots_from_disk(&["--machine", "i440fx", "--disk-bus", "ide"]);
    assert_eq!(ready.get("root"), "/dev/sda2");
    server.nothing_left();
}

#[test]
fn q35_with_a_sata_disk_and_an_e1000() {
    let (server, ready) = boots_from_disk(&["--disk-bus", "sata", "--nic-model", "e1000"]);
    assert_eq!(ready.get("root"), "/dev/sda2");
    has_network(&server, "a");
    server.nothing_left();
}

#[test]
fn a_kernel_boots_directly_with_and_without_a_disk() {
    let server = TestServer::new();
    server.import_guest();
    server.import_kernel();
    server.create_direct("bare", "", &[]);
    server.create_direct("disk", "ostler.word=hello", &["--image", "guest"]);
    assert_eq!(server.marker("bare", "ready").get("root"), "initramfs");
    assert_eq!(server.marker("disk", "ready").get("root"), "/dev/vda2");
    let mut console = server.watch_console("disk");
    console.types("tr ' ' '\\n' </proc/cmdline | grep -o 'word=hel.*'\n");
    console.sees("\nword=hello");
    server.nothing_left();
}

#[test]
fn a_microvm_boots_with_a_disk_and_a_network() {
    let server = TestServer::new();
    server.import_guest();
    server.import_kernel();
    server.create_direct("a", "", &["--machine", "microvm", "--image", "guest"]);
    assert_eq!(server.booted("a", 1).get("root"), "/dev/vda2");
    has_network(&server, "a");
    let refused = server.fails(2, &["vm", "create", "b", "--machine", "microvm", "--image", "guest"]);
    assert!(refused.contains("kernel"), "{refused}");
    server.nothing_left();
}

#[test]
fn a_cd_boots_where_there_is_no_system_on_the_disk() {
    let server = TestServer::new();
    server.ok(&["image", "import", "cd", guest_file("ostler-guest.iso").to_str().unwrap()]);
    server.ok(&["vm", "create", "a", "--cdrom", "cd", "--disk", "64M", "--memory", "256M", "--wait"]);
    assert_eq!(server.marker("a", "ready").get("root"), "initramfs");
    server.nothing_left();
}
