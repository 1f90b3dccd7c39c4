//! Snapshots: whole or taken back, whatever fails and wherever the agent ends, and never a lost layer.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::snapshot::SnapshotPhase;
use ostler_api::vm_action::VmAction;
use ostler_api::volume::VolumePhase;
use ostler_api::{SnapshotId, VmId, VolumeId};
use ostler_qemu::SimOperation;
use ostler_storage::{Pool, SimFaults, StorageError};

use crate::crash::{When, tail};
use crate::disks::{attached, tops, writes_to_the_tops};
use crate::site::Site;

/// Parts in the pool: committed and only prepared.
async fn parts(site: &Site) -> (usize, usize) {
    let all = site.pool.snapshot_list().await.unwrap();
    (all.iter().filter(|part| !part.prepared).count(), all.iter().filter(|part| part.prepared).count())
}

async fn two_disks(site: &Site, running: bool) -> VmId {
    let vm = site.plane.vm_create();
    if running {
        site.plane.done(vm, VmAction::Start).await;
    }
    attached(site, vm).await;
    vm
}

async fn top(site: &Site, volume: VolumeId) -> uuid::Uuid {
    site.pool.volume_info(volume.0).await.unwrap().unwrap().top
}

fn layer(site: &Site, snapshot: SnapshotId, disk: usize) -> uuid::Uuid {
    site.plane.with(|inner| inner.snapshots[&snapshot].spec.disks[disk].layer)
}

fn root(site: &Site, vm: VmId) -> VolumeId {
    site.plane.with(|inner| inner.vms[&vm].spec.disks[0].volume)
}

fn fails(site: &Site, call: &'static str, volume: Option<VolumeId>) {
    let fault = move |called: &'static str, of: Option<uuid::Uuid>| {
        let meant = called == call && volume.is_none_or(|volume| of == Some(volume.0));
        meant.then(|| StorageError::NoSpace { path: "/pool".into() })
    };
    site.pool.set_faults(SimFaults { fault: Some(Arc::new(fault)), ..SimFaults::default() });
}

#[tokio::test(start_paused = true)]
async fn of_a_running_vm_and_of_a_stopped_one() {
    for running in [true, false] {
        let site = Site::new();
        let _agent = site.agent();
        let vm = two_disks(&site, running).await;
        let snapshot = site.plane.snapshot_taken(vm).await;
        assert_eq!(parts(&site).await, (2, 0));
        assert_eq!(top(&site, root(&site, vm)).await, layer(&site, snapshot, 0));
        assert_eq!(tops(&site, vm).await.len(), if running { 2 } else { 0 });
        writes_to_the_tops(&site, vm).await;
        site.plane.done(vm, VmAction::Start).await;
        writes_to_the_tops(&site, vm).await;
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_volume_on_its_own_and_a_linked_copy_of_it() {
    let site = Site::new();
    let _agent = site.agent();
    let plane = &site.plane;
    let volume = crate::disks::volume_ready(&site).await;
    let snapshot = plane.snapshot_create(None, &[volume]);
    plane.snapshot_phase(snapshot, SnapshotPhase::Ready).await;
    let copy = plane.volume_clone(snapshot);
    plane.volume_phase(copy, VolumePhase::Ready).await;
    let layers = site.pool.volume_layers(copy.0).await.unwrap();
    assert_eq!(layers.last().unwrap().id(), Some(volume.0));
    // It stands on the snapshot's layer, which stays when the snapshot and the volume go.
    plane.snapshot_delete(snapshot);
    plane.snapshot_gone(snapshot).await;
    assert!(site.pool.volume_layers(copy.0).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn when_the_second_disk_cannot_be_prepared_the_first_is_taken_back() {
    for running in [true, false] {
        let site = Site::new();
        let _agent = site.agent();
        let vm = two_disks(&site, running).await;
        let second = site.plane.with(|inner| inner.vms[&vm].spec.disks[1].volume);
        fails(&site, "snapshot_prepare", Some(second));
        let snapshot = site.plane.snapshot_vm(vm);
        let failed = site.plane.snapshot_phase(snapshot, SnapshotPhase::Error).await;
        assert_eq!(failed.status.reason.unwrap().code, "no_space");
        site.pool.set_faults(SimFaults::default());
        assert_eq!(parts(&site).await, (0, 0), "running {running}");
        writes_to_the_tops(&site, vm).await;
        site.plane.snapshot_taken(vm).await;
        writes_to_the_tops(&site, vm).await;
    }
}

#[tokio::test(start_paused = true)]
async fn when_qemu_refuses_nothing_is_left() {
    let site = Site::new();
    let _agent = site.agent();
    let vm = two_disks(&site, true).await;
    site.host.fail(SimOperation::DiskSnapshot, None, 1, "no");
    let snapshot = site.plane.snapshot_vm(vm);
    site.plane.snapshot_phase(snapshot, SnapshotPhase::Error).await;
    assert_eq!(parts(&site).await, (0, 0));
    writes_to_the_tops(&site, vm).await;
    site.plane.snapshot_delete(snapshot);
    site.plane.snapshot_gone(snapshot).await;
}

#[tokio::test(start_paused = true)]
async fn when_qemu_does_not_say_it_is_asked_until_it_does() {
    let site = Site::new();
    let _agent = site.agent();
    let vm = two_disks(&site, true).await;
    site.host.set_hanging(SimOperation::DiskSnapshot, None, true);
    let snapshot = site.plane.snapshot_vm(vm);
    tokio::time::sleep(Duration::from_secs(1)).await;
    site.host.set_hanging(SimOperation::Disks, None, true);
    tokio::time::sleep(Duration::from_secs(100)).await;
    let phase = site.plane.with(|inner| inner.snapshots[&snapshot].status.phase);
    assert_eq!((phase, parts(&site).await), (SnapshotPhase::Creating, (0, 2)));
    site.host.clear_faults();
    site.plane.snapshot_phase(snapshot, SnapshotPhase::Ready).await;
    assert_eq!(parts(&site).await, (2, 0));
    writes_to_the_tops(&site, vm).await;
}

#[tokio::test(start_paused = true)]
async fn past_its_deadline_it_is_taken_back_in_silence() {
    let site = Site::new();
    let _agent = site.agent();
    let vm = two_disks(&site, true).await;
    site.host.set_hanging(SimOperation::DiskSnapshot, None, true);
    let snapshot = site.plane.snapshot_vm(vm);
    tokio::time::sleep(Duration::from_secs(1)).await;
    site.host.set_hanging(SimOperation::Disks, None, true);
    tokio::time::sleep(Duration::from_secs(120)).await;
    site.plane.snapshot_change(snapshot, |snapshot| snapshot.status.phase = SnapshotPhase::Error);
    site.host.clear_faults();
    tokio::time::sleep(Duration::from_secs(120)).await;
    assert_eq!((site.plane.with(|inner| inner.not_taken), parts(&site).await), (0, (0, 0)));
    writes_to_the_tops(&site, vm).await;
    site.plane.snapshot_taken(vm).await;
}

#[tokio::test(start_paused = true)]
async fn when_qemu_dies_in_the_middle_it_is_finished() {
    let site = Site::new();
    let _agent = site.agent();
    let vm = two_disks(&site, true).await;
    site.host.set_delay(SimOperation::DiskSnapshot, Duration::from_secs(5));
    let snapshot = site.plane.snapshot_vm(vm);
    tokio::time::sleep(Duration::from_secs(1)).await;
    site.host.crash(vm.0, 9);
    site.plane.snapshot_phase(snapshot, SnapshotPhase::Ready).await;
    assert_eq!(parts(&site).await, (2, 0));
    site.plane.done(vm, VmAction::Start).await;
    writes_to_the_tops(&site, vm).await;
}

#[tokio::test(start_paused = true)]
async fn back_to_a_snapshot_only_when_it_is_off() {
    let site = Site::new();
    let _agent = site.agent();
    let plane = &site.plane;
    let vm = two_disks(&site, true).await;
    let first = plane.snapshot_taken(vm).await;
    plane.snapshot_taken(vm).await;
    let fault = plane.reverted(plane.snapshot_revert(first)).await.unwrap();
    assert_eq!(fault.code, "volume_in_use");
    plane.done(vm, VmAction::Stop).await;
    assert_eq!(plane.reverted(plane.snapshot_revert(first)).await, None);
    plane.done(vm, VmAction::Start).await;
    writes_to_the_tops(&site, vm).await;
    let frozen = site.pool.snapshot_list().await.unwrap();
    let part = plane.with(|inner| inner.snapshots[&first].spec.disks[0].part);
    let frozen = frozen.iter().find(|one| one.id == part).unwrap().layer;
    assert_eq!(site.pool.volume_layers(root(&site, vm).0).await.unwrap()[1].id(), Some(frozen));
}

#[tokio::test(start_paused = true)]
async fn any_of_a_tree_is_deleted() {
    let site = Site::new();
    let _agent = site.agent();
    let plane = &site.plane;
    let vm = two_disks(&site, true).await;
    let mut taken = Vec::new();
    for _ in 0..3 {
        taken.push(plane.snapshot_taken(vm).await);
    }
    for snapshot in [taken[1], taken[0], taken[2]] {
        plane.snapshot_delete(snapshot);
        plane.snapshot_gone(snapshot).await;
        writes_to_the_tops(&site, vm).await;
    }
    assert_eq!(parts(&site).await, (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_is_not_adopted_yet_is_not_taken_for_none() {
    let site = Site::new();
    let agent = site.agent();
    let vm = two_disks(&site, true).await;
    agent.kill().await;
    site.host.set_hanging(SimOperation::State, None, true);
    let _agent = site.agent();
    let snapshot = site.plane.snapshot_vm(vm);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(parts(&site).await, (0, 0));
    site.host.clear_faults();
    site.plane.snapshot_phase(snapshot, SnapshotPhase::Ready).await;
    assert_eq!(parts(&site).await, (2, 0));
    writes_to_the_tops(&site, vm).await;
}

#[tokio::test(start_paused = true)]
async fn a_volume_may_come_to_a_vm_at_any_moment_of_its_snapshot() {
    for millis in (0..4000).step_by(250) {
        let site = Site::new();
        let _agent = site.agent();
        let (plane, vm) = (&site.plane, site.plane.vm_create());
        plane.done(vm, VmAction::Start).await;
        let volume = crate::disks::volume_ready(&site).await;
        site.pool.set_faults(SimFaults { delay: Duration::from_millis(500), ..SimFaults::default() });
        let snapshot = plane.snapshot_create(None, &[volume]);
        tokio::time::sleep(Duration::from_millis(millis)).await;
        let attached = plane.attach(vm, volume);
        assert_eq!(plane.outcome(attached).await, ostler_api::work::TaskOutcome::Done);
        plane.snapshot_phase(snapshot, SnapshotPhase::Ready).await;
        writes_to_the_tops(&site, vm).await;
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Story {
    Running,
    Stopped,
    QemuDies,
    Revert,
    Delete,
}

/// Plays a story with an agent that dies at a call, and another one after it. Returns the first one's calls.
async fn play(story: Story, last: Option<(usize, When)>) -> usize {
    let site = Site::new();
    let plane = &site.plane;
    let first = site.mortal_agent(last);
    let life = Arc::clone(&first.life);
    let told = async {
        let vm = two_disks(&site, story != Story::Stopped).await;
        if story == Story::QemuDies {
            site.host.set_delay(SimOperation::DiskSnapshot, Duration::from_secs(2));
        }
        let snapshot = plane.snapshot_vm(vm);
        if story == Story::QemuDies {
            tokio::time::sleep(Duration::from_secs(1)).await;
            site.host.crash(vm.0, 9);
        }
        plane
            .wait("the end", |inner| {
                let phase = inner.snapshots[&snapshot].status.phase;
                (phase != SnapshotPhase::Creating).then_some(())
            })
            .await;
        let (whole, prepared) = parts(&site).await;
        assert_eq!(prepared, 0, "{story:?} {last:?}");
        let ready = plane.with(|inner| inner.snapshots[&snapshot].status.phase) == SnapshotPhase::Ready;
        assert_eq!(whole, if ready { 2 } else { 0 }, "{story:?} {last:?}");
        assert!(ready, "{story:?} {last:?}");
        writes_to_the_tops(&site, vm).await;
        match story {
            Story::Revert => {
                plane.done(vm, VmAction::Stop).await;
                let back = plane.reverted(plane.snapshot_revert(snapshot)).await;
                assert_eq!(back, None, "{last:?}");
            }
            Story::Delete => {
                plane.snapshot_delete(snapshot);
                plane.snapshot_gone(snapshot).await;
                assert_eq!(parts(&site).await, (0, 0));
            }
            Story::Running | Story::Stopped | Story::QemuDies => {}
        }
        plane.done(vm, VmAction::Start).await;
        writes_to_the_tops(&site, vm).await;
        for disk in plane.with(|inner| inner.vms[&vm].spec.disks.clone()) {
            // The layer that the volume began with is below it still, or merged into what is there.
            let layers = site.pool.volume_layers(disk.volume.0).await.unwrap();
            if story != Story::Delete {
                assert_eq!(layers.last().unwrap().id(), Some(disk.volume.0), "{story:?} {last:?}");
            }
        }
    };
    tokio::pin!(told);
    let _agent = tokio::select! {
        () = &mut told => first,
        () = life.ended.notified() => {
            first.kill().await;
            let second = site.agent();
            told.await;
            second
        }
    };
    assert!(site.pool.audit().await.unwrap().broken.is_empty());
    life.calls()
}

async fn everywhere(story: Story) {
    let calls = play(story, None).await;
    assert!(calls > 10);
    for call in 0..calls {
        for when in [When::Before, When::After] {
            play(story, Some((call, when))).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn cut_off_anywhere_running() {
    everywhere(Story::Running).await;
}

#[tokio::test(start_paused = true)]
async fn cut_off_anywhere_stopped() {
    everywhere(Story::Stopped).await;
}

#[tokio::test(start_paused = true)]
async fn cut_off_anywhere_while_qemu_dies() {
    everywhere(Story::QemuDies).await;
}

#[tokio::test(start_paused = true)]
async fn cut_off_anywhere_in_a_revert() {
    everywhere(Story::Revert).await;
}

#[tokio::test(start_paused = true)]
async fn cut_off_anywhere_in_a_delete() {
    everywhere(Story::Delete).await;
}

#[tokio::test(start_paused = true)]
async fn layers_have_names_that_qemu_takes() {
    let site = Site::new();
    let _agent = site.agent();
    let vm = two_disks(&site, true).await;
    let snapshot = site.plane.snapshot_taken(vm).await;
    let tops = tops(&site, vm).await;
    assert!(tops.iter().any(|(_, top)| *top == Some(tail(layer(&site, snapshot, 1)))), "{tops:?}");
}
