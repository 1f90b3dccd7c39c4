//! The conformance suite on the simulated hypervisor.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use ostler_qemu::conformance::{self, Fixture, GuestAct};
use ostler_qemu::*;
use uuid::Uuid;

struct SimFixture {
    host: SimHost,
    hypervisor: Arc<SimHypervisor>,
    scratch: tempfile::TempDir,
}

impl SimFixture {
    fn new() -> Self {
        let host = SimHost::default();
        let hypervisor = Arc::new(SimHypervisor::new(host.clone()));
        Self { host, hypervisor, scratch: tempfile::tempdir().unwrap() }
    }
}

#[async_trait]
impl Fixture for SimFixture {
    fn hypervisor(&self) -> Arc<dyn Hypervisor> {
        Arc::clone(&self.hypervisor) as Arc<dyn Hypervisor>
    }

    async fn restart_agent(&mut self) {
        self.hypervisor = Arc::new(SimHypervisor::new(self.host.clone()));
    }

    fn spec(&self) -> MachineSpec {
        MachineSpec {
            id: Uuid::now_v7(),
            name: "simulated".into(),
            machine: MachineType::Q35,
            machine_version: None,
            accelerator: Accelerator::Kvm,
            cpu_model: None,
            cpus: 2,
            memory_bytes: 1 << 30,
            firmware: Firmware::Bios,
            kernel: None,
            disks: Vec::new(),
            disk_places: None,
            nics: Vec::new(),
            rng: true,
            balloon: true,
            vnc: true,
        }
    }

    async fn guest_up(&self, _machine: &Arc<dyn Machine>) {}

    async fn guest_act(&self, machine: &Arc<dyn Machine>, act: GuestAct) {
        match act {
            GuestAct::PowerOff => self.host.guest_power_off(machine.id()),
            GuestAct::Panic => self.host.guest_panic(machine.id()),
            GuestAct::Reset => self.host.guest_reset(machine.id()),
        }
    }

    async fn murder(&self, machine: &Arc<dyn Machine>) {
        self.host.crash(machine.id(), 9);
    }

    fn scratch(&self) -> PathBuf {
        self.scratch.path().to_owned()
    }

    async fn disk_file(&self, name: &str, bytes: u64) -> DiskLayer {
        let path = PathBuf::from("/pool").join(name);
        self.host.set_file_size(&path, bytes);
        DiskLayer::new(path, DiskFormat::Qcow2).named(name)
    }

    async fn fill(&self, _layer: &DiskLayer, _bytes: u64) {}

    async fn guest_keeps_disks(&self, machine: &Arc<dyn Machine>) {
        self.host.set_guest(machine.id(), SimGuest { keeps_disks: true, ..SimGuest::default() });
    }

    async fn slow_streams(&self, machine: &Arc<dyn Machine>, slow: bool) {
        self.host.set_hanging(SimOperation::DiskStream, Some(machine.id()), slow);
    }
}

#[tokio::test]
async fn every_case_passes() {
    for case in conformance::CASES {
        eprintln!("{case}");
        conformance::run(case, &mut SimFixture::new()).await;
    }
}
