//! Ends nobody asked for, and what the agent sees of a machine that it did not do itself.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::vm::{EndCause, MachineState};
use ostler_api::vm_action::VmAction;
use ostler_qemu::SimOperation;
use ostler_storage::{SimFaults, StorageError};

use crate::site::{Site, eventually};

#[tokio::test(start_paused = true)]
async fn a_guest_that_powers_itself_off_is_seen_and_cleaned_up() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    site.host.guest_power_off(vm.0);
    let seen = plane.state(vm, MachineState::Absent).await;
    assert_eq!((seen.end, seen.fault), (Some(EndCause::GuestShutdown), None));
    assert_eq!(site.host.known(), 0);
    plane.done(vm, VmAction::Start).await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_dies_says_its_last_words() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    site.host.crash(vm.0, 11);
    let seen = plane.state(vm, MachineState::Absent).await;
    let fault = seen.fault.unwrap();
    assert_eq!((seen.end, fault.code.as_str()), (Some(EndCause::Died), "qemu_died"));
    assert!(fault.message.contains("signal 11"), "{}", fault.message);
    assert_eq!(site.host.known(), 0);
    plane.done(vm, VmAction::Start).await;
    assert_eq!(plane.observed(vm).unwrap().fault, None);
}

#[tokio::test(start_paused = true)]
async fn panics_and_disk_errors_are_seen_and_can_be_mended() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    site.host.guest_panic(vm.0);
    assert_eq!(plane.state(vm, MachineState::Panicked).await.fault.unwrap().code, "guest_panicked");
    plane.done(vm, VmAction::Reset).await;
    assert_eq!(plane.observed(vm).unwrap().state, MachineState::Running);

    let volume = plane.with(|inner| inner.vms[&vm].spec.disks[0].volume);
    let disk = format!("v{}", crate::crash::tail(volume.0));
    site.host.io_error(vm.0, &disk, false);
    let fault = plane.state(vm, MachineState::IoError).await.fault.unwrap();
    assert_eq!(fault.code, "disk_error");
    assert!(fault.message.contains("volume web-root"), "{}", fault.message);
    plane.done(vm, VmAction::Start).await;
    let seen = plane.observed(vm).unwrap();
    assert_eq!((seen.state, seen.fault), (MachineState::Running, None));
}

#[tokio::test(start_paused = true)]
async fn a_guest_without_room_goes_on_when_there_is_some() {
    let site = Site::new();
    let agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    let volume = plane.with(|inner| inner.vms[&vm].spec.disks[0].volume);
    let disk = format!("v{}", crate::crash::tail(volume.0));
    let full =
        |called: &'static str, _| (called == "usage").then(|| StorageError::Busy { what: "the pool".into() });
    site.pool.set_faults(SimFaults { fault: Some(Arc::new(full)), ..SimFaults::default() });
    site.host.io_error(vm.0, &disk, true);
    assert_eq!(plane.state(vm, MachineState::IoError).await.fault.unwrap().code, "disk_full");
    // Another agent finds out why it waits.
    agent.kill().await;
    let _agent = site.agent();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let seen = plane.observed(vm).unwrap();
    assert_eq!((seen.state, seen.fault.unwrap().code.as_str()), (MachineState::IoError, "disk_full"));
    site.pool.set_faults(SimFaults::default());
    assert_eq!(plane.state(vm, MachineState::Running).await.fault, None);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_hangs_is_unresponsive_until_it_answers_again() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let other = plane.vm_create();
    plane.done(vm, VmAction::Start).await;
    site.host.set_hanging(SimOperation::State, Some(vm.0), true);
    let fault = plane.state(vm, MachineState::Unresponsive).await.fault.unwrap();
    assert_eq!(fault.code, "qemu_unresponsive");
    // It costs nobody else anything.
    plane.done(other, VmAction::Start).await;
    site.host.set_hanging(SimOperation::State, Some(vm.0), false);
    assert_eq!(plane.state(vm, MachineState::Running).await.fault, None);
    // Stop works on one that hangs, whatever hangs.
    site.host.set_hanging(SimOperation::State, Some(vm.0), true);
    site.host.set_hanging(SimOperation::Quit, Some(vm.0), true);
    plane.done(vm, VmAction::Stop).await;
    assert_eq!(site.host.living(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_happened_while_the_agent_was_away_is_seen() {
    let site = Site::new();
    let agent = site.agent();
    let plane = &site.plane;
    let [off, died, runs, stopped] = [(); 4].map(|()| plane.vm_create());
    for vm in [off, died, runs] {
        plane.done(vm, VmAction::Start).await;
    }
    plane.done(stopped, VmAction::Stop).await;
    let before = plane.observed(runs).unwrap();
    agent.end().await;
    assert_eq!(site.host.living(), 3);
    site.host.guest_power_off(off.0);
    site.host.crash(died.0, 9);
    let _agent = site.agent();
    assert_eq!(plane.state(off, MachineState::Absent).await.end, Some(EndCause::GuestShutdown));
    let seen = plane.state(died, MachineState::Absent).await;
    assert_eq!(seen.end, Some(EndCause::Died));
    assert!(seen.fault.unwrap().message.contains("signal 9"));
    // Adopted: the same run as before, and nothing to say about it.
    plane.done(runs, VmAction::Pause).await;
    assert_eq!(plane.observed(runs).unwrap().facts, before.facts);
    assert_eq!(plane.observed(stopped).unwrap().state, MachineState::Absent);
    assert_eq!(site.host.known(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_end_that_was_told_is_not_told_as_another_one() {
    let site = Site::new();
    let agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    site.host.guest_power_off(vm.0);
    let told = plane.state(vm, MachineState::Absent).await;
    agent.kill().await;
    let _agent = site.agent();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(plane.observed(vm).unwrap(), told);
}

#[tokio::test(start_paused = true)]
async fn a_restart_of_the_host_is_told_as_such() {
    let mut site = Site::new();
    let agent = site.agent();
    let vm = site.plane.vm_create();
    site.plane.done(vm, VmAction::Start).await;
    agent.kill().await;
    site.host.power_cut();
    site.config.host_boot = Some("next".into());
    let _agent = site.agent();
    let seen = site.plane.state(vm, MachineState::Absent).await;
    assert_eq!(
        (seen.end, seen.fault.unwrap().code.as_str()),
        (Some(EndCause::HostRestarted), "host_restarted")
    );
    site.plane.done(vm, VmAction::Start).await;
}

#[tokio::test(start_paused = true)]
async fn saved_memory_survives_a_restart_of_agent_and_host() {
    let mut site = Site::new();
    let agent = site.agent();
    let vm = site.plane.vm_create();
    site.plane.done(vm, VmAction::Start).await;
    site.plane.done(vm, VmAction::Suspend).await;
    agent.kill().await;
    site.host.power_cut();
    site.config.host_boot = Some("next".into());
    let _agent = site.agent();
    site.plane.done(vm, VmAction::Resume).await;
    let state = site.dir.path().join("vms").join(vm.to_string()).join("state");
    eventually("no state file", || !state.exists()).await;
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_was_half_started_is_started_anew() {
    let site = Site::new();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    let start = plane.act(vm, VmAction::Start);
    site.host.leave_half_started(vm.0);
    let stray = ostler_api::VmId::new();
    site.host.leave_half_started(stray.0);
    let _agent = site.agent();
    assert_eq!(plane.outcome(start).await, ostler_api::work::TaskOutcome::Done);
    eventually("one machine", || site.host.known() == 1).await;
}
