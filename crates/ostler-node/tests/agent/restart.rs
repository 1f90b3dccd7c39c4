//! The agent is killed at every call it makes, before and after it, in every scenario; the next one on the same host
//! must bring it to the same end, with exactly one machine and no answer lost.

use std::sync::atomic::Ordering;

use ostler_api::vm::MachineState;
use ostler_api::vm_action::VmAction;
use ostler_api::work::TaskOutcome;

use crate::crash::When;
use crate::site::Site;

enum Do {
    Act(VmAction),
    /// With a volume made for it.
    Rebuild,
    GuestOff,
    Crash,
}

use Do::Act;

struct Ending {
    state: Option<MachineState>,
    living: usize,
    starts: usize,
}

/// Plays a scenario. Returns the calls of the first life.
async fn play(acts: &[Do], ending: &Ending, last: Option<(usize, When)>) -> usize {
    let site = Site::new();
    let plane = &site.plane;
    let first = site.mortal_agent(last);
    let life = std::sync::Arc::clone(&first.life);
    let story = async {
        let vm = plane.vm_create();
        for act in acts {
            match act {
                Act(action) => {
                    let operation = plane.act(vm, action.clone());
                    let outcome = plane.outcome(operation).await;
                    assert_eq!(outcome, TaskOutcome::Done, "{} {last:?}", action.name());
                }
                Do::Rebuild => {
                    let volume = plane.volume_create(None);
                    plane.done(vm, VmAction::Rebuild { volume }).await;
                }
                Do::GuestOff => {
                    site.host.guest_power_off(vm.0);
                    let seen = plane.state(vm, MachineState::Absent).await;
                    assert_eq!(seen.end, Some(ostler_api::vm::EndCause::GuestShutdown), "{last:?}");
                }
                Do::Crash => {
                    site.host.crash(vm.0, 6);
                    let seen = plane.state(vm, MachineState::Absent).await;
                    assert_eq!(seen.end, Some(ostler_api::vm::EndCause::Died), "{last:?}");
                }
            }
        }
        match ending.state {
            Some(state) => drop(plane.state(vm, state).await),
            None => plane.wait("the end of all", |inner| inner.volumes.is_empty().then_some(())).await,
        }
    };
    tokio::pin!(story);
    let _agent = tokio::select! {
        () = &mut story => first,
        () = life.ended.notified() => {
            first.kill().await;
            let second = site.agent();
            story.await;
            second
        }
    };
    assert_eq!(site.host.living(), ending.living, "{last:?}");
    assert_eq!(site.counts.starts.load(Ordering::Relaxed), ending.starts, "{last:?}");
    let resets = acts.iter().filter(|act| matches!(act, Act(VmAction::Reset))).count();
    let done = site.counts.resets.load(Ordering::Relaxed);
    assert!(done >= resets && done <= resets + usize::from(last.is_some()), "{done} resets {last:?}");
    life.calls()
}

async fn everywhere(acts: &[Do], ending: Ending) {
    let calls = play(acts, &ending, None).await;
    assert!(calls > 5);
    for call in 0..calls {
        for when in [When::Before, When::After] {
            play(acts, &ending, Some((call, when))).await;
        }
    }
}

const RUNS: Option<MachineState> = Some(MachineState::Running);
const OFF: Option<MachineState> = Some(MachineState::Absent);

#[tokio::test(start_paused = true)]
async fn start_and_shutdown() {
    let acts = [Act(VmAction::Start), Act(VmAction::Shutdown { timeout: 90, force: true })];
    everywhere(&acts, Ending { state: OFF, living: 0, starts: 1 }).await;
}

#[tokio::test(start_paused = true)]
async fn start_stop_start() {
    let acts = [Act(VmAction::Start), Act(VmAction::Stop), Act(VmAction::Start)];
    everywhere(&acts, Ending { state: RUNS, living: 1, starts: 2 }).await;
}

#[tokio::test(start_paused = true)]
async fn reset() {
    let acts = [Act(VmAction::Start), Act(VmAction::Reset)];
    everywhere(&acts, Ending { state: RUNS, living: 1, starts: 1 }).await;
}

#[tokio::test(start_paused = true)]
async fn reboot() {
    let acts = [Act(VmAction::Start), Act(VmAction::Reboot { timeout: 90 })];
    everywhere(&acts, Ending { state: RUNS, living: 1, starts: 2 }).await;
}

#[tokio::test(start_paused = true)]
async fn pause_and_resume() {
    let acts = [Act(VmAction::Start), Act(VmAction::Pause), Act(VmAction::Resume), Act(VmAction::Pause)];
    everywhere(&acts, Ending { state: Some(MachineState::Paused), living: 1, starts: 1 }).await;
}

#[tokio::test(start_paused = true)]
async fn suspend() {
    let acts = [Act(VmAction::Start), Act(VmAction::Suspend)];
    everywhere(&acts, Ending { state: Some(MachineState::Saved), living: 0, starts: 1 }).await;
}

#[tokio::test(start_paused = true)]
async fn suspend_and_resume() {
    let acts = [Act(VmAction::Start), Act(VmAction::Suspend), Act(VmAction::Resume)];
    everywhere(&acts, Ending { state: RUNS, living: 1, starts: 2 }).await;
}

#[tokio::test(start_paused = true)]
async fn rebuild() {
    let acts = [Act(VmAction::Start), Do::Rebuild];
    everywhere(&acts, Ending { state: RUNS, living: 1, starts: 2 }).await;
}

#[tokio::test(start_paused = true)]
async fn delete() {
    let acts = [Act(VmAction::Start), Act(VmAction::Delete)];
    everywhere(&acts, Ending { state: None, living: 0, starts: 1 }).await;
}

#[tokio::test(start_paused = true)]
async fn the_guest_powers_itself_off() {
    let acts = [Act(VmAction::Start), Do::GuestOff, Act(VmAction::Start)];
    everywhere(&acts, Ending { state: RUNS, living: 1, starts: 2 }).await;
}

#[tokio::test(start_paused = true)]
async fn qemu_dies() {
    let acts = [Act(VmAction::Start), Do::Crash, Act(VmAction::Start)];
    everywhere(&acts, Ending { state: RUNS, living: 1, starts: 2 }).await;
}
