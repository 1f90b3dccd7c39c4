//! What only the simulated hypervisor can be asked: faults on demand, guests with habits, and numbers.

use std::sync::Arc;
use std::time::Duration;

use ostler_qemu::*;
use uuid::Uuid;

fn spec() -> MachineSpec {
    MachineSpec {
        id: Uuid::now_v7(),
        name: "simulated".into(),
        machine: MachineType::Q35,
        machine_version: None,
        accelerator: Accelerator::Kvm,
        cpu_model: None,
        cpus: 1,
        memory_bytes: 1 << 30,
        firmware: Firmware::Bios,
        kernel: None,
        disks: Vec::new(),
        disk_places: None,
        nics: Vec::new(),
        rng: true,
        balloon: true,
        vnc: false,
    }
}

async fn start(hypervisor: &SimHypervisor, spec: MachineSpec) -> Result<Arc<dyn Machine>, StartError> {
    hypervisor.start(spec, StartOptions::default()).await
}

#[tokio::test]
async fn faults_come_and_go() {
    let host = SimHost::default();
    let hypervisor = SimHypervisor::new(host.clone());
    let spec = spec();
    host.fail(SimOperation::Start, Some(spec.id), 2, "no luck");
    for _ in 0..2 {
        let error = start(&hypervisor, spec.clone()).await.unwrap_err();
        assert_eq!(error.to_string(), "simulated failure: no luck");
    }
    let machine = start(&hypervisor, spec.clone()).await.unwrap();
    host.set_hanging(SimOperation::State, Some(spec.id), true);
    tokio::time::timeout(Duration::from_millis(20), machine.state()).await.unwrap_err();
    host.clear_faults();
    assert_eq!(machine.state().await.unwrap(), RunState::Running);
}

#[tokio::test(start_paused = true)]
async fn guests_have_habits() {
    let host = SimHost::default();
    let hypervisor = SimHypervisor::new(host.clone());
    let (deaf, slow, short, doomed) = (spec(), spec(), spec(), spec());
    let after = Duration::from_secs(5);
    host.set_guest(deaf.id, SimGuest { on_powerdown: OnPowerdown::Ignores, ..SimGuest::default() });
    host.set_guest(slow.id, SimGuest { on_powerdown: OnPowerdown::PowersOff(after), ..SimGuest::default() });
    host.set_guest(
        short.id,
        SimGuest { lifetime: SimLifetime::PowersOffAfter(after), ..SimGuest::default() },
    );
    host.set_guest(doomed.id, SimGuest { lifetime: SimLifetime::CrashesAfter(after), ..SimGuest::default() });
    let mut machines = Vec::new();
    for spec in [deaf, slow, short, doomed] {
        machines.push(start(&hypervisor, spec).await.unwrap());
    }
    for machine in &machines[..2] {
        machine.powerdown().await.unwrap();
        assert_eq!(machine.state().await.unwrap(), RunState::Running);
    }
    let report = machines[3].exited().await;
    assert_eq!(report.reason, ExitReason::Signal(11));
    tokio::time::sleep(after).await;
    assert_eq!(machines[0].state().await.unwrap(), RunState::Running);
    assert_eq!(machines[1].state().await.unwrap(), RunState::Shutdown);
    assert_eq!(machines[2].state().await.unwrap(), RunState::Shutdown);
}

#[tokio::test]
async fn disks_fail_and_hang_when_told() {
    let host = SimHost::default();
    let hypervisor = SimHypervisor::new(host.clone());
    let machine = start(&hypervisor, spec()).await.unwrap();
    let layers = vec![DiskLayer::new("/pool/a", DiskFormat::Qcow2).named("a0")];
    let disk = DiskSpec { id: "a".into(), layers, ..DiskSpec::default() };
    host.fail(SimOperation::DiskAttach, Some(machine.id()), 1, "no luck");
    let error = machine.disk_attach(disk.clone()).await.unwrap_err();
    assert_eq!(error.to_string(), "simulated failure: no luck");
    assert!(machine.disks().await.unwrap().is_empty());
    host.set_file_size("/pool/a", 5 << 20);
    machine.disk_attach(disk.clone()).await.unwrap();
    assert_eq!(machine.disks().await.unwrap()[0].virtual_size, 5 << 20);
    host.set_hanging(SimOperation::DiskDetach, Some(machine.id()), true);
    let detach = machine.disk_detach("a", Duration::ZERO);
    tokio::time::timeout(Duration::from_millis(20), detach).await.unwrap_err();
    host.clear_faults();
    machine.pause().await.unwrap();
    let kept = machine.disk_detach("a", Duration::ZERO).await.unwrap_err();
    assert!(matches!(kept, Error::Disk(DiskError::GuestDidNotRelease { .. })), "{kept:?}");
    machine.resume().await.unwrap();
    machine.disk_detach("a", Duration::ZERO).await.unwrap();
    machine.quit().await.unwrap();
    assert!(matches!(machine.disk_attach(disk).await, Err(Error::Ended { .. })));
}

#[tokio::test]
async fn half_started_machines_are_reported() {
    let host = SimHost::default();
    let hypervisor = SimHypervisor::new(host.clone());
    let id = Uuid::now_v7();
    host.leave_half_started(id);
    assert!(matches!(&hypervisor.survey().await.unwrap()[..], [Survey::HalfStarted { .. }]));
    hypervisor.kill(id).await.unwrap();
    hypervisor.forget(id).await.unwrap();
    assert_eq!(host.known(), 0);
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[tokio::test]
async fn ten_thousand_machines_are_cheap() {
    const COUNT: u64 = 10_000;
    let host = SimHost::default();
    let hypervisor = SimHypervisor::new(host.clone());
    let before = resident_bytes();
    for _ in 0..COUNT {
        drop(start(&hypervisor, spec()).await.unwrap());
    }
    assert_eq!(host.living(), 10_000);
    let each = (resident_bytes() - before) / COUNT;
    assert!(each < 1024, "{each} bytes for each machine");
    assert_eq!(
        tokio::runtime::Handle::current().metrics().num_alive_tasks(),
        0,
        "idle machines have no task"
    );
    assert_eq!(hypervisor.survey().await.unwrap().len(), 10_000);
}
