//! Volumes: made once, deleted when nobody has them open, never made again when they are lost.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::Time;
use ostler_api::vm_action::VmAction;
use ostler_api::volume::VolumePhase;
use ostler_storage::{Pool, SimFaults, StorageError};

use crate::site::{Site, eventually};

#[tokio::test(start_paused = true)]
async fn made_reported_deleted() {
    let site = Site::new();
    let _agent = site.agent();
    let plane = &site.plane;
    let volume = plane.volume_create(None);
    plane.volume_phase(volume, VolumePhase::Ready).await;
    assert!(site.pool.volume_info(volume.0).await.unwrap().is_some());
    plane.volume_change(volume, |volume| volume.metadata.deleted = Some(Time::now()));
    plane.wait("its end", |inner| inner.volumes.is_empty().then_some(())).await;
    assert!(site.pool.volume_info(volume.0).await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_volume_in_use_is_deleted_when_it_is_free() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    let volume = plane.with(|inner| inner.vms[&vm].spec.disks[0].volume);
    plane.volume_change(volume, |volume| volume.metadata.deleted = Some(Time::now()));
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(site.pool.volume_info(volume.0).await.unwrap().is_some());
    plane.done(vm, VmAction::Stop).await;
    plane.wait("its end", |inner| inner.volumes.is_empty().then_some(())).await;
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_was_lost_does_not_come_back_blank() {
    let site = Site::new();
    let agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    plane.done(vm, VmAction::Stop).await;
    let volume = plane.with(|inner| inner.vms[&vm].spec.disks[0].volume);
    agent.kill().await;
    site.pool.volume_delete(volume.0).await.unwrap();
    let _agent = site.agent();
    for _ in 0..2 {
        let fault = plane.failed(vm, VmAction::Start).await;
        assert_eq!(fault.code, "volume_missing");
        plane.volume_phase(volume, VolumePhase::Error).await;
    }
    assert!(site.pool.volume_info(volume.0).await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_delete_that_fails_goes_on() {
    let site = Site::new();
    let _agent = site.agent();
    let plane = &site.plane;
    let volume = plane.volume_create(None);
    plane.volume_phase(volume, VolumePhase::Ready).await;
    let fault = |called: &'static str, _| {
        (called == "volume_delete").then(|| StorageError::Busy { what: "the volume".into() })
    };
    site.pool.set_faults(SimFaults { fault: Some(Arc::new(fault)), ..SimFaults::default() });
    plane.volume_change(volume, |volume| volume.metadata.deleted = Some(Time::now()));
    plane
        .wait("a reason", |inner| {
            inner.volumes[&volume].status.reason.as_ref().filter(|fault| fault.code == "busy").map(drop)
        })
        .await;
    site.pool.set_faults(SimFaults::default());
    plane.wait("its end", |inner| inner.volumes.is_empty().then_some(())).await;
}

#[tokio::test(start_paused = true)]
async fn volumes_that_are_not_listed_go_only_with_their_own_cloud() {
    let site = Site::new();
    let agent = site.agent();
    let plane = &site.plane;
    let ours = plane.volume_create(None);
    plane.volume_phase(ours, VolumePhase::Ready).await;
    // Of somebody else, or from before anything was recorded.
    let foreign = ostler_storage::NewVolume {
        id: uuid::Uuid::now_v7(),
        size: 512,
        source: ostler_storage::VolumeSource::Blank,
    };
    site.pool.volume_create(&foreign).await.unwrap();
    agent.kill().await;
    let (cloud, volumes) = plane.with(|inner| {
        let cloud = std::mem::replace(&mut inner.cloud, uuid::Uuid::now_v7());
        (cloud, std::mem::take(&mut inner.volumes))
    });
    let agent = site.agent();
    plane.connected().await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(site.pool.volume_list().await.unwrap().len(), 2);
    agent.kill().await;

    drop(volumes);
    plane.with(|inner| inner.cloud = cloud);
    let _agent = site.agent();
    let pool = &site.pool;
    eventually("the end of ours", || {
        futures::FutureExt::now_or_never(pool.volume_list()).unwrap().unwrap() == [foreign.id]
    })
    .await;
}
