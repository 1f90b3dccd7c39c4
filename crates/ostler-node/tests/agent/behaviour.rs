//! How volumes behave: limits that change while a machine runs, and flattening.

use std::time::Duration;

use ostler_api::disk::DiskLimits;
use ostler_api::snapshot::SnapshotPhase;
use ostler_api::vm_action::VmAction;
use ostler_api::volume::VolumePhase;
use ostler_api::{OperationId, VolumeId};
use ostler_qemu::{Hypervisor, SimHypervisor, Survey};
use ostler_storage::Pool;

use crate::site::{Site, eventually};

/// Operations a second that the VM's only machine allows its first disk.
async fn limit(site: &Site) -> u64 {
    let hypervisor = SimHypervisor::new(site.host.clone());
    let found = hypervisor.survey().await.unwrap();
    let Some(Survey::Running(machine)) = found.into_iter().next() else { panic!("no machine") };
    machine.disks().await.unwrap()[0].limits.iops_total.sustained
}

#[tokio::test(start_paused = true)]
async fn limits_are_there_from_the_start_and_follow_every_change() {
    let site = Site::new();
    let agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let volume = plane.with(|inner| inner.vms[&vm].spec.disks[0].volume);
    let set = |iops| {
        plane.volume_change(volume, |volume| {
            volume.spec.limits = DiskLimits { iops, ..DiskLimits::default() }
        });
    };
    set(100);
    plane.done(vm, VmAction::Start).await;
    assert_eq!(limit(&site).await, 100);
    for iops in [200, 0, 300] {
        set(iops);
        for _ in 0..1000 {
            if limit(&site).await == iops {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(limit(&site).await, iops);
    }
    // Changed while the agent was away.
    agent.kill().await;
    set(400);
    let _agent = site.agent();
    for _ in 0..1000 {
        if limit(&site).await == 400 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the limit is {}", limit(&site).await);
}

/// A volume that stands on a snapshot of another; both are ready.
async fn copy(site: &Site) -> VolumeId {
    let plane = &site.plane;
    let source = crate::disks::volume_ready(site).await;
    let snapshot = plane.snapshot_create(None, &[source]);
    plane.snapshot_phase(snapshot, SnapshotPhase::Ready).await;
    let copy = plane.volume_clone(snapshot);
    plane.volume_phase(copy, VolumePhase::Ready).await;
    copy
}

async fn depth(site: &Site, volume: VolumeId) -> u32 {
    site.pool.volume_info(volume.0).await.unwrap().unwrap().depth
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_flattened_by_the_pool() {
    let site = Site::new();
    let _agent = site.agent();
    let volume = copy(&site).await;
    assert_eq!(depth(&site, volume).await, 2);
    let operation = OperationId::new();
    site.plane.volume_change(volume, |volume| volume.status.flatten = Some(operation));
    site.plane.wait("its end", |inner| inner.volumes[&volume].status.flatten.is_none().then_some(())).await;
    assert_eq!(depth(&site, volume).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_copy_is_flattened_by_its_machine_and_by_the_next_agent() {
    let site = Site::new();
    let agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let volume = copy(&site).await;
    plane.vm_change(vm, |vm| vm.spec.disks[0].volume = volume);
    plane.done(vm, VmAction::Start).await;
    agent.kill().await;
    plane.volume_change(volume, |volume| volume.status.flatten = Some(OperationId::new()));
    let _agent = site.agent();
    plane.wait("its end", |inner| inner.volumes[&volume].status.flatten.is_none().then_some(())).await;
    plane.done(vm, VmAction::Stop).await;
    plane.done(vm, VmAction::Start).await;
}

/// Nobody waits for a flatten: the start gets the volume, and QEMU goes on with it.
#[tokio::test(start_paused = true)]
async fn a_start_interrupts_the_pools_flatten() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let volume = copy(&site).await;
    plane.vm_change(vm, |vm| vm.spec.disks[0].volume = volume);
    site.counts.merge_takes(Duration::from_secs(100_000));
    plane.volume_change(volume, |volume| volume.status.flatten = Some(OperationId::new()));
    tokio::time::sleep(Duration::from_secs(30)).await;
    let begun = tokio::time::Instant::now();
    plane.done(vm, VmAction::Start).await;
    assert!(begun.elapsed() < Duration::from_secs(1000));
    plane.wait("its end", |inner| inner.volumes[&volume].status.flatten.is_none().then_some(())).await;
    eventually("the machine runs", || plane.with(|inner| inner.vms[&vm].status.task.is_none())).await;
}
