//! How long disks take to come, to go and to get a layer while the guest runs. The guest's disks stand still for a part
//! of a snapshot's transaction at most.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ostler_qemu::conformance::guest;
use ostler_qemu::*;
use uuid::Uuid;

const DISKS: usize = 4;

fn main() {
    // `cargo test` runs benches too, with this flag; one round shows that it works.
    let rounds = if std::env::args().any(|arg| arg == "--bench") { 20 } else { 1 };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let hypervisor = Arc::new(QemuHypervisor::new(QemuConfig::new(dir.path().join("run"))));
    let (mut attach, mut stopped, mut snapshot, mut detach) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    runtime.block_on(async {
        let machine = hypervisor.start(spec(dir.path()), StartOptions::default()).await.unwrap();
        for round in 0..rounds {
            for number in 0..DISKS {
                let disk = disk(dir.path(), &format!("d{number}"), round);
                let begun = Instant::now();
                machine.disk_attach(disk).await.unwrap();
                attach.push(begun.elapsed());
            }
            let overlay = |number| SnapshotDisk {
                id: format!("d{number}"),
                overlay: file(dir.path(), &format!("d{number}r{round}top")),
            };
            let overlays: Vec<_> = (0..DISKS).map(overlay).collect();
            let begun = Instant::now();
            stopped.push(machine.disks_snapshot(overlays).await.unwrap());
            snapshot.push(begun.elapsed());
            for number in 0..DISKS {
                let begun = Instant::now();
                machine.disk_detach(&format!("d{number}"), Duration::from_secs(10)).await.unwrap();
                detach.push(begun.elapsed());
            }
        }
        machine.quit().await.unwrap();
    });
    for (what, times) in [
        ("attach".to_owned(), &mut attach),
        ("detach".to_owned(), &mut detach),
        (format!("snapshot of {DISKS}, whole call"), &mut snapshot),
        (format!("snapshot of {DISKS}, transaction"), &mut stopped),
    ] {
        times.sort();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
        println!("BENCH disks {what} | median {:.2} ms | worst {:.2} ms", ms(median), ms(worst));
    }
}

fn file(dir: &Path, name: &str) -> DiskLayer {
    let path: PathBuf = dir.join(name);
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1G").status();
    assert!(made.unwrap().success());
    DiskLayer::new(path, DiskFormat::Qcow2).named(name)
}

fn disk(dir: &Path, id: &str, round: usize) -> DiskSpec {
    let layers = vec![file(dir, &format!("{id}r{round}"))];
    DiskSpec { id: id.into(), layers, bus: DiskBus::Scsi, ..DiskSpec::default() }
}

fn spec(dir: &Path) -> MachineSpec {
    let boot = dir.join("boot.raw");
    std::fs::write(&boot, guest::boot_disk()).unwrap();
    let root = DiskSpec {
        id: "root".into(),
        layers: vec![DiskLayer::new(boot, DiskFormat::Raw)],
        boot_index: Some(1),
        ..DiskSpec::default()
    };
    MachineSpec {
        id: Uuid::now_v7(),
        name: "bench".into(),
        machine: MachineType::Q35,
        machine_version: None,
        accelerator: Accelerator::Tcg,
        cpu_model: None,
        cpus: 1,
        memory_bytes: 64 << 20,
        firmware: Firmware::Bios,
        kernel: None,
        disks: vec![root, disk(dir, "first", 0)],
        disk_places: None,
        nics: Vec::new(),
        rng: false,
        balloon: false,
        vnc: false,
    }
}
