//! The one function that turns what is wanted, what is being done and what the node saw into the phase shown.
//!
//! ```text
//!              create                    ┌───────────── shutdown, stop ◄──────────────┐
//!                │                       ▼                                            │
//!                ▼        placed      stopping ──► stopped ──start──► starting ──► running ◄─┐
//!             pending ──────────────────────────────────────────────►    │         │  ▲  │   │ reset,
//!                │                                                       │    pause│  │  └───┘ reboot
//!                │ no node fits, ever                                    │         ▼  │resume
//!                └─────────────► error ◄──── a step fails, QEMU dies ────┘       paused
//!                                  │ ▲                                             │
//!                 start, stop,     │ └──────── deadline passed ◄── any -ing        │ suspend (also from running)
//!                 rebuild, delete ─┘                                               ▼
//!                                        running ◄── resuming ◄── suspended ◄── suspending
//!
//!     unknown:   the node does not report; what it last saw stays in `observed`
//!     rebuilding: from running, paused, stopped, suspended or error; back to running or stopped
//!     deleting:  from anywhere, always
//! ```
//!
//! Every `-ing` phase is a task with a deadline; past it the VM is in `error` with a reason, or in what its node sees.

use crate::resource::words;
use crate::vm::{MachineState, VmStatus};
use crate::vm_action::VmAction;

words! {
    /// What a VM is doing, as people see it.
    VmPhase {
        /// Waits for a node.
        Pending => "pending",
        Starting => "starting",
        Running => "running",
        Paused => "paused",
        Stopping => "stopping",
        Stopped => "stopped",
        Suspending => "suspending",
        Suspended => "suspended",
        Resuming => "resuming",
        Rebooting => "rebooting",
        Rebuilding => "rebuilding",
        Deleting => "deleting",
        /// See `status.reason`; start, stop, rebuild and delete work from here.
        Error => "error",
        /// Its node does not report.
        Unknown => "unknown",
    }
}

impl VmPhase {
    /// Whether it stays so until somebody asks for something else.
    pub const fn is_settled(self) -> bool {
        match self {
            Self::Running | Self::Paused | Self::Stopped | Self::Suspended | Self::Error | Self::Unknown => {
                true
            }
            Self::Pending
            | Self::Starting
            | Self::Stopping
            | Self::Suspending
            | Self::Resuming
            | Self::Rebooting
            | Self::Rebuilding
            | Self::Deleting => false,
        }
    }
}

/// The phase for a status, whatever its `phase` field says now.
pub fn vm_phase(status: &VmStatus) -> VmPhase {
    let seen = status.observed.as_ref().map(|o| o.state);
    // Disks come and go while it runs, or does not.
    let shown = status.task.as_ref().filter(|task| {
        !matches!(task.action, VmAction::Attach { .. } | VmAction::Detach { .. }) || status.node.is_none()
    });
    if let Some(task) = shown {
        return match &task.action {
            VmAction::Delete => VmPhase::Deleting,
            _ if status.node.is_none() => VmPhase::Pending,
            VmAction::Start if seen == Some(MachineState::Saved) => VmPhase::Resuming,
            VmAction::Start => VmPhase::Starting,
            VmAction::Shutdown { .. } | VmAction::Stop => VmPhase::Stopping,
            VmAction::Reset | VmAction::Reboot { .. } => VmPhase::Rebooting,
            VmAction::Pause => VmPhase::Running,
            VmAction::Resume if seen == Some(MachineState::Paused) => VmPhase::Paused,
            VmAction::Resume => VmPhase::Resuming,
            VmAction::Suspend => VmPhase::Suspending,
            VmAction::Rebuild { .. } => VmPhase::Rebuilding,
            VmAction::Attach { .. } | VmAction::Detach { .. } => VmPhase::Pending,
        };
    }
    if status.node_silent && status.node.is_some() {
        return VmPhase::Unknown;
    }
    match seen {
        Some(MachineState::Running) => VmPhase::Running,
        Some(MachineState::Starting) => VmPhase::Starting,
        Some(MachineState::Paused) => VmPhase::Paused,
        Some(MachineState::Saved) => VmPhase::Suspended,
        Some(MachineState::IoError | MachineState::Panicked | MachineState::Unresponsive) => VmPhase::Error,
        Some(MachineState::Absent) | None => match &status.reason {
            Some(_) => VmPhase::Error,
            None => VmPhase::Stopped,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::VmObserved;
    use crate::vm_action::VmTask;
    use crate::{Fault, Name, OperationId, Time};

    fn status(node: bool, state: Option<MachineState>, action: Option<VmAction>, fault: bool) -> VmStatus {
        VmStatus {
            phase: VmPhase::Pending,
            reason: fault.then(|| Fault::new("x", "y")),
            node: node.then(|| Name::new("n1").unwrap()),
            task: action.map(|action| VmTask {
                operation: OperationId::new(),
                action,
                requested: Time::now(),
                deadline: Time::now(),
            }),
            observed: state.map(|state| VmObserved {
                generation: 1,
                state,
                at: Time::now(),
                end: None,
                fault: None,
                facts: None,
            }),
            node_silent: false,
        }
    }

    #[test]
    fn a_task_shows_until_it_is_answered() {
        assert_eq!(vm_phase(&status(false, None, Some(VmAction::Start), false)), VmPhase::Pending);
        assert_eq!(vm_phase(&status(true, None, Some(VmAction::Start), false)), VmPhase::Starting);
        let saved = Some(MachineState::Saved);
        assert_eq!(vm_phase(&status(true, saved, Some(VmAction::Start), false)), VmPhase::Resuming);
        assert_eq!(vm_phase(&status(false, None, Some(VmAction::Delete), true)), VmPhase::Deleting);
    }

    #[test]
    fn without_a_task_the_phase_is_what_the_node_sees() {
        for state in MachineState::ALL {
            let phase = vm_phase(&status(true, Some(*state), None, false));
            assert!(phase.is_settled() || *state == MachineState::Starting, "{state} {phase}");
        }
        assert_eq!(vm_phase(&status(true, Some(MachineState::Absent), None, true)), VmPhase::Error);
        // A machine that runs is not in error, whatever went wrong before.
        assert_eq!(vm_phase(&status(true, Some(MachineState::Running), None, true)), VmPhase::Running);
    }

    #[test]
    fn a_silent_node_makes_its_vms_unknown() {
        let mut silent = status(true, Some(MachineState::Running), None, false);
        silent.node_silent = true;
        assert_eq!(vm_phase(&silent), VmPhase::Unknown);
    }
}
