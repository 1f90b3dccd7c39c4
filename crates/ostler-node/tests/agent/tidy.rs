//! Chains stay short, and nobody waits for that.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ostler_api::vm_action::VmAction;
use ostler_api::{VmId, VolumeId};
use ostler_qemu::SimOperation;
use ostler_storage::Pool;

use crate::crash::When;
use crate::disks::writes_to_the_tops;
use crate::site::Site;

fn root(site: &Site, vm: VmId) -> VolumeId {
    site.plane.with(|inner| inner.vms[&vm].spec.disks[0].volume)
}

async fn depth(site: &Site, volume: VolumeId) -> u32 {
    site.pool.volume_info(volume.0).await.unwrap().unwrap().depth
}

async fn depth_is(site: &Site, volume: VolumeId, wanted: u32) {
    for _ in 0..10_000 {
        if depth(site, volume).await == wanted {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the chain has {} layers and not {wanted}", depth(site, volume).await);
}

#[tokio::test(start_paused = true)]
async fn two_hundred_rounds_leave_a_short_chain() {
    for running in [true, false] {
        let site = Site::new();
        let _agent = site.agent();
        let (plane, vm) = (&site.plane, site.plane.vm_create());
        if running {
            plane.done(vm, VmAction::Start).await;
        }
        for round in 0..200 {
            let snapshot = plane.snapshot_taken(vm).await;
            plane.snapshot_delete(snapshot);
            plane.snapshot_gone(snapshot).await;
            if round % 3 == 0 {
                tokio::time::sleep(Duration::from_secs(5)).await;
            }
            assert!(depth(&site, root(&site, vm)).await < 8, "round {round}");
            writes_to_the_tops(&site, vm).await;
        }
        depth_is(&site, root(&site, vm), 1).await;
        let live = site.counts.live_merges.load(Ordering::Relaxed) > 0;
        let closed = site.counts.merges.load(Ordering::Relaxed) > 0;
        assert_eq!((live, closed), (running, !running));
    }
}

#[tokio::test(start_paused = true)]
async fn a_start_interrupts_a_merge() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let snapshot = plane.snapshot_taken(vm).await;
    site.counts.merge_takes(Duration::from_secs(3000));
    plane.snapshot_delete(snapshot);
    plane.snapshot_gone(snapshot).await;
    let begun = || site.counts.merges.load(Ordering::Relaxed) > 0;
    crate::site::eventually("a merge", begun).await;
    let before = tokio::time::Instant::now();
    plane.done(vm, VmAction::Start).await;
    assert!(before.elapsed() < Duration::from_secs(10));
    writes_to_the_tops(&site, vm).await;
    assert_eq!(site.counts.torn.load(Ordering::Relaxed), 0);
    // Then the machine does it.
    depth_is(&site, root(&site, vm), 1).await;
    assert!(before.elapsed() < Duration::from_secs(300));
    writes_to_the_tops(&site, vm).await;
    assert!(site.counts.live_merges.load(Ordering::Relaxed) > 0);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_interrupts_a_merge_in_the_machine() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    let first = plane.snapshot_taken(vm).await;
    site.host.set_delay(SimOperation::DiskStream, Duration::from_secs(3000));
    plane.snapshot_delete(first);
    plane.snapshot_gone(first).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(depth(&site, root(&site, vm)).await, 2);
    let before = tokio::time::Instant::now();
    let second = plane.snapshot_taken(vm).await;
    assert!(before.elapsed() < Duration::from_secs(10));
    plane.done(vm, VmAction::Suspend).await;
    plane.done(vm, VmAction::Resume).await;
    site.host.clear_faults();
    plane.snapshot_delete(second);
    depth_is(&site, root(&site, vm), 1).await;
    writes_to_the_tops(&site, vm).await;
}

#[tokio::test(start_paused = true)]
async fn what_machines_share_waits_until_they_are_off() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm, other) = (&site.plane, site.plane.vm_create(), site.plane.vm_create());
    let first = plane.snapshot_taken(vm).await;
    let second = plane.snapshot_taken(vm).await;
    let copy = plane.volume_clone(second);
    plane.vm_change(other, |other| other.spec.disks[0].volume = copy);
    plane.done(vm, VmAction::Start).await;
    plane.done(other, VmAction::Start).await;
    plane.snapshot_delete(first);
    plane.snapshot_gone(first).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!((depth(&site, root(&site, vm)).await, depth(&site, copy).await), (3, 3));
    plane.done(vm, VmAction::Stop).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(depth(&site, copy).await, 3);
    plane.done(other, VmAction::Stop).await;
    depth_is(&site, copy, 2).await;
    assert_eq!(depth(&site, root(&site, vm)).await, 2);
}

#[tokio::test(start_paused = true)]
async fn layers_in_the_middle_are_merged_while_it_runs() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    let mut taken = Vec::new();
    for _ in 0..5 {
        taken.push(plane.snapshot_taken(vm).await);
    }
    for snapshot in [taken[1], taken[2], taken[3]] {
        plane.snapshot_delete(snapshot);
        plane.snapshot_gone(snapshot).await;
    }
    // Two snapshots' layers, one that is kept between them, and the top.
    depth_is(&site, root(&site, vm), 4).await;
    writes_to_the_tops(&site, vm).await;
    plane.done(vm, VmAction::Stop).await;
    depth_is(&site, root(&site, vm), 3).await;
}

#[tokio::test(start_paused = true)]
async fn a_merge_that_fails_is_tried_again_and_harms_nobody() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    site.host.fail(SimOperation::DiskStream, None, 3, "no");
    let snapshot = plane.snapshot_taken(vm).await;
    plane.snapshot_delete(snapshot);
    plane.snapshot_gone(snapshot).await;
    depth_is(&site, root(&site, vm), 1).await;
    assert_eq!(plane.observed(vm).unwrap().fault, None);
}

/// Two snapshots come and go, with an agent that dies at a call. Returns the calls.
async fn play(running: bool, last: Option<(usize, When)>) -> usize {
    let site = Site::new();
    let plane = &site.plane;
    let first = site.mortal_agent(last);
    let life = Arc::clone(&first.life);
    let told = async {
        let vm = plane.vm_create();
        if running {
            plane.done(vm, VmAction::Start).await;
        }
        let taken = [plane.snapshot_taken(vm).await, plane.snapshot_taken(vm).await];
        for snapshot in taken {
            plane.snapshot_delete(snapshot);
            plane.snapshot_gone(snapshot).await;
        }
        depth_is(&site, root(&site, vm), 1).await;
        plane.done(vm, VmAction::Start).await;
        writes_to_the_tops(&site, vm).await;
        plane.snapshot_taken(vm).await;
        writes_to_the_tops(&site, vm).await;
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

#[tokio::test(start_paused = true)]
async fn killed_anywhere_nothing_is_lost() {
    for running in [true, false] {
        let calls = play(running, None).await;
        for call in 0..calls {
            for when in [When::Before, When::After] {
                play(running, Some((call, when))).await;
            }
        }
    }
}
