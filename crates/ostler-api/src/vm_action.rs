//! Actions on VMs, and the pure queue that answers each with accept, join, ignore or refuse.
//!
//! Called by the VM service for every action request; the agent never sees one that was not accepted here.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::vm_phase::VmPhase;
use crate::{OperationId, Time, VolumeId};

/// Longest time a caller may give a guest to shut down, in seconds.
pub const SHUTDOWN_TIMEOUT_MAX: u32 = 3600;
/// When the caller gives none.
pub const SHUTDOWN_TIMEOUT_DEFAULT: u32 = 90;

/// What is being done with a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum VmAction {
    /// Cold start, or from saved memory when it is suspended.
    Start,
    /// ACPI power button; after `timeout` seconds force it off, when `force` is set, else give up.
    Shutdown {
        timeout: u32,
        force: bool,
    },
    /// Pull the plug; also drops saved memory.
    Stop,
    /// The reset button.
    Reset,
    /// Shutdown with force, then start.
    Reboot {
        timeout: u32,
    },
    /// Freeze the vCPUs.
    Pause,
    /// From paused or suspended.
    Resume,
    /// Memory to a file, process ends.
    Suspend,
    /// New root disk, same identity. The old one is dropped once the new one is there.
    Rebuild {
        volume: VolumeId,
    },
    /// Plug in a disk that `spec.disks` has already.
    Attach {
        volume: VolumeId,
    },
    /// Pull out a disk; `spec.disks` has it until it is out.
    Detach {
        volume: VolumeId,
    },
    Delete,
}

impl VmAction {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Shutdown { .. } => "shutdown",
            Self::Stop => "stop",
            Self::Reset => "reset",
            Self::Reboot { .. } => "reboot",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Suspend => "suspend",
            Self::Rebuild { .. } => "rebuild",
            Self::Attach { .. } => "attach",
            Self::Detach { .. } => "detach",
            Self::Delete => "delete",
        }
    }

    /// Seconds until the step counts as failed when the node says nothing.
    pub const fn deadline_secs(&self) -> u32 {
        match self {
            Self::Start | Self::Resume | Self::Rebuild { .. } => 300,
            Self::Shutdown { timeout, .. } => *timeout + 60,
            Self::Reboot { timeout } => *timeout + 300,
            Self::Stop | Self::Delete => 120,
            Self::Reset | Self::Pause | Self::Attach { .. } | Self::Detach { .. } => 60,
            Self::Suspend => 900,
        }
    }
}

/// The one thing in progress on a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmTask {
    pub operation: OperationId,
    #[serde(flatten)]
    pub action: VmAction,
    pub requested: Time,
    /// Past it the task has failed.
    pub deadline: Time,
}

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Do it. A task in progress is superseded by it.
    Accept,
    /// The same is in progress: the caller gets that operation.
    Join(OperationId),
    /// It is so already.
    Already,
    /// It cannot be done now: why, and what to do.
    Refuse { detail: String, hint: String },
}

fn refuse(detail: impl Into<String>, hint: impl Into<String>) -> Decision {
    Decision::Refuse { detail: detail.into(), hint: hint.into() }
}

/// Decides what to do with a request for `action` on a VM that shows `phase` and works on `task`.
pub fn decide(action: &VmAction, phase: VmPhase, task: Option<&VmTask>) -> Decision {
    if let Some(task) = task {
        return decide_busy(action, task);
    }
    let not_now =
        |need: &str, hint: &str| refuse(format!("the VM is {phase}; {} needs {need}", action.name()), hint);
    match action {
        VmAction::Delete => Decision::Accept,
        VmAction::Start => match phase {
            VmPhase::Running => Decision::Already,
            VmPhase::Stopped | VmPhase::Error | VmPhase::Suspended | VmPhase::Pending => Decision::Accept,
            VmPhase::Paused => not_now("a stopped VM", "resume it: ostler vm resume"),
            VmPhase::Unknown => not_now("a known state", "see why: ostler vm show"),
            _ => not_now("a stopped VM", "wait for it: ostler vm show"),
        },
        VmAction::Stop => match phase {
            VmPhase::Stopped => Decision::Already,
            // From an error or an unknown state stop makes sure that nothing runs.
            _ => Decision::Accept,
        },
        VmAction::Shutdown { .. } => match phase {
            VmPhase::Stopped => Decision::Already,
            VmPhase::Running => Decision::Accept,
            VmPhase::Paused => not_now("a running VM", "resume it first, or ostler vm stop"),
            _ => not_now("a running VM", "force it off: ostler vm stop"),
        },
        VmAction::Reboot { .. } => match phase {
            VmPhase::Running => Decision::Accept,
            VmPhase::Stopped => not_now("a running VM", "start it: ostler vm start"),
            _ => not_now("a running VM", "ostler vm stop and ostler vm start work from here"),
        },
        VmAction::Reset => match phase {
            VmPhase::Running | VmPhase::Paused => Decision::Accept,
            _ => not_now("a running VM", "start it: ostler vm start"),
        },
        VmAction::Pause => match phase {
            VmPhase::Paused => Decision::Already,
            VmPhase::Running => Decision::Accept,
            _ => not_now("a running VM", "start it: ostler vm start"),
        },
        VmAction::Resume => match phase {
            VmPhase::Running => Decision::Already,
            VmPhase::Paused | VmPhase::Suspended => Decision::Accept,
            _ => not_now("a paused or suspended VM", "start it: ostler vm start"),
        },
        VmAction::Suspend => match phase {
            VmPhase::Suspended => Decision::Already,
            VmPhase::Running | VmPhase::Paused => Decision::Accept,
            _ => not_now("a running VM", "start it: ostler vm start"),
        },
        VmAction::Rebuild { .. } => match phase {
            VmPhase::Running | VmPhase::Stopped | VmPhase::Paused | VmPhase::Error | VmPhase::Suspended => {
                Decision::Accept
            }
            _ => not_now("a settled VM", "stop it first: ostler vm stop"),
        },
        VmAction::Attach { .. } | VmAction::Detach { .. } => match phase {
            // Saved memory knows the hardware it was saved with.
            VmPhase::Suspended => not_now("a running or stopped VM", "resume it: ostler vm resume"),
            VmPhase::Running | VmPhase::Paused | VmPhase::Stopped | VmPhase::Error | VmPhase::Pending => {
                Decision::Accept
            }
            _ => not_now("a settled VM", "wait for it: ostler vm show"),
        },
    }
}

/// Stop and delete always get through; the same again joins; all else waits its turn.
fn decide_busy(action: &VmAction, task: &VmTask) -> Decision {
    let same = std::mem::discriminant(action) == std::mem::discriminant(&task.action);
    match (action, &task.action) {
        (VmAction::Delete, VmAction::Delete) => Decision::Join(task.operation),
        (_, VmAction::Delete) => refuse("the VM is being deleted", "create another one"),
        (VmAction::Delete, _) => Decision::Accept,
        // A rebuild has two disks in its hands: it finishes or fails by itself.
        (VmAction::Stop, VmAction::Rebuild { .. }) => refuse(
            format!("the VM is being rebuilt (operation {})", task.operation),
            "wait for it: ostler operation show",
        ),
        (VmAction::Rebuild { .. }, VmAction::Rebuild { .. }) => refuse(
            format!("the VM is being rebuilt already (operation {})", task.operation),
            "wait for it: ostler operation show",
        ),
        // The same only when it is the same disk.
        (VmAction::Attach { volume }, VmAction::Attach { volume: other })
        | (VmAction::Detach { volume }, VmAction::Detach { volume: other })
            if volume != other =>
        {
            refuse(
                format!(
                    "{} of another disk is in progress (operation {})",
                    task.action.name(),
                    task.operation
                ),
                "wait for it: ostler operation show",
            )
        }
        _ if same => Decision::Join(task.operation),
        (VmAction::Stop, _) => Decision::Accept,
        _ => refuse(
            format!("{} is in progress (operation {})", task.action.name(), task.operation),
            "wait for it (ostler operation show), cancel it, or ostler vm stop",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_actions() -> Vec<VmAction> {
        vec![
            VmAction::Start,
            VmAction::Shutdown { timeout: 1, force: true },
            VmAction::Stop,
            VmAction::Reset,
            VmAction::Reboot { timeout: 1 },
            VmAction::Pause,
            VmAction::Resume,
            VmAction::Suspend,
            VmAction::Rebuild { volume: VolumeId::new() },
            VmAction::Attach { volume: VolumeId::new() },
            VmAction::Detach { volume: VolumeId::new() },
            VmAction::Delete,
        ]
    }

    fn task(action: VmAction) -> VmTask {
        VmTask { operation: OperationId::new(), action, requested: Time::now(), deadline: Time::now() }
    }

    #[test]
    fn from_error_start_stop_rebuild_and_delete_work() {
        for action in all_actions() {
            let escapes = matches!(
                action,
                VmAction::Start
                    | VmAction::Stop
                    | VmAction::Rebuild { .. }
                    | VmAction::Attach { .. }
                    | VmAction::Detach { .. }
                    | VmAction::Delete
            );
            assert_eq!(
                decide(&action, VmPhase::Error, None) == Decision::Accept,
                escapes,
                "{}",
                action.name()
            );
        }
    }

    #[test]
    fn delete_gets_through_from_every_phase_and_task() {
        for phase in VmPhase::ALL {
            assert_eq!(decide(&VmAction::Delete, *phase, None), Decision::Accept);
            for running in all_actions() {
                let task = task(running);
                let answer = decide(&VmAction::Delete, *phase, Some(&task));
                match task.action {
                    VmAction::Delete => assert_eq!(answer, Decision::Join(task.operation)),
                    _ => assert_eq!(answer, Decision::Accept),
                }
            }
        }
    }

    #[test]
    fn nothing_comes_between_a_delete_and_its_end() {
        let task = task(VmAction::Delete);
        for action in all_actions() {
            let answer = decide(&action, VmPhase::Deleting, Some(&task));
            assert!(matches!(answer, Decision::Join(_) | Decision::Refuse { .. }), "{}", action.name());
        }
    }

    #[test]
    fn the_wanted_state_twice_is_no_second_task() {
        for (action, phase) in [
            (VmAction::Start, VmPhase::Running),
            (VmAction::Stop, VmPhase::Stopped),
            (VmAction::Shutdown { timeout: 1, force: false }, VmPhase::Stopped),
            (VmAction::Pause, VmPhase::Paused),
            (VmAction::Resume, VmPhase::Running),
            (VmAction::Suspend, VmPhase::Suspended),
        ] {
            assert_eq!(decide(&action, phase, None), Decision::Already);
        }
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        for action in all_actions() {
            for phase in VmPhase::ALL {
                for task in [None, Some(task(VmAction::Start)), Some(task(VmAction::Suspend))] {
                    if let Decision::Refuse { detail, hint } = decide(&action, *phase, task.as_ref()) {
                        assert!(!detail.is_empty() && !hint.is_empty());
                    }
                }
            }
        }
    }
}
