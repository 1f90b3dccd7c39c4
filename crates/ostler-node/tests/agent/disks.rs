//! Disks that come, go and grow while a VM runs.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::vm_action::VmAction;
use ostler_api::volume::VolumePhase;
use ostler_api::work::TaskOutcome;
use ostler_api::{ByteSize, Time, VmId, VolumeId};
use ostler_qemu::{Hypervisor, Machine, SimGuest, SimHypervisor, SimOperation, Survey};
use ostler_storage::{Pool, SimFaults, StorageError};

use crate::crash::tail;
use crate::site::{Site, eventually};

/// What QEMU has as the tops of a VM's disks, by disk.
pub(crate) async fn tops(site: &Site, vm: VmId) -> Vec<(String, Option<String>)> {
    match machine(site, vm).await {
        Some(machine) => machine.disks().await.unwrap().into_iter().map(|disk| (disk.id, disk.top)).collect(),
        None => Vec::new(),
    }
}

pub(crate) async fn machine(site: &Site, vm: VmId) -> Option<Arc<dyn Machine>> {
    let found = SimHypervisor::new(site.host.clone()).survey().await.unwrap();
    found.into_iter().find_map(|survey| match survey {
        Survey::Running(machine) if machine.id() == vm.0 => Some(machine),
        _ => None,
    })
}

/// Each open disk of a VM writes to the layer that is its volume's top.
pub(crate) async fn writes_to_the_tops(site: &Site, vm: VmId) {
    for (disk, top) in tops(site, vm).await {
        let volumes = site.pool.volume_list().await.unwrap();
        let volume = volumes.into_iter().find(|volume| disk == format!("v{}", tail(*volume))).unwrap();
        let info = site.pool.volume_info(volume).await.unwrap().unwrap();
        assert_eq!(top, Some(tail(info.top)), "{disk}");
    }
}

pub(crate) async fn volume_ready(site: &Site) -> VolumeId {
    let volume = site.plane.volume_create(None);
    site.plane.volume_phase(volume, VolumePhase::Ready).await;
    volume
}

pub(crate) async fn attached(site: &Site, vm: VmId) -> VolumeId {
    let volume = volume_ready(site).await;
    let operation = site.plane.attach(vm, volume);
    assert_eq!(site.plane.outcome(operation).await, TaskOutcome::Done);
    volume
}

#[tokio::test(start_paused = true)]
async fn a_disk_comes_and_goes() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    let volume = attached(&site, vm).await;
    assert_eq!(tops(&site, vm).await.len(), 2);
    writes_to_the_tops(&site, vm).await;
    plane.done(vm, VmAction::Detach { volume }).await;
    assert_eq!(tops(&site, vm).await.len(), 1);
    // Nobody has it open any more.
    plane.volume_change(volume, |volume| volume.metadata.deleted = Some(Time::now()));
    plane.wait("its end", |inner| (!inner.volumes.contains_key(&volume)).then_some(())).await;
}

#[tokio::test(start_paused = true)]
async fn without_a_machine_the_next_start_takes_it_along() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    attached(&site, vm).await;
    plane.done(vm, VmAction::Start).await;
    assert_eq!(tops(&site, vm).await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_keeps_its_disk_keeps_it() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    site.host.set_guest(vm.0, SimGuest { keeps_disks: true, ..SimGuest::default() });
    plane.done(vm, VmAction::Start).await;
    let volume = attached(&site, vm).await;
    let fault = plane.failed(vm, VmAction::Detach { volume }).await;
    assert_eq!(fault.code, "guest_keeps_disk");
    assert_eq!(tops(&site, vm).await.len(), 2);
    // It is open, so that it is not deleted.
    plane.volume_change(volume, |volume| volume.metadata.deleted = Some(Time::now()));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(site.pool.volume_info(volume.0).await.unwrap().is_some());
    plane.done(vm, VmAction::Stop).await;
    plane.wait("its end", |inner| (!inner.volumes.contains_key(&volume)).then_some(())).await;
}

#[tokio::test(start_paused = true)]
async fn an_attach_that_fails_leaves_nothing_open() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    let volume = volume_ready(&site).await;
    site.host.fail(SimOperation::DiskAttach, None, 1, "no");
    let operation = plane.attach(vm, volume);
    assert!(matches!(plane.outcome(operation).await, TaskOutcome::Failed { .. }));
    plane.volume_change(volume, |volume| volume.metadata.deleted = Some(Time::now()));
    plane.wait("its end", |inner| (!inner.volumes.contains_key(&volume)).then_some(())).await;
}

#[tokio::test(start_paused = true)]
async fn an_attach_that_hangs_is_cut_off_by_a_stop_and_repeated_by_the_next_agent() {
    let site = Site::new();
    let agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    let volume = volume_ready(&site).await;
    site.host.set_hanging(SimOperation::DiskAttach, None, true);
    let operation = plane.attach(vm, volume);
    tokio::time::sleep(Duration::from_secs(1)).await;
    agent.kill().await;
    site.host.clear_faults();
    let _agent = site.agent();
    assert_eq!(plane.outcome(operation).await, TaskOutcome::Done);
    plane.done(vm, VmAction::Detach { volume }).await;
    site.host.set_hanging(SimOperation::DiskAttach, None, true);
    plane.attach(vm, volume);
    tokio::time::sleep(Duration::from_secs(1)).await;
    plane.done(vm, VmAction::Stop).await;
    assert_eq!(site.host.living(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_another_machine_has_open_is_refused() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, one, other) = (&site.plane, site.plane.vm_create(), site.plane.vm_create());
    plane.done(one, VmAction::Start).await;
    plane.done(other, VmAction::Start).await;
    let volume = attached(&site, one).await;
    let operation = plane.attach(other, volume);
    let TaskOutcome::Failed { fault } = plane.outcome(operation).await else { panic!("refused") };
    assert_eq!(fault.code, "volume_in_use");
    plane.disk_add(other, volume);
    plane.done(other, VmAction::Stop).await;
    assert_eq!(plane.failed(other, VmAction::Start).await.code, "volume_in_use");
    plane.done(one, VmAction::Stop).await;
    plane.done(other, VmAction::Start).await;
}

async fn grown(site: &Site, volume: VolumeId, size: ByteSize) {
    site.plane.volume_change(volume, |volume| volume.spec.size = size);
    let done = |inner: &crate::plane::Inner| (inner.volumes[&volume].status.size == Some(size)).then_some(());
    site.plane.wait("the new size", done).await;
}

#[tokio::test(start_paused = true)]
async fn a_disk_grows_closed_and_open() {
    let site = Site::new();
    let agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    let volume = attached(&site, vm).await;
    grown(&site, volume, ByteSize::gib(2)).await;
    let disks = machine(&site, vm).await.unwrap().disks().await.unwrap();
    let disk = disks.iter().find(|disk| disk.id == format!("v{}", tail(volume.0))).unwrap();
    assert_eq!(disk.virtual_size, ByteSize::gib(2).0);
    plane.done(vm, VmAction::Stop).await;
    grown(&site, volume, ByteSize::gib(3)).await;
    assert_eq!(site.pool.volume_info(volume.0).await.unwrap().unwrap().virtual_size, ByteSize::gib(3).0);
    // Grown, and not told any more.
    agent.kill().await;
    site.pool.volume_grow(volume.0, ByteSize::gib(4).0).await.unwrap();
    let _agent = site.agent();
    grown(&site, volume, ByteSize::gib(4)).await;
    assert_eq!(plane.with(|inner| inner.not_grown), 0);
}

#[tokio::test(start_paused = true)]
async fn growth_that_fails_is_told_and_the_size_stays() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let volume = plane.with(|inner| inner.vms[&vm].spec.disks[0].volume);
    plane.volume_phase(volume, VolumePhase::Ready).await;
    let full = |called: &'static str, _| {
        (called == "volume_grow").then(|| StorageError::NoSpace { path: "/pool".into() })
    };
    site.pool.set_faults(SimFaults { fault: Some(Arc::new(full)), ..SimFaults::default() });
    plane.volume_change(volume, |volume| volume.spec.size = ByteSize::gib(2));
    plane.wait("the answer", |inner| (inner.not_grown == 1).then_some(())).await;
    site.pool.set_faults(SimFaults::default());
    plane.done(vm, VmAction::Start).await;
    site.host.fail(SimOperation::DiskResize, None, 1, "no");
    plane.volume_change(volume, |volume| volume.spec.size = ByteSize::gib(2));
    plane.wait("the answer", |inner| (inner.not_grown == 2).then_some(())).await;
    assert_eq!(plane.with(|inner| inner.volumes[&volume].status.size), Some(ByteSize::mib(64)));
}

#[tokio::test(start_paused = true)]
async fn suspended_disks_keep_their_places() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    let first = attached(&site, vm).await;
    attached(&site, vm).await;
    // Leaves a hole.
    plane.done(vm, VmAction::Detach { volume: first }).await;
    let places = async || {
        let disks = machine(&site, vm).await.unwrap().disks().await.unwrap();
        disks.into_iter().map(|disk| (disk.id, disk.place)).collect::<Vec<_>>()
    };
    let before = places().await;
    plane.done(vm, VmAction::Suspend).await;
    plane.done(vm, VmAction::Resume).await;
    assert_eq!(places().await, before);
    eventually("one machine", || site.host.living() == 1).await;
}
