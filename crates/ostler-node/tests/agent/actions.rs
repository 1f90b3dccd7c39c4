//! Every action, as it goes when nothing goes wrong; and what supersedes what.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ostler_api::vm::{EndCause, MachineState};
use ostler_api::vm_action::VmAction;
use ostler_api::work::TaskOutcome;
use ostler_qemu::{OnPowerdown, SimGuest, SimOperation};

use crate::site::{Site, eventually};

const SHUTDOWN: VmAction = VmAction::Shutdown { timeout: 90, force: true };

#[tokio::test(start_paused = true)]
async fn a_vm_lives_through_all_its_actions() {
    let site = Site::new();
    let agent = site.agent();
    let plane = &site.plane;
    let vm = plane.vm_create();

    plane.done(vm, VmAction::Start).await;
    let facts = plane.observed(vm).unwrap().facts.unwrap();
    assert_eq!((plane.observed(vm).unwrap().state, site.host.living()), (MachineState::Running, 1));
    assert_eq!(facts.machine_version, "pc-q35-7.2");

    plane.done(vm, VmAction::Pause).await;
    assert_eq!(plane.observed(vm).unwrap().state, MachineState::Paused);
    plane.done(vm, VmAction::Resume).await;
    assert_eq!(plane.observed(vm).unwrap().state, MachineState::Running);

    plane.done(vm, VmAction::Reset).await;
    assert_eq!(plane.observed(vm).unwrap().facts.unwrap().boot, facts.boot);

    plane.done(vm, VmAction::Reboot { timeout: 90 }).await;
    let rebooted = plane.observed(vm).unwrap().facts.unwrap();
    assert_ne!(rebooted.boot, facts.boot);
    assert_ne!(rebooted.pid, facts.pid);

    plane.done(vm, VmAction::Suspend).await;
    let seen = plane.observed(vm).unwrap();
    assert_eq!((seen.state, seen.facts, site.host.living()), (MachineState::Saved, None, 0));
    plane.done(vm, VmAction::Start).await;
    assert_eq!(plane.observed(vm).unwrap().state, MachineState::Running);
    plane.done(vm, VmAction::Suspend).await;
    plane.done(vm, VmAction::Resume).await;
    assert_eq!(plane.observed(vm).unwrap().state, MachineState::Running);

    plane.done(vm, SHUTDOWN).await;
    let seen = plane.observed(vm).unwrap();
    assert_eq!((seen.state, seen.end, site.host.known()), (MachineState::Absent, Some(EndCause::Asked), 0));

    plane.done(vm, VmAction::Start).await;
    plane.done(vm, VmAction::Stop).await;
    assert_eq!((plane.observed(vm).unwrap().state, site.host.known()), (MachineState::Absent, 0));

    plane.done(vm, VmAction::Start).await;
    let old = plane.with(|inner| inner.vms[&vm].spec.disks[0].volume);
    let new = plane.volume_create(None);
    plane.done(vm, VmAction::Rebuild { volume: new }).await;
    assert_eq!(plane.observed(vm).unwrap().state, MachineState::Running);
    plane.wait("the end of the old disk", |inner| (!inner.volumes.contains_key(&old)).then_some(())).await;

    plane.done(vm, VmAction::Delete).await;
    assert_eq!(site.host.known(), 0);
    plane.wait("the end of the volumes", |inner| inner.volumes.is_empty().then_some(())).await;
    agent.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_so_already_is_done_at_once() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Stop).await;
    plane.done(vm, SHUTDOWN).await;
    for action in [VmAction::Start, VmAction::Start, VmAction::Resume] {
        plane.done(vm, action).await;
    }
    for _ in 0..2 {
        plane.done(vm, VmAction::Pause).await;
    }
    for _ in 0..2 {
        plane.done(vm, VmAction::Suspend).await;
    }
    assert_eq!(site.counts.starts.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn what_needs_a_machine_fails_without_one() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    for action in [VmAction::Pause, VmAction::Resume, VmAction::Reset, VmAction::Suspend] {
        assert_eq!(plane.failed(vm, action).await.code, "not_running");
    }
    plane.done(vm, VmAction::Start).await;
    plane.done(vm, VmAction::Suspend).await;
    let fault = plane.failed(vm, SHUTDOWN).await;
    assert!(fault.message.contains("suspended"), "{}", fault.message);
    assert_eq!(plane.observed(vm).unwrap().state, MachineState::Saved);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_ignores_the_button_is_forced_off_or_left() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    site.host.set_guest(vm.0, SimGuest { on_powerdown: OnPowerdown::Ignores, ..SimGuest::default() });
    plane.done(vm, VmAction::Start).await;
    let fault = plane.failed(vm, VmAction::Shutdown { timeout: 25, force: false }).await;
    assert_eq!(fault.code, "shutdown_timeout");
    assert_eq!((plane.observed(vm).unwrap().state, site.host.living()), (MachineState::Running, 1));
    plane.done(vm, VmAction::Shutdown { timeout: 25, force: true }).await;
    assert_eq!(site.host.living(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_power_button_is_pressed_again() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let ignores = SimGuest { on_powerdown: OnPowerdown::Ignores, ..SimGuest::default() };
    site.host.set_guest(vm.0, ignores);
    plane.done(vm, VmAction::Start).await;
    let operation = plane.act(vm, VmAction::Shutdown { timeout: 300, force: false });
    tokio::time::sleep(Duration::from_secs(15)).await;
    // By now it has booted so far that it listens.
    site.host.set_guest(vm.0, SimGuest::default());
    assert_eq!(plane.outcome(operation).await, TaskOutcome::Done);
}

#[tokio::test(start_paused = true)]
async fn a_stop_supersedes_a_shutdown_that_waits() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    site.host.set_guest(vm.0, SimGuest { on_powerdown: OnPowerdown::Ignores, ..SimGuest::default() });
    plane.done(vm, VmAction::Start).await;
    let shutdown = plane.act(vm, VmAction::Shutdown { timeout: 3000, force: false });
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = tokio::time::Instant::now();
    plane.done(vm, VmAction::Stop).await;
    assert!(before.elapsed() < Duration::from_secs(5));
    assert!(plane.with(|inner| inner.answers.iter().all(|(operation, ..)| *operation != shutdown)));
}

#[tokio::test(start_paused = true)]
async fn a_stop_supersedes_a_start_that_is_slow() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    site.host.set_delay(SimOperation::Start, Duration::from_secs(40));
    plane.act(vm, VmAction::Start);
    tokio::time::sleep(Duration::from_secs(5)).await;
    plane.done(vm, VmAction::Stop).await;
    site.host.clear_faults();
    assert_eq!(site.host.living(), 0);
    plane.done(vm, VmAction::Start).await;
    plane.done(vm, VmAction::Delete).await;
}

#[tokio::test(start_paused = true)]
async fn a_start_that_waits_for_its_volume_can_be_called_off() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let nowhere = ostler_api::VolumeId::new();
    plane.vm_change(vm, |vm| vm.spec.disks[0].volume = nowhere);
    let start = plane.act(vm, VmAction::Start);
    tokio::time::sleep(Duration::from_secs(5)).await;
    // Cancelled: there is no task any more.
    plane.vm_change(vm, |vm| vm.status.task = None);
    tokio::time::sleep(Duration::from_secs(5)).await;
    plane.done(vm, VmAction::Stop).await;
    assert!(plane.with(|inner| inner.answers.iter().all(|(operation, ..)| *operation != start)));
    // Left alone it fails, and says for what it waited.
    let fault = plane.failed(vm, VmAction::Start).await;
    assert_eq!(fault.code, "volume_missing");
    assert!(fault.message.contains(&nowhere.to_string()));
}

#[tokio::test(start_paused = true)]
async fn a_delete_supersedes_a_save() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    site.host.set_delay(SimOperation::Save, Duration::from_secs(600));
    plane.act(vm, VmAction::Suspend);
    tokio::time::sleep(Duration::from_secs(5)).await;
    plane.done(vm, VmAction::Delete).await;
    assert_eq!(site.host.known(), 0);
    eventually("no files", || !site.dir.path().join("vms").join(vm.to_string()).join("state").exists()).await;
}

#[tokio::test(start_paused = true)]
async fn answers_are_told_in_the_same_moment() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.connected().await;
    let before = tokio::time::Instant::now();
    plane.done(vm, VmAction::Start).await;
    assert_eq!(before.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn events_that_are_missed_press_no_button() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    site.host.set_guest(vm.0, SimGuest { on_powerdown: OnPowerdown::Ignores, ..SimGuest::default() });
    plane.done(vm, VmAction::Start).await;
    let shutdown = plane.act(vm, VmAction::Shutdown { timeout: 60, force: false });
    tokio::time::sleep(Duration::from_secs(5)).await;
    // More than the machine keeps for one that does not listen.
    for _ in 0..10 {
        site.host.io_error(vm.0, "disk0", false);
    }
    let outcome = plane.outcome(shutdown).await;
    assert!(matches!(outcome, TaskOutcome::Failed { fault } if fault.code == "shutdown_timeout"));
    assert_eq!(site.counts.presses.load(Ordering::Relaxed), 6);
}
