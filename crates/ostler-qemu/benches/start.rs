//! How long a machine takes from the request to running virtual CPUs, against the same QEMU command line spawned by
//! hand and let go over QMP. Both in turn in the same run; prints medians, spreads and the ratio.

mod by_hand;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ostler_qemu::conformance::guest;
use ostler_qemu::*;
use uuid::Uuid;

const WARM_UP: usize = 3;

fn main() {
    // `cargo test` runs benches too, with this flag; one round shows that it works.
    let rounds = if std::env::args().any(|arg| arg == "--bench") { 40 } else { 1 };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, guest::boot_disk()).unwrap();
    let hypervisor = Arc::new(QemuHypervisor::new(QemuConfig::new(dir.path().join("run"))));
    assert!(runtime.block_on(hypervisor.probe()).problems.is_empty());

    let (mut ours, mut bare, mut kills) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds + WARM_UP {
        let (started, killed) = runtime.block_on(start_ours(&hypervisor, &disk));
        let machine = by_hand::ByHand::start(&by_hand::command_line(&spec(&disk), dir.path()), dir.path());
        let by_hand = machine.started;
        machine.end();
        if round >= WARM_UP {
            ours.push(started);
            kills.push(killed);
            bare.push(by_hand);
        }
    }
    let (our_median, bare_median) = (report("start()", &mut ours), report("the same by hand", &mut bare));
    report("kill()", &mut kills);
    println!(
        "BENCH driver start | {:.1} ms | {:.1} ms by hand | {:.2}x | at most 1.25x",
        our_median.as_secs_f64() * 1e3,
        bare_median.as_secs_f64() * 1e3,
        our_median.as_secs_f64() / bare_median.as_secs_f64()
    );
}

fn report(what: &str, times: &mut [Duration]) -> Duration {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    println!(
        "{what:<18} median {:6.1} ms   10th percentile {:6.1} ms   90th {:6.1} ms   ({} rounds)",
        ms(at(0.5)),
        ms(at(0.1)),
        ms(at(0.9)),
        times.len()
    );
    at(0.5)
}

fn spec(disk: &Path) -> MachineSpec {
    MachineSpec {
        id: Uuid::now_v7(),
        name: "bench".into(),
        machine: MachineType::Q35,
        machine_version: None,
        accelerator: Accelerator::Tcg,
        cpu_model: None,
        cpus: 1,
        memory_bytes: 256 << 20,
        firmware: Firmware::Bios,
        kernel: None,
        disks: vec![DiskSpec {
            id: "root".into(),
            layers: vec![DiskLayer::new(disk, DiskFormat::Raw)],
            bus: DiskBus::Virtio,
            boot_index: Some(1),
            ..DiskSpec::default()
        }],
        disk_places: None,
        nics: vec![NicSpec {
            id: "lan".into(),
            mac: "52:54:00:12:34:56".parse().unwrap(),
            model: NicModel::Virtio,
            backend: NicBackend::User { forwards: Vec::new(), hostname: None },
            boot_index: None,
        }],
        rng: true,
        balloon: true,
        vnc: false,
    }
}

async fn start_ours(hypervisor: &QemuHypervisor, disk: &Path) -> (Duration, Duration) {
    let spec = spec(disk);
    let begun = Instant::now();
    let machine = hypervisor.start(spec, StartOptions::default()).await.unwrap();
    let started = begun.elapsed();
    let begun = Instant::now();
    hypervisor.kill(machine.id()).await.unwrap();
    let killed = begun.elapsed();
    hypervisor.forget(machine.id()).await.unwrap();
    (started, killed)
}
