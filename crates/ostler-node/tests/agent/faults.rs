//! Every driver call that fails: the answer says why, nothing is left over, and the same again works.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::vm::MachineState;
use ostler_api::vm_action::VmAction;
use ostler_api::work::TaskOutcome;
use ostler_qemu::SimOperation;
use ostler_storage::{SimFaults, StorageError};

use crate::plane::image;
use crate::site::{Site, eventually};

fn fail(site: &Site, operation: &'static str) {
    let fault = move |called: &'static str, _| {
        (called == operation).then(|| StorageError::NoSpace { path: "/pool".into() })
    };
    site.pool.set_faults(SimFaults { fault: Some(Arc::new(fault)), ..SimFaults::default() });
}

#[tokio::test(start_paused = true)]
async fn a_start_that_fails_leaves_nothing_and_works_later() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    site.host.fail(SimOperation::Start, None, 1, "no memory today");
    let fault = plane.failed(vm, VmAction::Start).await;
    assert!(fault.message.contains("no memory today"), "{}", fault.message);
    let seen = plane.observed(vm).unwrap();
    assert_eq!((seen.state, seen.fault, site.host.known()), (MachineState::Absent, Some(fault), 0));
    plane.done(vm, VmAction::Start).await;
    assert_eq!(plane.observed(vm).unwrap().fault, None);
}

#[tokio::test(start_paused = true)]
async fn a_start_that_hangs_ends_in_time() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    site.host.set_hanging(SimOperation::Start, Some(vm.0), true);
    assert_eq!(plane.failed(vm, VmAction::Start).await.code, "start_timeout");
    site.host.clear_faults();
    plane.done(vm, VmAction::Start).await;
}

#[tokio::test(start_paused = true)]
async fn commands_that_fail_leave_the_guest_as_it_was() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    for (operation, action) in [
        (SimOperation::Pause, VmAction::Pause),
        (SimOperation::Reset, VmAction::Reset),
        (SimOperation::Save, VmAction::Suspend),
    ] {
        site.host.fail(operation, Some(vm.0), 1, "not now");
        let fault = plane.failed(vm, action.clone()).await;
        assert!(fault.message.contains("not now"), "{}", fault.message);
        assert_eq!(plane.observed(vm).unwrap().state, MachineState::Running, "{}", action.name());
    }
    plane.done(vm, VmAction::Suspend).await;
}

#[tokio::test(start_paused = true)]
async fn a_restore_that_fails_keeps_the_memory() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    plane.done(vm, VmAction::Suspend).await;
    site.host.fail(SimOperation::Start, None, 1, "not now");
    plane.failed(vm, VmAction::Start).await;
    assert_eq!(plane.observed(vm).unwrap().state, MachineState::Saved);
    let state = site.dir.path().join("vms").join(vm.to_string()).join("state");
    assert!(state.exists());

    // Damaged memory stays too; a stop drops it, and a cold start works then.
    std::fs::write(&state, b"damaged").unwrap();
    assert_eq!(plane.failed(vm, VmAction::Resume).await.code, "restore_failed");
    assert_eq!(plane.observed(vm).unwrap().state, MachineState::Saved);
    plane.done(vm, VmAction::Stop).await;
    assert!(!state.exists());
    plane.done(vm, VmAction::Start).await;
}

#[tokio::test(start_paused = true)]
async fn force_is_used_where_order_fails() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    site.host.fail(SimOperation::Quit, None, 100, "no");
    site.host.fail(SimOperation::Powerdown, None, 100, "no");
    plane.done(vm, VmAction::Shutdown { timeout: 20, force: true }).await;
    assert_eq!(site.host.living(), 0);
    plane.done(vm, VmAction::Start).await;
    plane.done(vm, VmAction::Stop).await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_cannot_be_killed_is_said_and_tried_again() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    site.host.fail(SimOperation::Quit, None, u32::MAX, "no");
    site.host.fail(SimOperation::Kill, None, u32::MAX, "hangs in the kernel");
    let fault = plane.failed(vm, VmAction::Stop).await;
    assert!(fault.message.contains("hangs in the kernel"), "{}", fault.message);
    // A delete goes on until it is done.
    let delete = plane.act(vm, VmAction::Delete);
    plane
        .wait("a word on why", |inner| {
            let said = |outcome: &TaskOutcome| matches!(outcome, TaskOutcome::Failed { .. });
            inner.answers.iter().any(|(op, _, outcome)| *op == delete && said(outcome)).then_some(())
        })
        .await;
    site.host.clear_faults();
    plane.wait("its end", |inner| (!inner.vms.contains_key(&vm)).then_some(())).await;
    assert_eq!(site.host.known(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_full_pool_fails_the_volume_and_the_start_and_a_retry_works() {
    let site = Site::new();
    let _agent = site.agent();
    let plane = &site.plane;
    fail(&site, "volume_create");
    let vm = plane.vm_create();
    assert_eq!(plane.failed(vm, VmAction::Start).await.code, "no_space");
    let volume = plane.with(|inner| inner.vms[&vm].spec.disks[0].volume);
    let seen = plane.volume_phase(volume, ostler_api::volume::VolumePhase::Error).await;
    assert_eq!(seen.status.reason.unwrap().code, "no_space");
    site.pool.set_faults(SimFaults::default());
    plane.done(vm, VmAction::Start).await;
    plane.volume_phase(volume, ostler_api::volume::VolumePhase::Ready).await;
}

#[tokio::test(start_paused = true)]
async fn an_image_that_cannot_be_had_fails_the_start_with_its_name() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.vm_change(vm, |vm| vm.spec.cdrom = Some(image()));
    let fault = plane.failed(vm, VmAction::Start).await;
    assert_eq!(fault.code, "image_unavailable");
    assert!(fault.message.contains(&image().sha256));
}

#[tokio::test(start_paused = true)]
async fn an_image_of_the_same_host_is_linked() {
    let mut site = Site::new();
    let store = site.dir.path().join("store");
    std::fs::create_dir(&store).unwrap();
    std::fs::write(store.join(format!("{}.qcow2", image().sha256)), b"").unwrap();
    site.config.image_source = Some(store);
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let volume = plane.volume_create(Some(image()));
    plane.vm_change(vm, |vm| vm.spec.disks[0].volume = volume);
    plane.done(vm, VmAction::Start).await;
    assert_eq!(plane.with(|inner| inner.images_sent), 0);
}

#[tokio::test(start_paused = true)]
async fn lost_reports_are_sent_again() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    for lose in [
        (|inner: &mut crate::plane::Inner| inner.reports_lost = 3) as fn(&mut crate::plane::Inner),
        |inner| inner.replies_lost = 3,
        |inner| (inner.reports_lost, inner.replies_lost) = (1, 1),
    ] {
        plane.with(lose);
        plane.done(vm, VmAction::Start).await;
        plane.with(lose);
        plane.done(vm, VmAction::Stop).await;
    }
    assert_eq!(site.counts.starts.load(std::sync::atomic::Ordering::Relaxed), 3);
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_that_is_away_stops_no_vm() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let other = plane.vm_create();
    plane.done(vm, VmAction::Start).await;
    plane.done(other, VmAction::Start).await;
    plane.with(|inner| inner.down = true);
    plane.cut();
    tokio::time::sleep(Duration::from_secs(120)).await;
    site.host.guest_power_off(other.0);
    eventually("its end", || site.host.known() == 1).await;
    plane.with(|inner| inner.down = false);
    plane.state(other, MachineState::Absent).await;
    plane.done(vm, VmAction::Pause).await;
}

#[tokio::test(start_paused = true)]
async fn a_survey_that_fails_is_repeated_before_anything_is_started() {
    let site = Site::new();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    site.host.fail(SimOperation::Survey, None, 3, "no");
    let start = plane.act(vm, VmAction::Start);
    let _agent = site.agent();
    assert_eq!(plane.outcome(start).await, TaskOutcome::Done);
}
