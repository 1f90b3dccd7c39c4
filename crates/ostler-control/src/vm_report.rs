//! What a node's report makes of a VM: one pure function over the old state and the report.

use ostler_api::event::Severity;
use ostler_api::operation::Progress;
use ostler_api::vm::{EndCause, MachineState, Power, Vm, VmObserved};
use ostler_api::vm_action::VmAction;
use ostler_api::vm_phase::{VmPhase, vm_phase};
use ostler_api::work::{TaskAnswer, TaskOutcome, VmReport};
use ostler_api::{Fault, OperationId, Time, VolumeId};

use crate::operation::Step;
use crate::vm_create::task;

/// What a report leads to.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    /// The VM as it is now.
    pub(crate) vm: Vm,
    /// Its node has nothing of it any more, and it is to be deleted.
    pub(crate) ended: bool,
    pub(crate) operation: Option<(OperationId, Step)>,
    /// A start that the system itself asks for.
    pub(crate) restart: Option<OperationId>,
    /// A finished rebuild: the volume that becomes the root disk.
    pub(crate) rebuilt: Option<VolumeId>,
    /// A failed rebuild: the volume that goes.
    pub(crate) dropped: Option<VolumeId>,
    /// A disk that is out, or could not be plugged in: the VM has it no longer.
    pub(crate) released: Option<VolumeId>,
    pub(crate) event: Option<(Severity, &'static str, String)>,
}

/// Applies a report of the node that has the VM. A report older than what is known changes nothing.
pub(crate) fn apply(vm: &Vm, report: &VmReport, now: Time) -> Outcome {
    let before = vm.status.observed.as_ref();
    let mut new = vm.clone();
    let mut out = Outcome {
        vm: vm.clone(),
        ended: false,
        operation: None,
        restart: None,
        rebuilt: None,
        dropped: None,
        released: None,
        event: None,
    };
    if before.is_some_and(|before| before.generation > report.observed.generation) {
        return out;
    }
    new.status.observed = Some(report.observed.clone());
    new.status.node_silent = false;
    match (&vm.status.task, &report.answer) {
        (Some(task), Some(answer)) if answers(answer, task.operation, &task.action) => {
            answered(&mut new, &mut out, &task.action, answer, now);
        }
        (Some(_), _) => {}
        (None, _) => noticed(&mut new, &mut out, before, &report.observed, now),
    }
    settle(&mut new);
    mark_change(&new, &mut out, before.map_or(MachineState::Absent, |before| before.state));
    out.vm = new;
    out
}

fn answers(answer: &TaskAnswer, operation: OperationId, action: &VmAction) -> bool {
    answer.operation == operation && answer.action == action.name()
}

/// The node's answer to the task.
fn answered(new: &mut Vm, out: &mut Outcome, action: &VmAction, answer: &TaskAnswer, now: Time) {
    let name = new.metadata.name.clone();
    match &answer.outcome {
        TaskOutcome::Progress { stage, done, total } => {
            let progress = Progress { stage: stage.clone(), done: *done, total: *total };
            out.operation = Some((answer.operation, Step::Progress(progress)));
        }
        TaskOutcome::Done => match action {
            // The operation ends with the VM, and that with its volumes.
            VmAction::Delete => out.ended = true,
            VmAction::Rebuild { volume } => {
                out.rebuilt = Some(*volume);
                out.event = Some((Severity::Info, "vm.rebuilt", format!("VM {name} has a new root disk")));
                new.status.reason = None;
                if new.spec.power == Power::Running {
                    new.status.task = Some(task(answer.operation, VmAction::Start, now));
                } else {
                    new.spec.power = Power::Stopped;
                    new.status.task = None;
                    out.operation = Some((answer.operation, Step::Succeeded));
                }
            }
            VmAction::Start
            | VmAction::Shutdown { .. }
            | VmAction::Stop
            | VmAction::Reset
            | VmAction::Reboot { .. }
            | VmAction::Pause
            | VmAction::Resume
            | VmAction::Suspend
            | VmAction::Attach { .. }
            | VmAction::Detach { .. } => {
                if let VmAction::Detach { volume } = action {
                    out.released = Some(*volume);
                }
                new.status.task = None;
                new.status.reason = None;
                out.operation = Some((answer.operation, Step::Succeeded));
            }
        },
        TaskOutcome::Failed { fault } if *action == VmAction::Delete => {
            // Deleting goes on until it is done; people see what it waits for.
            new.status.reason = Some(fault.clone());
        }
        TaskOutcome::Failed { fault } => {
            if let VmAction::Rebuild { volume } = action {
                out.dropped = Some(*volume);
            }
            if let VmAction::Attach { volume } = action {
                out.released = Some(*volume);
            }
            new.status.task = None;
            new.status.reason = Some(fault.clone());
            out.operation = Some((answer.operation, Step::Failed(fault.clone())));
            out.event = Some((
                Severity::Error,
                "vm.action_failed",
                format!("{} of VM {name} failed: {}", action.name(), fault.message),
            ));
        }
    }
}

/// Something happened that nobody asked for.
fn noticed(new: &mut Vm, out: &mut Outcome, before: Option<&VmObserved>, seen: &VmObserved, now: Time) {
    let name = new.metadata.name.clone();
    let was = before.map(|before| before.state);
    match seen.state {
        MachineState::Absent if was != Some(MachineState::Absent) => match seen.end {
            Some(EndCause::GuestShutdown) => {
                new.spec.power = Power::Stopped;
                new.status.reason = None;
                out.event = Some((Severity::Info, "vm.powered_off", format!("VM {name} powered itself off")));
            }
            Some(EndCause::HostRestarted) if matches!(new.spec.power, Power::Running | Power::Paused) => {
                let operation = OperationId::new();
                new.spec.power = Power::Running;
                new.status.task = Some(task(operation, VmAction::Start, now));
                new.status.reason = None;
                out.restart = Some(operation);
                out.event = Some((
                    Severity::Warning,
                    "vm.host_restarted",
                    format!("the host of VM {name} was restarted; the VM is started again"),
                ));
            }
            Some(EndCause::Died | EndCause::HostRestarted) => {
                let fault = seen.fault.clone().unwrap_or_else(|| {
                    Fault::new(
                        "qemu_died",
                        "its QEMU process ended unexpectedly; ostler vm start works from here",
                    )
                });
                out.event = Some((
                    Severity::Error,
                    "vm.died",
                    format!("VM {name} ended unexpectedly: {}", fault.message),
                ));
                new.status.reason = Some(fault);
            }
            Some(EndCause::Asked) | None => new.status.reason = seen.fault.clone(),
        },
        MachineState::Absent => {
            if let Some(fault) = &seen.fault {
                new.status.reason = Some(fault.clone());
            }
        }
        MachineState::IoError | MachineState::Panicked | MachineState::Unresponsive => {
            new.status.reason = seen.fault.clone().or_else(|| {
                Some(Fault::new(seen.state.as_str(), format!("its node sees it as {}", seen.state)))
            });
        }
        MachineState::Running => new.spec.power = Power::Running,
        MachineState::Paused => new.spec.power = Power::Paused,
        MachineState::Starting | MachineState::Saved => {}
    }
}

/// The phase, and no reason where all is well.
fn settle(vm: &mut Vm) {
    vm.status.phase = vm_phase(&vm.status);
    match vm.status.phase {
        VmPhase::Running | VmPhase::Paused | VmPhase::Stopped | VmPhase::Suspended => vm.status.reason = None,
        VmPhase::Pending
        | VmPhase::Starting
        | VmPhase::Stopping
        | VmPhase::Suspending
        | VmPhase::Resuming
        | VmPhase::Rebooting
        | VmPhase::Rebuilding
        | VmPhase::Deleting
        | VmPhase::Error
        | VmPhase::Unknown => {}
    }
}

/// An event for a change of state that has none yet.
fn mark_change(new: &Vm, out: &mut Outcome, before: MachineState) {
    let Some(seen) = &new.status.observed else { return };
    if out.event.is_some() || seen.state == before {
        return;
    }
    let name = &new.metadata.name;
    out.event = match seen.state {
        MachineState::Running => Some((Severity::Info, "vm.running", format!("VM {name} runs"))),
        MachineState::Absent => Some((Severity::Info, "vm.stopped", format!("VM {name} is stopped"))),
        MachineState::Paused => Some((Severity::Info, "vm.paused", format!("VM {name} is paused"))),
        MachineState::Saved => {
            Some((Severity::Info, "vm.suspended", format!("VM {name} is suspended to disk")))
        }
        MachineState::IoError | MachineState::Panicked | MachineState::Unresponsive => {
            let why = new.status.reason.as_ref().map_or("", |reason| reason.message.as_str());
            Some((Severity::Error, "vm.in_trouble", format!("VM {name} is {}: {why}", seen.state)))
        }
        MachineState::Starting => None,
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;
    use ostler_api::vm_action::VmTask;

    fn observed(generation: u64, state: MachineState) -> VmObserved {
        VmObserved { generation, state, at: Time::now(), end: None, fault: None, facts: None }
    }

    fn vm(action: Option<VmAction>, state: Option<MachineState>) -> (Vm, OperationId) {
        let operation = OperationId::new();
        let mut vm = testing::vm("a", "n1");
        vm.status.observed = state.map(|state| observed(5, state));
        vm.status.task = action.map(|action| VmTask {
            operation,
            action,
            requested: Time::now(),
            deadline: Time::now().after(std::time::Duration::from_secs(60)),
        });
        vm.status.phase = vm_phase(&vm.status);
        (vm, operation)
    }

    fn report(vm: &Vm, observed: VmObserved, answer: Option<(OperationId, &str, TaskOutcome)>) -> VmReport {
        VmReport {
            vm: vm.metadata.id.into(),
            observed,
            answer: answer.map(|(operation, action, outcome)| TaskAnswer {
                operation,
                action: action.to_owned(),
                outcome,
            }),
        }
    }

    #[test]
    fn a_start_that_is_done_runs() {
        let (vm, operation) = vm(Some(VmAction::Start), None);
        let report =
            report(&vm, observed(6, MachineState::Running), Some((operation, "start", TaskOutcome::Done)));
        let out = apply(&vm, &report, Time::now());
        let new = out.vm;
        assert_eq!(new.status.phase, VmPhase::Running);
        assert!(new.status.task.is_none());
        assert!(matches!(out.operation, Some((id, Step::Succeeded)) if id == operation));
    }

    #[test]
    fn an_answer_to_another_task_is_no_answer() {
        let (vm, _) = vm(Some(VmAction::Stop), Some(MachineState::Running));
        let stale = report(
            &vm,
            observed(6, MachineState::Running),
            Some((OperationId::new(), "start", TaskOutcome::Done)),
        );
        let out = apply(&vm, &stale, Time::now());
        assert_eq!(out.vm.status.phase, VmPhase::Stopping);
        assert!(out.operation.is_none());
    }

    #[test]
    fn an_old_report_changes_nothing() {
        let (vm, operation) = vm(Some(VmAction::Stop), Some(MachineState::Running));
        let old =
            report(&vm, observed(4, MachineState::Absent), Some((operation, "stop", TaskOutcome::Done)));
        let out = apply(&vm, &old, Time::now());
        assert_eq!(out.vm, vm);
        assert!(out.operation.is_none());
    }

    #[test]
    fn a_guest_that_powers_off_is_stopped_and_wanted_so() {
        let (vm, _) = vm(None, Some(MachineState::Running));
        let mut seen = observed(6, MachineState::Absent);
        seen.end = Some(EndCause::GuestShutdown);
        let new = apply(&vm, &report(&vm, seen, None), Time::now()).vm;
        assert_eq!((new.status.phase, new.spec.power), (VmPhase::Stopped, Power::Stopped));
    }

    #[test]
    fn a_qemu_that_dies_is_an_error_with_its_last_words() {
        let (vm, _) = vm(None, Some(MachineState::Running));
        let mut seen = observed(6, MachineState::Absent);
        seen.end = Some(EndCause::Died);
        seen.fault = Some(Fault::new("qemu_died", "killed by signal 9"));
        let new = apply(&vm, &report(&vm, seen, None), Time::now()).vm;
        assert_eq!(new.status.phase, VmPhase::Error);
        assert_eq!(new.status.reason.unwrap().message, "killed by signal 9");
    }

    #[test]
    fn a_restarted_host_starts_what_ran_and_leaves_what_did_not() {
        for (power, restarts) in [(Power::Running, true), (Power::Stopped, false)] {
            let (mut vm, _) = vm(None, Some(MachineState::Running));
            vm.spec.power = power;
            let mut seen = observed(6, MachineState::Absent);
            seen.end = Some(EndCause::HostRestarted);
            let out = apply(&vm, &report(&vm, seen, None), Time::now());
            assert_eq!(out.restart.is_some(), restarts);
        }
    }

    #[test]
    fn a_rebuild_swaps_and_starts_again_if_it_ran() {
        let volume = VolumeId::new();
        for power in [Power::Running, Power::Stopped] {
            let (mut vm, operation) = vm(Some(VmAction::Rebuild { volume }), Some(MachineState::Running));
            vm.spec.power = power;
            let done = report(
                &vm,
                observed(6, MachineState::Absent),
                Some((operation, "rebuild", TaskOutcome::Done)),
            );
            let out = apply(&vm, &done, Time::now());
            assert_eq!(out.rebuilt, Some(volume));
            let next = out.vm.status.task.map(|task| (task.operation, task.action));
            assert_eq!(next, (power == Power::Running).then_some((operation, VmAction::Start)));
        }
    }

    #[test]
    fn a_failed_suspend_leaves_it_running() {
        let (vm, operation) = vm(Some(VmAction::Suspend), Some(MachineState::Running));
        let failed = TaskOutcome::Failed { fault: Fault::new("no_space", "disk full") };
        let report = report(&vm, observed(6, MachineState::Running), Some((operation, "suspend", failed)));
        let out = apply(&vm, &report, Time::now());
        let new = out.vm;
        assert_eq!(new.status.phase, VmPhase::Running);
        assert!(matches!(out.operation, Some((_, Step::Failed(_)))));
    }

    #[test]
    fn a_done_delete_is_the_end() {
        let (vm, operation) = vm(Some(VmAction::Delete), Some(MachineState::Running));
        let done =
            report(&vm, observed(6, MachineState::Absent), Some((operation, "delete", TaskOutcome::Done)));
        let out = apply(&vm, &done, Time::now());
        assert!(out.ended);
        assert!(out.operation.is_none(), "it ends with the volumes");
    }
}
