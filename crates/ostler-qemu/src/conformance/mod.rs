//! The suite that every [`Hypervisor`] passes. A test crate makes a [`Fixture`] of its implementation and calls
//! [`run`] with each of [`CASES`].

mod disks;
pub mod guest;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{broadcast, watch};
use uuid::Uuid;

use crate::disk::DiskLayer;
use crate::error::{Error, StartError};
use crate::machine::{ExitReason, Hypervisor, Machine, MachineEvent, Progress, RunState, Survey};
use crate::spec::{MachineSpec, StartOptions};

/// Long enough for a loaded machine under emulation; nothing waits this long when all is well.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a guest is made to do from inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestAct {
    PowerOff,
    Panic,
    Reset,
}

/// One implementation under test, on a host of its own.
#[async_trait]
pub trait Fixture: Send + Sync {
    fn hypervisor(&self) -> Arc<dyn Hypervisor>;

    /// Throws away everything the agent knew, as `kill -9` does, and starts a new one on the same host.
    async fn restart_agent(&mut self);

    /// A machine whose guest obeys the power button.
    fn spec(&self) -> MachineSpec;

    /// Waits until the guest is up far enough to act.
    async fn guest_up(&self, machine: &Arc<dyn Machine>);

    async fn guest_act(&self, machine: &Arc<dyn Machine>, act: GuestAct);

    /// Kills the machine's process behind the driver's back.
    async fn murder(&self, machine: &Arc<dyn Machine>);

    /// A place for state files.
    fn scratch(&self) -> PathBuf;

    /// An empty qcow2 layer of this size and name. The same name gives the same file.
    async fn disk_file(&self, name: &str, bytes: u64) -> DiskLayer;

    /// Writes over all of a layer, which nothing uses.
    async fn fill(&self, layer: &DiskLayer, bytes: u64);

    /// The guest will not release virtio disks.
    async fn guest_keeps_disks(&self, machine: &Arc<dyn Machine>);

    /// Streams take for ever, or no longer do, where a rate does not make them slow.
    async fn slow_streams(&self, machine: &Arc<dyn Machine>, slow: bool);
}

/// The names of the cases, for one test each.
pub const CASES: &[&str] = &[
    "start_runs_and_is_listed",
    "duplicate_start_is_refused",
    "racing_starts_make_one_machine",
    "paused_start_waits_for_resume",
    "pause_and_resume",
    "reset_goes_on_running",
    "powerdown_reaches_the_guest",
    "guest_power_off_is_seen_and_kept",
    "guest_panic_is_seen",
    "guest_reset_is_seen",
    "save_and_restore",
    "failed_save_changes_nothing",
    "restore_refuses_a_broken_state",
    "quit_ends_the_process",
    "kill_ends_the_process",
    "killed_process_is_seen",
    "agent_restart_adopts",
    "agent_restart_sees_what_happened_meanwhile",
    "forget_spares_the_living",
    "start_again_after_the_end",
    "unknown_machines_are_no_error",
    "bad_specs_are_refused",
    "disks_come_and_go",
    "disks_are_found_by_another_agent",
    "a_guest_may_keep_its_disk",
    "disks_that_do_not_fit_are_refused",
    "disks_grow_and_never_shrink",
    "limits_are_set_and_lifted",
    "snapshots_are_of_all_disks_or_none",
    "streams_shorten_the_chain",
    "a_cancelled_stream_changes_nothing",
    "places_are_kept_by_a_saved_state",
    "layers_in_the_middle_are_merged",
];

/// Runs one case. Panics when it fails.
pub async fn run(case: &str, fixture: &mut dyn Fixture) {
    match case {
        "start_runs_and_is_listed" => start_runs_and_is_listed(fixture).await,
        "duplicate_start_is_refused" => duplicate_start_is_refused(fixture).await,
        "racing_starts_make_one_machine" => racing_starts_make_one_machine(fixture).await,
        "paused_start_waits_for_resume" => paused_start_waits_for_resume(fixture).await,
        "pause_and_resume" => pause_and_resume(fixture).await,
        "reset_goes_on_running" => reset_goes_on_running(fixture).await,
        "powerdown_reaches_the_guest" => powerdown_reaches_the_guest(fixture).await,
        "guest_power_off_is_seen_and_kept" => guest_power_off_is_seen_and_kept(fixture).await,
        "guest_panic_is_seen" => guest_panic_is_seen(fixture).await,
        "guest_reset_is_seen" => guest_reset_is_seen(fixture).await,
        "save_and_restore" => save_and_restore(fixture).await,
        "failed_save_changes_nothing" => failed_save_changes_nothing(fixture).await,
        "restore_refuses_a_broken_state" => restore_refuses_a_broken_state(fixture).await,
        "quit_ends_the_process" => quit_ends_the_process(fixture).await,
        "kill_ends_the_process" => kill_ends_the_process(fixture).await,
        "killed_process_is_seen" => killed_process_is_seen(fixture).await,
        "agent_restart_adopts" => agent_restart_adopts(fixture).await,
        "agent_restart_sees_what_happened_meanwhile" => {
            agent_restart_sees_what_happened_meanwhile(fixture).await
        }
        "forget_spares_the_living" => forget_spares_the_living(fixture).await,
        "start_again_after_the_end" => start_again_after_the_end(fixture).await,
        "unknown_machines_are_no_error" => unknown_machines_are_no_error(fixture).await,
        "bad_specs_are_refused" => bad_specs_are_refused(fixture).await,
        "disks_come_and_go" => disks::disks_come_and_go(fixture).await,
        "disks_are_found_by_another_agent" => disks::disks_are_found_by_another_agent(fixture).await,
        "a_guest_may_keep_its_disk" => disks::a_guest_may_keep_its_disk(fixture).await,
        "disks_that_do_not_fit_are_refused" => disks::disks_that_do_not_fit_are_refused(fixture).await,
        "disks_grow_and_never_shrink" => disks::disks_grow_and_never_shrink(fixture).await,
        "limits_are_set_and_lifted" => disks::limits_are_set_and_lifted(fixture).await,
        "snapshots_are_of_all_disks_or_none" => disks::snapshots_are_of_all_disks_or_none(fixture).await,
        "streams_shorten_the_chain" => disks::streams_shorten_the_chain(fixture).await,
        "a_cancelled_stream_changes_nothing" => disks::a_cancelled_stream_changes_nothing(fixture).await,
        "places_are_kept_by_a_saved_state" => disks::places_are_kept_by_a_saved_state(fixture).await,
        "layers_in_the_middle_are_merged" => disks::layers_in_the_middle_are_merged(fixture).await,
        other => panic!("there is no case '{other}'"),
    }
}

async fn start(fixture: &dyn Fixture, spec: &MachineSpec, opts: StartOptions) -> Arc<dyn Machine> {
    fixture.hypervisor().start(spec.clone(), opts).await.expect("a good machine starts")
}

async fn start_plain(fixture: &dyn Fixture) -> (MachineSpec, Arc<dyn Machine>) {
    let spec = fixture.spec();
    let machine = start(fixture, &spec, StartOptions::default()).await;
    (spec, machine)
}

/// Ends a machine and leaves nothing of it.
async fn clean_up(fixture: &dyn Fixture, id: Uuid) {
    let hypervisor = fixture.hypervisor();
    hypervisor.kill(id).await.expect("killing works");
    hypervisor.forget(id).await.expect("a dead machine is forgotten");
    assert!(survey_of(fixture, id).await.is_none(), "a forgotten machine is not listed");
}

async fn survey_of(fixture: &dyn Fixture, id: Uuid) -> Option<Survey> {
    let all = fixture.hypervisor().survey().await.expect("a survey works");
    all.into_iter().find(|found| found.id() == id)
}

async fn expect_state(machine: &Arc<dyn Machine>, wanted: RunState) {
    let reached = async {
        loop {
            let now = machine.state().await.expect("the state can be read");
            if now == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, reached).await.is_err() {
        panic!("wanted {wanted:?}, is {:?}", machine.state().await);
    }
}

async fn expect_event(events: &mut broadcast::Receiver<MachineEvent>, wanted: MachineEvent) {
    let seen = async {
        loop {
            match events.recv().await {
                Ok(event) if event == wanted => return,
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => panic!("no event {wanted:?} came before the end"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, seen).await.unwrap_or_else(|_| panic!("no event {wanted:?} came"));
}

async fn expect_exit(machine: &Arc<dyn Machine>, wanted: ExitReason) {
    let report = tokio::time::timeout(PATIENCE, machine.exited()).await.expect("the end is seen");
    assert!(report.reason == wanted || report.reason == ExitReason::Unknown, "{report:?}, wanted {wanted:?}");
}

async fn start_runs_and_is_listed(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    assert_eq!(machine.id(), spec.id);
    assert_eq!(machine.state().await.unwrap(), RunState::Running);
    let facts = machine.facts();
    assert!(facts.pid > 1 && !facts.machine_version.is_empty() && !facts.cpu_model.is_empty(), "{facts:?}");
    assert_eq!(facts.accelerator, spec.accelerator);
    match survey_of(fixture, spec.id).await {
        Some(Survey::Running(found)) => assert_eq!(found.facts(), facts),
        other => panic!("{other:?}"),
    }
    clean_up(fixture, spec.id).await;
}

async fn duplicate_start_is_refused(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    let again = fixture.hypervisor().start(spec.clone(), StartOptions::default()).await;
    assert!(
        matches!(&again, Err(StartError::AlreadyRunning { pid, .. }) if *pid == machine.facts().pid),
        "{again:?}"
    );
    assert_eq!(machine.state().await.unwrap(), RunState::Running, "the first is not disturbed");
    fixture.restart_agent().await;
    let again = fixture.hypervisor().start(spec.clone(), StartOptions::default()).await;
    assert!(
        matches!(&again, Err(StartError::AlreadyRunning { .. })),
        "also by an agent that does not know it: {again:?}"
    );
    clean_up(fixture, spec.id).await;
}

async fn racing_starts_make_one_machine(fixture: &mut dyn Fixture) {
    let spec = fixture.spec();
    let mut racers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (hypervisor, spec) = (fixture.hypervisor(), spec.clone());
        racers.spawn(async move { hypervisor.start(spec, StartOptions::default()).await });
    }
    let mut started = Vec::new();
    for result in racers.join_all().await {
        match result {
            Ok(machine) => started.push(machine),
            Err(StartError::AlreadyRunning { .. } | StartError::StartUnderWay { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(started.len(), 1);
    assert_eq!(started[0].state().await.unwrap(), RunState::Running);
    clean_up(fixture, spec.id).await;
}

async fn paused_start_waits_for_resume(fixture: &mut dyn Fixture) {
    let spec = fixture.spec();
    let machine = start(fixture, &spec, StartOptions { paused: true, ..StartOptions::default() }).await;
    assert!(matches!(machine.state().await.unwrap(), RunState::Prelaunch | RunState::Paused));
    // Not to be mistaken for one whose start was cut off.
    drop(machine);
    fixture.restart_agent().await;
    let Some(Survey::Running(machine)) = survey_of(fixture, spec.id).await else {
        panic!("it is found again")
    };
    machine.resume().await.unwrap();
    assert_eq!(machine.state().await.unwrap(), RunState::Running);
    clean_up(fixture, spec.id).await;
}

async fn pause_and_resume(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    let mut events = machine.events();
    for _ in 0..2 {
        machine.pause().await.expect("pausing twice is no error");
        assert_eq!(machine.state().await.unwrap(), RunState::Paused);
    }
    expect_event(&mut events, MachineEvent::Paused).await;
    for _ in 0..2 {
        machine.resume().await.expect("resuming twice is no error");
        assert_eq!(machine.state().await.unwrap(), RunState::Running);
    }
    expect_event(&mut events, MachineEvent::Resumed).await;
    clean_up(fixture, spec.id).await;
}

async fn reset_goes_on_running(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    let mut events = machine.events();
    machine.reset().await.unwrap();
    expect_event(&mut events, MachineEvent::Reset { guest: false }).await;
    assert_eq!(machine.state().await.unwrap(), RunState::Running);
    clean_up(fixture, spec.id).await;
}

async fn powerdown_reaches_the_guest(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    fixture.guest_up(&machine).await;
    let mut events = machine.events();
    machine.powerdown().await.unwrap();
    expect_event(&mut events, MachineEvent::Powerdown).await;
    expect_state(&machine, RunState::Shutdown).await;
    clean_up(fixture, spec.id).await;
}

async fn guest_power_off_is_seen_and_kept(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    fixture.guest_up(&machine).await;
    let mut events = machine.events();
    fixture.guest_act(&machine, GuestAct::PowerOff).await;
    expect_event(&mut events, MachineEvent::Shutdown { guest: true }).await;
    expect_state(&machine, RunState::Shutdown).await;
    assert!(machine.resume().await.is_err(), "what is off needs a reset first");
    machine.reset().await.unwrap();
    machine.resume().await.unwrap();
    assert_eq!(machine.state().await.unwrap(), RunState::Running);
    clean_up(fixture, spec.id).await;
}

async fn guest_panic_is_seen(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    fixture.guest_up(&machine).await;
    let mut events = machine.events();
    fixture.guest_act(&machine, GuestAct::Panic).await;
    expect_event(&mut events, MachineEvent::Panicked).await;
    expect_state(&machine, RunState::Panicked).await;
    clean_up(fixture, spec.id).await;
}

async fn guest_reset_is_seen(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    fixture.guest_up(&machine).await;
    let mut events = machine.events();
    fixture.guest_act(&machine, GuestAct::Reset).await;
    expect_event(&mut events, MachineEvent::Reset { guest: true }).await;
    expect_state(&machine, RunState::Running).await;
    clean_up(fixture, spec.id).await;
}

async fn save_and_restore(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    fixture.guest_up(&machine).await;
    let state = fixture.scratch().join("machine.state");
    let (progress, seen) = watch::channel(Progress::default());
    machine.save(&state, progress).await.unwrap();
    assert!(state.is_file());
    assert!(seen.borrow().total_bytes > 0, "{:?}", *seen.borrow());
    assert_eq!(machine.state().await.unwrap(), RunState::Saved);
    let left: Vec<_> =
        std::fs::read_dir(fixture.scratch()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["machine.state"]);
    machine.quit().await.unwrap();

    let facts = machine.facts();
    let same = MachineSpec {
        machine_version: Some(facts.machine_version),
        cpu_model: Some(facts.cpu_model),
        ..spec.clone()
    };
    let restore = StartOptions { restore_from: Some(state), paused: true };
    let machine = start(fixture, &same, restore).await;
    assert_eq!(machine.state().await.unwrap(), RunState::Paused);
    machine.resume().await.unwrap();
    assert_eq!(machine.state().await.unwrap(), RunState::Running);
    // It went on where it was: the guest acts without having booted again.
    fixture.guest_act(&machine, GuestAct::PowerOff).await;
    expect_state(&machine, RunState::Shutdown).await;
    clean_up(fixture, spec.id).await;
}

async fn failed_save_changes_nothing(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    let nowhere = fixture.scratch().join("missing").join("machine.state");
    machine.save(&nowhere, watch::channel(Progress::default()).0).await.unwrap_err();
    expect_state(&machine, RunState::Running).await;
    assert!(!nowhere.exists());
    // A good one works afterwards.
    let state = fixture.scratch().join("machine.state");
    machine.save(&state, watch::channel(Progress::default()).0).await.unwrap();
    machine.resume().await.unwrap();
    assert_eq!(machine.state().await.unwrap(), RunState::Running, "a saved machine can also just go on");
    clean_up(fixture, spec.id).await;
}

async fn restore_refuses_a_broken_state(fixture: &mut dyn Fixture) {
    let spec = fixture.spec();
    let state = fixture.scratch().join("machine.state");
    std::fs::write(&state, "no such state").unwrap();
    let opts = StartOptions { restore_from: Some(state), paused: false };
    let error = fixture.hypervisor().start(spec.clone(), opts).await.unwrap_err();
    assert!(matches!(error, StartError::BadState { .. }), "{error:?}");
    assert!(!matches!(
        survey_of(fixture, spec.id).await,
        Some(Survey::Running(_) | Survey::HalfStarted { .. })
    ));
    // And the id is not burnt.
    start(fixture, &spec, StartOptions::default()).await;
    clean_up(fixture, spec.id).await;
}

async fn quit_ends_the_process(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    let mut events = machine.events();
    machine.quit().await.unwrap();
    expect_exit(&machine, ExitReason::Clean).await;
    expect_event(&mut events, MachineEvent::Exited).await;
    machine.quit().await.expect("quitting twice is no error");
    assert!(machine.state().await.is_err());
    assert!(matches!(machine.pause().await, Err(Error::Ended { .. })));
    assert!(matches!(survey_of(fixture, spec.id).await, Some(Survey::Dead { .. })));
    clean_up(fixture, spec.id).await;
}

async fn kill_ends_the_process(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    let hypervisor = fixture.hypervisor();
    hypervisor.kill(spec.id).await.unwrap();
    expect_exit(&machine, ExitReason::Signal(libc::SIGKILL)).await;
    hypervisor.kill(spec.id).await.expect("killing the dead is no error");
    assert!(matches!(survey_of(fixture, spec.id).await, Some(Survey::Dead { .. })));

    // Also by an agent that has not looked yet.
    let machine = start(fixture, &spec, StartOptions::default()).await;
    drop(machine);
    fixture.restart_agent().await;
    fixture.hypervisor().kill(spec.id).await.unwrap();
    assert!(matches!(survey_of(fixture, spec.id).await, Some(Survey::Dead { .. })));
    clean_up(fixture, spec.id).await;
}

async fn killed_process_is_seen(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    let mut events = machine.events();
    fixture.murder(&machine).await;
    expect_exit(&machine, ExitReason::Signal(libc::SIGKILL)).await;
    expect_event(&mut events, MachineEvent::Exited).await;
    assert!(matches!(survey_of(fixture, spec.id).await, Some(Survey::Dead { .. })));
    clean_up(fixture, spec.id).await;
}

async fn agent_restart_adopts(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    let facts = machine.facts();
    drop(machine);
    fixture.restart_agent().await;
    let Some(Survey::Running(machine)) = survey_of(fixture, spec.id).await else {
        panic!("it is found again")
    };
    assert_eq!(machine.facts(), facts, "it is the same process");
    let mut events = machine.events();
    machine.pause().await.unwrap();
    expect_event(&mut events, MachineEvent::Paused).await;
    machine.resume().await.unwrap();
    // A second survey finds the same, although QEMU's monitor takes one client only.
    assert!(matches!(survey_of(fixture, spec.id).await, Some(Survey::Running(_))));
    machine.quit().await.unwrap();
    expect_exit(&machine, ExitReason::Clean).await;
    clean_up(fixture, spec.id).await;
}

async fn agent_restart_sees_what_happened_meanwhile(fixture: &mut dyn Fixture) {
    let (off, machine_off) = start_plain(fixture).await;
    let (dead, machine_dead) = start_plain(fixture).await;
    fixture.guest_up(&machine_off).await;
    fixture.guest_act(&machine_off, GuestAct::PowerOff).await;
    fixture.murder(&machine_dead).await;
    drop((machine_off, machine_dead));
    fixture.restart_agent().await;
    let Some(Survey::Running(machine)) = survey_of(fixture, off.id).await else {
        panic!("its process is kept")
    };
    expect_state(&machine, RunState::Shutdown).await;
    let gone = survey_of(fixture, dead.id).await;
    assert!(matches!(gone, Some(Survey::Dead { .. })), "{gone:?}");
    clean_up(fixture, off.id).await;
    clean_up(fixture, dead.id).await;
}

async fn forget_spares_the_living(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    let refused = fixture.hypervisor().forget(spec.id).await;
    assert!(matches!(&refused, Err(Error::StillRunning { .. })), "{refused:?}");
    assert_eq!(machine.state().await.unwrap(), RunState::Running);
    machine.quit().await.unwrap();
    for _ in 0..2 {
        fixture.hypervisor().forget(spec.id).await.expect("forgetting twice is no error");
    }
    assert!(survey_of(fixture, spec.id).await.is_none());
}

async fn start_again_after_the_end(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_plain(fixture).await;
    machine.quit().await.unwrap();
    let second = start(fixture, &spec, StartOptions::default()).await;
    assert_eq!(second.state().await.unwrap(), RunState::Running);
    assert!(machine.state().await.is_err(), "the old handle is of the old process");
    clean_up(fixture, spec.id).await;
}

async fn unknown_machines_are_no_error(fixture: &mut dyn Fixture) {
    let hypervisor = fixture.hypervisor();
    hypervisor.kill(Uuid::from_u128(1)).await.unwrap();
    hypervisor.forget(Uuid::from_u128(1)).await.unwrap();
    assert!(survey_of(fixture, Uuid::from_u128(1)).await.is_none());
    let probe = hypervisor.probe().await;
    assert!(probe.problems.is_empty() && probe.cpus > 0 && probe.memory_bytes > 0, "{probe:?}");
    assert!(probe.machine_types.iter().any(|name| name.starts_with("pc-q35-")), "{probe:?}");
}

async fn bad_specs_are_refused(fixture: &mut dyn Fixture) {
    let good = fixture.spec();
    let bad = [
        MachineSpec { cpus: 0, ..good.clone() },
        MachineSpec { memory_bytes: 0, ..good.clone() },
        MachineSpec { name: "a\nb".into(), ..good.clone() },
        MachineSpec { cpu_model: Some("max -readconfig /etc/passwd".into()), ..good.clone() },
        MachineSpec { machine_version: Some("pc-q35-7.2,accel=xen".into()), ..good.clone() },
    ];
    for spec in bad {
        let refused = fixture.hypervisor().start(spec, StartOptions::default()).await;
        assert!(matches!(&refused, Err(StartError::Invalid { .. })), "{refused:?}");
    }
    assert!(survey_of(fixture, good.id).await.is_none(), "nothing was left behind");
}
