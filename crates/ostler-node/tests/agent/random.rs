//! Random sequences of wishes, kills, failures and accidents: never two machines of one VM, never stuck, and in the end
//! everything works and everything can be deleted.

use std::sync::atomic::Ordering;
use std::time::Duration;

use ostler_api::snapshot::{Snapshot, SnapshotPhase};
use ostler_api::vm::MachineState;
use ostler_api::vm_action::VmAction;
use ostler_api::{SnapshotId, Time};
use ostler_qemu::SimOperation;
use ostler_storage::Pool;
use proptest::prelude::*;

use crate::disks::writes_to_the_tops;
use crate::site::{Site, eventually};

#[derive(Debug, Clone)]
enum Event {
    Act(VmAction),
    /// With a disk made for it.
    Attach,
    /// The last disk, unless it is the only one.
    Detach,
    Snapshot,
    /// Of the snapshots that are ready, the one of this number.
    Revert(usize),
    SnapshotDelete(usize),
    Wait(u64),
    KillAgent,
    EndAgent,
    GuestOff,
    Crash,
    Panic,
    IoError,
    HostRestart,
    Fail(SimOperation, u32),
    Cut,
    LoseReports(u32),
    LoseReplies(u32),
}

fn event() -> impl Strategy<Value = Event> {
    let action = prop_oneof![
        5 => Just(VmAction::Start),
        1 => (1u32..60, any::<bool>()).prop_map(|(timeout, force)| VmAction::Shutdown { timeout, force }),
        1 => Just(VmAction::Stop),
        1 => Just(VmAction::Reset),
        1 => (1u32..60).prop_map(|timeout| VmAction::Reboot { timeout }),
        1 => Just(VmAction::Pause),
        1 => Just(VmAction::Resume),
        2 => Just(VmAction::Suspend),
    ];
    let operation = prop_oneof![
        Just(SimOperation::Start),
        Just(SimOperation::Survey),
        Just(SimOperation::Forget),
        Just(SimOperation::Kill),
        Just(SimOperation::State),
        Just(SimOperation::Resume),
        Just(SimOperation::Save),
        Just(SimOperation::Quit),
        Just(SimOperation::Disks),
        Just(SimOperation::DiskAttach),
        Just(SimOperation::DiskDetach),
        Just(SimOperation::DiskSnapshot),
        Just(SimOperation::DiskStream),
    ];
    prop_oneof![
        8 => action.prop_map(Event::Act),
        1 => Just(Event::Attach),
        1 => Just(Event::Detach),
        3 => Just(Event::Snapshot),
        1 => any::<usize>().prop_map(Event::Revert),
        2 => any::<usize>().prop_map(Event::SnapshotDelete),
        6 => (0u64..20_000).prop_map(Event::Wait),
        2 => Just(Event::KillAgent),
        1 => Just(Event::EndAgent),
        1 => Just(Event::GuestOff),
        1 => Just(Event::Crash),
        1 => Just(Event::Panic),
        1 => Just(Event::IoError),
        1 => Just(Event::HostRestart),
        2 => (operation, 1u32..4).prop_map(|(operation, times)| Event::Fail(operation, times)),
        1 => Just(Event::Cut),
        1 => (1u32..3).prop_map(Event::LoseReports),
        1 => (1u32..3).prop_map(Event::LoseReplies),
    ]
}

/// One of the snapshots that are ready.
fn ready(plane: &crate::plane::Plane, number: usize) -> Option<SnapshotId> {
    plane.with(|inner| {
        let ready = |one: &&Snapshot| one.status.phase == SnapshotPhase::Ready;
        let all: Vec<_> = inner.snapshots.values().filter(ready).collect();
        let one = all.get(number.checked_rem(all.len())?)?;
        Some(one.metadata.id.into())
    })
}

async fn play(events: Vec<Event>) {
    let mut site = Site::new();
    let plane = std::sync::Arc::clone(&site.plane);
    site.counts.merge_takes(Duration::from_secs(8));
    let mut agent = site.agent();
    let vm = plane.vm_create();
    for (number, event) in events.into_iter().enumerate() {
        match event {
            Event::Act(action) => drop(plane.act(vm, action)),
            Event::Attach => {
                let volume = plane.volume_create(None);
                plane.attach(vm, volume);
            }
            Event::Detach => {
                let disks = plane.with(|inner| inner.vms[&vm].spec.disks.clone());
                if let [_, .., last] = &disks[..] {
                    plane.act(vm, VmAction::Detach { volume: last.volume });
                }
            }
            Event::Snapshot => drop(plane.snapshot_vm(vm)),
            Event::Revert(number) => {
                if let Some(snapshot) = ready(&plane, number) {
                    plane.snapshot_revert(snapshot);
                }
            }
            Event::SnapshotDelete(number) => {
                if let Some(snapshot) = ready(&plane, number) {
                    plane.snapshot_delete(snapshot);
                }
            }
            Event::Wait(millis) => tokio::time::sleep(Duration::from_millis(millis)).await,
            Event::KillAgent => {
                agent.kill().await;
                agent = site.agent();
            }
            Event::EndAgent => {
                agent.end().await;
                agent = site.agent();
            }
            Event::GuestOff => site.host.guest_power_off(vm.0),
            Event::Crash => site.host.crash(vm.0, 11),
            Event::Panic => site.host.guest_panic(vm.0),
            Event::IoError => site.host.io_error(vm.0, "disk0", false),
            Event::HostRestart => {
                agent.kill().await;
                site.host.power_cut();
                site.config.host_boot = Some(format!("boot {number}"));
                agent = site.agent();
            }
            Event::Fail(operation, times) => site.host.fail(operation, None, times, "injected"),
            Event::Cut => plane.cut(),
            Event::LoseReports(times) => plane.with(|inner| inner.reports_lost = times),
            Event::LoseReplies(times) => plane.with(|inner| inner.replies_lost = times),
        }
        assert!(site.host.living() <= 1);
        assert_eq!(site.pool.audit().await.unwrap().broken, []);
    }
    site.host.clear_faults();
    // Whatever happened, what was asked last is answered.
    let busy = |inner: &crate::plane::Inner| inner.vms[&vm].status.task.as_ref().map(|task| task.operation);
    if let Some(operation) = plane.with(|inner| busy(inner)) {
        plane.outcome(operation).await;
    }
    // What is told is what is.
    tokio::time::sleep(Duration::from_secs(60)).await;
    let told = plane.observed(vm).map_or(MachineState::Absent, |seen| seen.state);
    let none = matches!(told, MachineState::Absent | MachineState::Saved);
    assert_eq!(site.host.living(), usize::from(!none), "told {told}");
    let settled = |inner: &crate::plane::Inner| {
        let rests = |phase| matches!(phase, SnapshotPhase::Ready | SnapshotPhase::Error);
        inner.snapshots.values().all(|one| rests(one.status.phase)).then_some(())
    };
    plane.wait("the ends of all snapshots", settled).await;
    assert!(site.pool.snapshot_list().await.unwrap().iter().all(|part| !part.prepared));
    writes_to_the_tops(&site, vm).await;
    plane.done(vm, VmAction::Stop).await;
    plane.done(vm, VmAction::Start).await;
    writes_to_the_tops(&site, vm).await;
    assert_eq!((plane.observed(vm).unwrap().state, site.host.living()), (MachineState::Running, 1));
    for snapshot in plane.with(|inner| inner.snapshots.keys().copied().collect::<Vec<_>>()) {
        plane.snapshot_delete(snapshot);
        plane.snapshot_gone(snapshot).await;
    }
    plane.done(vm, VmAction::Delete).await;
    // Also what was unplugged.
    for volume in plane.with(|inner| inner.volumes.keys().copied().collect::<Vec<_>>()) {
        plane.volume_change(volume, |volume| volume.metadata.deleted = Some(Time::now()));
    }
    plane.wait("the end of all", |inner| inner.volumes.is_empty().then_some(())).await;
    assert_eq!(site.counts.torn.load(Ordering::Relaxed), 0);
    eventually("an empty host", || site.host.known() == 0).await;
    agent.end().await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, max_shrink_iters: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn never_two_never_stuck(events in prop::collection::vec(event(), 1..40)) {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap()
            .block_on(play(events));
    }
}
