//! Disks of running machines with a real Linux guest, whose data is checked from outside; and what only the real driver
//! can be asked: failures half way, descriptors, a full file system.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::linux::{Shell, linux, start_linux, write_command};
use common::*;
use ostler_qemu::*;
use tokio::sync::watch;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

fn layer(path: &Path, name: &str) -> DiskLayer {
    DiskLayer::new(path, DiskFormat::Qcow2).named(name)
}

fn blank(host: &QemuHost, name: &str) -> DiskLayer {
    let path = host.dir.path().join(name);
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &SIZE.to_string()]);
    layer(&path, name)
}

/// Whose header names the file below, so that qemu-io and qemu-img follow it.
fn overlay_of(host: &QemuHost, name: &str, below: &Path, size: u64) -> DiskLayer {
    let path = host.dir.path().join(name);
    let (text, below) = (path.to_str().unwrap(), below.to_str().unwrap());
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", text, &size.to_string()]);
    layer(&path, name)
}

fn disk(id: &str, layers: Vec<DiskLayer>, bus: DiskBus) -> DiskSpec {
    DiskSpec { id: id.into(), layers, bus, serial: Some(format!("serial-{id}")), ..DiskSpec::default() }
}

/// The files below the test's directory that QEMU has open, apart from those of its run directory.
fn open_files(host: &QemuHost, machine: &Arc<dyn Machine>) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", machine.facts().pid)).unwrap();
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    let mut files: Vec<_> = targets
        .filter(|path| path.starts_with(host.dir.path()) && !path.starts_with(&host.config.run_dir))
        .collect();
    files.sort();
    files.dedup();
    files
}

async fn top(machine: &Arc<dyn Machine>, id: &str) -> Option<String> {
    machine.disks().await.unwrap().into_iter().find(|disk| disk.id == id).unwrap().top
}

fn check(path: &Path) {
    qemu_img(&["check", "-q", path.to_str().unwrap()]);
}

fn never() -> (watch::Sender<bool>, watch::Receiver<bool>) {
    watch::channel(false)
}

#[tokio::test]
async fn a_guest_gets_and_returns_disks() {
    let host = QemuHost::new();
    let first = disk("first", vec![blank(&host, "first0")], DiskBus::Scsi);
    let (_, machine, mut shell) = start_linux(&host, vec![first]).await;
    let before = open_files(&host, &machine);
    for round in 0..2 {
        let (fast, wide) = (blank(&host, &format!("fast{round}")), blank(&host, &format!("wide{round}")));
        machine.disk_attach(disk("fast", vec![fast.clone()], DiskBus::Virtio)).await.unwrap();
        machine.disk_attach(disk("wide", vec![wide.clone()], DiskBus::Scsi)).await.unwrap();
        shell.until("cat /sys/block/vda/serial", "serial-fast").await;
        shell.until("cat /sys/block/sdb/size", &(SIZE / 512).to_string()).await;
        let page = shell.run("cat /sys/block/sdb/device/vpd_pg80 | tr -d '\\0'").await;
        assert!(page.contains("serial-wide"), "{page}");

        machine.disk_resize("fast", 2 * SIZE).await.unwrap();
        machine.disk_resize("wide", 2 * SIZE).await.unwrap();
        shell.until("cat /sys/block/vda/size", &(2 * SIZE / 512).to_string()).await;
        shell.until("cat /sys/block/sdb/size", &(2 * SIZE / 512).to_string()).await;
        for device in ["vda", "sdb"] {
            shell.run(&write_command(device, 'A', 40, 2)).await;
        }
        machine.disk_detach("fast", PATIENCE).await.unwrap();
        machine.disk_detach("wide", PATIENCE).await.unwrap();
        shell.until("ls /sys/block | grep -c -e vda -e sdb || true", "0").await;
        assert_eq!(open_files(&host, &machine), before, "QEMU has closed the files");
        for layer in [fast, wide] {
            qemu_io(&layer.path, "read -P 0x41 40M 2M");
            check(&layer.path);
        }
    }
}

/// Two disks over one image, on the machine type with plain PCI.
#[tokio::test]
async fn disks_may_share_what_lies_below() {
    let host = QemuHost::new();
    let image = blank(&host, "image");
    qemu_io(&image.path, "write -P 0x49 0 1M");
    std::fs::set_permissions(&image.path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    let clone = |id: &str| {
        let top = overlay_of(&host, &format!("{id}0"), &image.path, SIZE);
        disk(id, vec![top, image.clone()], DiskBus::Virtio)
    };
    let spec = MachineSpec { machine: MachineType::I440fx, ..linux(vec![clone("a")]) };
    let machine = host.hypervisor.start(spec, StartOptions::default()).await.unwrap();
    let mut shell = Shell::of(&machine).await;
    // More than there are places in the first row.
    for id in ["b", "c", "d", "e", "f", "g", "h", "i", "j"] {
        machine.disk_attach(clone(id)).await.unwrap();
    }
    shell.until("cat /sys/block/vdj/serial", "serial-j").await;
    assert_eq!(shell.run("dd if=/dev/vdj bs=1M count=1 2>/dev/null | tr -d I | wc -c").await, "0");
    let (_keep, cancel) = never();
    machine.disk_stream("b", Stream::default(), watch::channel(Progress::default()).0, cancel).await.unwrap();
    for id in ["c", "i", "j"] {
        machine.disk_detach(id, PATIENCE).await.unwrap();
    }
    machine.disk_attach(disk("k", vec![blank(&host, "k0")], DiskBus::Virtio)).await.unwrap();
    shell.until("cat /sys/block/vdc/serial", "serial-k").await;
    assert_eq!(shell.run("dd if=/dev/vda bs=1M count=1 2>/dev/null | tr -d I | wc -c").await, "0");
    machine.quit().await.unwrap();
    std::fs::rename(&image.path, host.dir.path().join("away")).unwrap();
    qemu_io(&host.dir.path().join("b0"), "read -P 0x49 0 1M");
}

#[tokio::test]
async fn snapshots_hold_what_was_written_before() {
    let host = QemuHost::new();
    let (a0, b0) = (blank(&host, "a0"), blank(&host, "b0"));
    let (_, machine, mut shell) = start_linux(
        &host,
        vec![disk("a", vec![a0.clone()], DiskBus::Virtio), disk("b", vec![b0.clone()], DiskBus::Scsi)],
    )
    .await;
    // Its driver comes late.
    shell.until("cat /sys/block/sda/size", &(SIZE / 512).to_string()).await;
    let both = |byte| format!("{} && {}", write_command("vda", byte, 0, 2), write_command("sda", byte, 0, 2));
    shell.run(&both('A')).await;
    // The guest goes on writing elsewhere while the layers come.
    let busy = "(while [ ! -e /tmp/stop ]; do dd if=/dev/zero of=/dev/vda bs=64k seek=400 count=20 conv=notrunc,fsync 2>/dev/null; done; rm /tmp/stop) &";
    shell.run(&format!("{busy} true")).await;
    let (a1, b1) = (overlay_of(&host, "a1", &a0.path, SIZE), overlay_of(&host, "b1", &b0.path, SIZE));
    let snapshot = |id: &str, overlay: &DiskLayer| SnapshotDisk { id: id.into(), overlay: overlay.clone() };
    machine.disks_snapshot(vec![snapshot("a", &a1), snapshot("b", &b1)]).await.unwrap();
    shell.run("touch /tmp/stop; while [ -e /tmp/stop ]; do usleep 1000; done").await;
    shell.run(&both('B')).await;
    let a2 = overlay_of(&host, "a2", &a1.path, SIZE);
    machine.disks_snapshot(vec![snapshot("a", &a2)]).await.unwrap();
    shell.run(&write_command("vda", 'C', 1, 1)).await;

    // The middle layer goes; what it held is in the top.
    let stream = Stream {
        base: Some(StreamBase { layer: "a0".into(), backing_file: a0.path.display().to_string() }),
        ..Stream::default()
    };
    let (_keep, cancel) = never();
    machine.disk_stream("a", stream, watch::channel(Progress::default()).0, cancel).await.unwrap();
    assert!(!open_files(&host, &machine).contains(&a1.path));
    let (_keep, cancel) = never();
    machine.disk_stream("b", Stream::default(), watch::channel(Progress::default()).0, cancel).await.unwrap();
    assert_eq!(open_files(&host, &machine), [a0.path.clone(), a2.path.clone(), b1.path.clone()]);
    assert_eq!(shell.run("dd if=/dev/vda bs=1M count=1 2>/dev/null | tr -d B | wc -c").await, "0");
    machine.quit().await.unwrap();

    for layer in [&a0, &b0] {
        qemu_io(&layer.path, "read -P 0x41 0 2M");
    }
    std::fs::remove_file(&a1.path).unwrap();
    std::fs::remove_file(&b0.path).unwrap();
    qemu_io(&a2.path, "read -P 0x42 0 1M");
    qemu_io(&a2.path, "read -P 0x43 1M 1M");
    qemu_io(&b1.path, "read -P 0x42 0 2M");
    for layer in [&a0, &a2, &b1] {
        check(&layer.path);
    }
}

#[tokio::test]
async fn a_full_file_system_pauses_the_guest_until_there_is_room() {
    let host = QemuHost::new();
    let small = host.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mount = |options: &str| {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&small);
        mount.output().is_ok_and(|done| done.status.success())
    };
    if !mount("size=4m") {
        eprintln!("skipped: mounts are not permitted here");
        return;
    }
    let _mounted = Mounted(small.clone());
    let layer = blank(&host, "small/data");
    let layer = layer.named("data");
    let data = disk("data", vec![layer.clone()], DiskBus::Virtio);
    let (_, machine, mut shell) = start_linux(&host, vec![data]).await;
    let mut events = machine.events();
    shell.begin(&write_command("vda", 'A', 0, 12)).await;
    let full = async {
        loop {
            if let Ok(MachineEvent::IoError { disk, nospace, .. }) = events.recv().await {
                return (disk, nospace);
            }
        }
    };
    assert_eq!(tokio::time::timeout(PATIENCE, full).await.unwrap(), ("data".into(), true));
    let paused = async {
        while machine.state().await.unwrap() != RunState::IoError {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, paused).await.unwrap();
    assert!(mount("remount,size=64m"), "the file system grows");
    machine.resume().await.unwrap();
    shell.answer().await;
    machine.quit().await.unwrap();
    qemu_io(&layer.path, "read -P 0x41 0 12M");
    check(&layer.path);
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn every_cache_and_discard_mode_works() {
    let host = QemuHost::new();
    let modes = [
        ("a", DiskCache::Writeback, DiskDiscard::Unmap, DiskBus::Virtio, "vda"),
        ("b", DiskCache::None, DiskDiscard::Unmap, DiskBus::Virtio, "vdb"),
        ("c", DiskCache::Writethrough, DiskDiscard::Ignore, DiskBus::Virtio, "vdc"),
    ];
    let disks: Vec<_> = modes
        .iter()
        .map(|(id, cache, discard, bus, _)| DiskSpec {
            cache: *cache,
            discard: *discard,
            ..disk(id, vec![blank(&host, &format!("{id}0"))], *bus)
        })
        .collect();
    let direct = std::fs::OpenOptions::new().read(true).open(&disks[0].layers[0].path).unwrap();
    if rustix::fs::fcntl_setfl(&direct, rustix::fs::OFlags::DIRECT).is_err() {
        eprintln!("skipped: the file system of temporary files takes no direct I/O");
        return;
    }
    let (_, machine, mut shell) = start_linux(&host, disks.clone()).await;
    assert_eq!(shell.run("cat /sys/block/vda/queue/write_cache").await, "write back");
    assert_eq!(shell.run("cat /sys/block/vdc/queue/write_cache").await, "write through");
    let more = DiskSpec { cache: DiskCache::None, ..disk("d", vec![blank(&host, "d0")], DiskBus::Virtio) };
    machine.disk_attach(more).await.unwrap();
    shell.until("cat /sys/block/vdd/serial", "serial-d").await;
    let snapshots = disks.iter().map(|spec| SnapshotDisk {
        id: spec.id.clone(),
        overlay: overlay_of(&host, &format!("{}1", spec.id), &spec.layers[0].path, SIZE),
    });
    let snapshots: Vec<_> = snapshots.collect();
    for (_, _, _, _, device) in &modes {
        shell.run(&write_command(device, 'A', 0, 4)).await;
    }
    machine.disks_snapshot(snapshots.clone()).await.unwrap();
    for (_, _, _, _, device) in &modes {
        shell.run(&write_command(device, 'B', 2, 4)).await;
        // Zeroes are noted, not stored.
        shell
            .run(&format!(
                "dd if=/dev/zero of=/dev/{device} bs=1M seek=8 count=16 conv=fsync,notrunc 2>/dev/null"
            ))
            .await;
    }
    machine.quit().await.unwrap();
    for snapshot in &snapshots {
        let path = &snapshot.overlay.path;
        qemu_io(path, "read -P 0x41 0 2M");
        qemu_io(path, "read -P 0x42 2M 4M");
        qemu_io(path, "read -P 0 8M 16M");
        check(path);
        use std::os::unix::fs::MetadataExt;
        let stored = std::fs::metadata(path).unwrap().blocks() * 512;
        assert!(stored < 8 * MIB, "{} holds {stored} bytes", path.display());
    }
}

#[tokio::test]
async fn what_fails_half_way_leaves_nothing() {
    let host = QemuHost::new();
    let mut wanted = spec(&host.disk("boot.raw"));
    wanted.disks.push(disk("first", vec![blank(&host, "first0")], DiskBus::Scsi));
    let machine = host.hypervisor.start(wanted, StartOptions::default()).await.unwrap();
    let (before, open_before) = (machine.disks().await.unwrap(), open_files(&host, &machine));
    let broken = host.dir.path().join("broken");
    std::fs::write(&broken, vec![7u8; 1 << 16]).unwrap();
    let good = blank(&host, "good0");
    let bad = [
        disk("x", vec![layer(&host.dir.path().join("missing"), "m")], DiskBus::Virtio),
        disk("x", vec![layer(&broken, "b")], DiskBus::Virtio),
        disk("x", vec![good.clone(), layer(&broken, "b")], DiskBus::Scsi),
        // The last step fails.
        DiskSpec { boot_index: Some(1), ..disk("x", vec![good.clone()], DiskBus::Virtio) },
        DiskSpec { boot_index: Some(1), ..disk("x", vec![good.clone()], DiskBus::Scsi) },
    ];
    for disk in bad {
        let told = format!("{disk:?}");
        machine.disk_attach(disk).await.unwrap_err();
        assert_eq!(machine.disks().await.unwrap(), before, "{told}");
        assert_eq!(open_files(&host, &machine), open_before, "{told}");
    }
    let snapshot = |id: &str, overlay| SnapshotDisk { id: id.into(), overlay };
    let first1 = || overlay_of(&host, "first1", &host.dir.path().join("first0"), SIZE);
    for other in [layer(&broken, "b"), layer(&host.dir.path().join("missing"), "m")] {
        let both = vec![snapshot("first", first1()), snapshot("root", other)];
        machine.disks_snapshot(both).await.unwrap_err();
        assert_eq!(machine.disks().await.unwrap(), before);
        assert_eq!(open_files(&host, &machine), open_before);
    }
    machine.disk_attach(disk("x", vec![good], DiskBus::Virtio)).await.unwrap();
    machine.disks_snapshot(vec![snapshot("first", first1())]).await.unwrap();
    assert_eq!(top(&machine, "first").await.as_deref(), Some("first1"));
}

/// Calls are given up at all moments; the next one sets things right.
#[tokio::test]
async fn calls_that_are_given_up_are_finished_by_the_next() {
    let host = QemuHost::new();
    let mut wanted = spec(&host.disk("boot.raw"));
    wanted.disks.push(disk("first", vec![blank(&host, "first0")], DiskBus::Scsi));
    let machine = host.hypervisor.start(wanted, StartOptions::default()).await.unwrap();
    let open_before = open_files(&host, &machine);
    let layers = vec![
        overlay_of(&host, "x1", &blank(&host, "x0").path, SIZE),
        layer(&host.dir.path().join("x0"), "x0"),
    ];
    let spec = disk("x", layers, DiskBus::Scsi);
    for micros in (0..6000).step_by(200) {
        let after = Duration::from_micros(micros);
        let _ = tokio::time::timeout(after, machine.disk_attach(spec.clone())).await;
        machine.disk_attach(spec.clone()).await.unwrap();
        assert_eq!(top(&machine, "x").await.as_deref(), Some("x1"));
        let _ = tokio::time::timeout(after, machine.disk_detach("x", PATIENCE)).await;
        machine.disk_detach("x", PATIENCE).await.unwrap();
        assert_eq!(open_files(&host, &machine), open_before, "{after:?}");
    }
    let mut below = host.dir.path().join("first0");
    for (number, micros) in (0..4000).step_by(200).enumerate() {
        let name = format!("first{}", number + 1);
        let overlay = overlay_of(&host, &name, &below, SIZE);
        below.clone_from(&overlay.path);
        let wanted = vec![SnapshotDisk { id: "first".into(), overlay }];
        let _ =
            tokio::time::timeout(Duration::from_micros(micros), machine.disks_snapshot(wanted.clone())).await;
        machine.disks_snapshot(wanted).await.unwrap();
        assert_eq!(top(&machine, "first").await, Some(name));
    }
}

#[tokio::test]
async fn a_stream_goes_on_without_its_agent() {
    let mut host = QemuHost::new();
    let first0 = blank(&host, "first0");
    qemu_io(&first0.path, "write -P 0x41 0 8M");
    let first1 = overlay_of(&host, "first1", &first0.path, SIZE);
    let layers = vec![first1.clone(), first0.clone()];
    let mut wanted = spec(&host.disk("boot.raw"));
    wanted.disks.push(disk("first", layers, DiskBus::Scsi));
    let machine = host.hypervisor.start(wanted, StartOptions::default()).await.unwrap();
    let slow = Stream { bytes_per_second: 4 * MIB, ..Stream::default() };
    let (progress, mut seen) = watch::channel(Progress::default());
    let (_keep, cancel) = never();
    tokio::select! {
        ended = machine.disk_stream("first", slow.clone(), progress, cancel) => panic!("{ended:?}"),
        begun = seen.wait_for(|progress| progress.total_bytes > 0) => { begun.unwrap(); }
    }
    drop(machine);
    host.hypervisor = Arc::new(QemuHypervisor::new(host.config.clone()));
    let Some(Survey::Running(machine)) = host.hypervisor.survey().await.unwrap().pop() else {
        panic!("it is found again")
    };
    let (_keep, cancel) = never();
    machine.disk_stream("first", slow, watch::channel(Progress::default()).0, cancel).await.unwrap();
    assert!(!open_files(&host, &machine).contains(&first0.path));
    // A disk that leaves in the middle of a stream takes the stream along.
    let first2 = overlay_of(&host, "first2", &first1.path, SIZE);
    machine.disks_snapshot(vec![SnapshotDisk { id: "first".into(), overlay: first2 }]).await.unwrap();
    let (progress, mut seen) = watch::channel(Progress::default());
    let (_keep, cancel) = never();
    let very_slow = Stream { bytes_per_second: 64 << 10, ..Stream::default() };
    tokio::select! {
        ended = machine.disk_stream("first", very_slow, progress, cancel) => panic!("{ended:?}"),
        begun = seen.wait_for(|progress| progress.total_bytes > 0) => { begun.unwrap(); }
    }
    machine.disk_detach("first", PATIENCE).await.unwrap();
    assert!(!open_files(&host, &machine).contains(&first1.path));
    machine.quit().await.unwrap();
    std::fs::remove_file(&first0.path).unwrap();
    qemu_io(&first1.path, "read -P 0x41 0 8M");
    check(&first1.path);
}

/// The layers below the top were opened for reading at the start.
#[tokio::test]
async fn merged_layers_keep_their_data() {
    let host = QemuHost::new();
    let a0 = blank(&host, "a0");
    qemu_io(&a0.path, "write -P 0x30 0 8M");
    let mut layers = vec![a0.clone()];
    for (number, command) in
        [(1, "write -P 0x31 1M 4M"), (2, "write -P 0x32 2M 4M"), (3, "write -P 0x33 3M 1M")]
    {
        let layer = overlay_of(&host, &format!("a{number}"), &layers[0].path, SIZE);
        qemu_io(&layer.path, command);
        layers.insert(0, layer);
    }
    let mut wanted = spec(&host.disk("boot.raw"));
    wanted.disks.push(disk("a", layers.clone(), DiskBus::Virtio));
    let machine = host.hypervisor.start(wanted, StartOptions::default()).await.unwrap();
    let commit = Commit {
        layer: "a2".into(),
        into: a0.clone(),
        above: None,
        backing_file: a0.path.display().to_string(),
        bytes_per_second: 64 << 10,
    };
    let (cancel, cancelled) = never();
    let (progress, mut seen) = watch::channel(Progress::default());
    let running = machine.disk_commit("a", commit.clone(), progress, cancelled);
    let stop = async {
        seen.wait_for(|progress| progress.total_bytes > 0).await.unwrap();
        cancel.send_replace(true);
    };
    let (ended, ()) = tokio::join!(running, stop);
    assert!(matches!(ended, Err(Error::Disk(DiskError::Cancelled { .. }))), "{ended:?}");
    assert!(layers.iter().all(|layer| open_files(&host, &machine).contains(&layer.path)));

    let (_keep, cancel) = never();
    let fast = Commit { bytes_per_second: 0, ..commit };
    machine.disk_commit("a", fast, watch::channel(Progress::default()).0, cancel).await.unwrap();
    for gone in &layers[1..3] {
        assert!(!open_files(&host, &machine).contains(&gone.path));
        std::fs::remove_file(&gone.path).unwrap();
    }
    machine.quit().await.unwrap();
    let top = &layers[0].path;
    for check in ["read -P 0x30 0 1M", "read -P 0x31 1M 1M", "read -P 0x32 2M 1M", "read -P 0x33 3M 1M"] {
        qemu_io(top, check);
    }
    qemu_io(top, "read -P 0x32 4M 2M");
    qemu_io(top, "read -P 0x30 6M 2M");
    check(top);
    check(&a0.path);
}
