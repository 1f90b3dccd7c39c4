//! A minimal agent for the crash tests: starts one machine and stays until it is killed.
//!
//! `agent RUN_DIR DISK ID`. Prints `started` once the machine runs, or `failed: …`.

use std::path::PathBuf;
use std::sync::Arc;

use ostler_qemu::*;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let mut args = std::env::args().skip(1);
    let mut next = || args.next().expect("usage: agent RUN_DIR DISK ID");
    let (run_dir, disk, id) = (PathBuf::from(next()), PathBuf::from(next()), next());
    let hypervisor = Arc::new(QemuHypervisor::new(QemuConfig::new(run_dir)));
    let spec = MachineSpec {
        id: id.parse().expect("a UUID"),
        name: "crash-test".into(),
        machine: MachineType::Q35,
        machine_version: None,
        accelerator: Accelerator::Tcg,
        cpu_model: None,
        cpus: 1,
        memory_bytes: 32 << 20,
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
        nics: Vec::new(),
        rng: false,
        balloon: false,
        vnc: false,
    };
    match hypervisor.start(spec, StartOptions::default()).await {
        Ok(_machine) => {
            println!("started");
            std::future::pending::<()>().await;
        }
        Err(error) => println!("failed: {error}"),
    }
}
