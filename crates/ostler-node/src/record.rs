//! What the agent remembers of a VM across its own restarts and the host's.
//!
//! A record only says what QEMU and the host cannot be asked for: whose VM it is, what it was started with, whether it
//! should be running, whether its memory was saved, and what was answered last. What is true now is read from QEMU.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ostler_api::vm::{EndCause, MachineFacts};
use ostler_api::work::TaskOutcome;
use ostler_api::{Fault, OperationId, VolumeId};
use ostler_qemu::DiskPlaces;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One VM.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The cloud it belongs to.
    pub(crate) cloud: Option<Uuid>,
    /// The newest revision of it that was seen here.
    pub(crate) revision: u64,
    /// A store that is older than this record did not list it: it is left alone until it is listed again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) estranged: bool,
    /// Last generation reported.
    pub(crate) generation: u64,
    /// Set while its machine should exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) run: Option<Run>,
    /// How its last run ended, until the next one begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ended: Option<Ended>,
    /// The machine type, CPU model and accelerator of the last start: a guest keeps its hardware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) hardware: Option<Hardware>,
    /// Its memory is in the state file.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) saved: bool,
    /// Where its disks were then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) saved_disks: Option<SavedDisks>,
    /// The last task that was answered, so that it is not done twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) answered: Option<Answered>,
    /// A reboot under way: the operation, and the run that it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reboot: Option<(OperationId, Option<Uuid>)>,
}

/// The places of a machine's disks, which saved memory is bound to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedDisks {
    pub(crate) room: DiskPlaces,
    /// By the disk's name in the machine.
    pub(crate) places: BTreeMap<String, u16>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub(crate) cause: EndCause,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fault: Option<Fault>,
}

/// One start to the next end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) boot: Uuid,
    /// The host's boot id then.
    pub(crate) host_boot: String,
    /// Known once it has started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) facts: Option<MachineFacts>,
    /// The volumes it has open.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) volumes: Vec<VolumeId>,
    /// Where QEMU logs the serial console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) console_log: Option<PathBuf>,
    /// Set before it is ended on purpose, so that an end of the agent in between does not make it a death.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ending: Option<EndCause>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hardware {
    pub(crate) machine_version: String,
    pub(crate) cpu_model: String,
    pub(crate) accelerator: ostler_api::Accelerator,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answered {
    pub(crate) operation: OperationId,
    pub(crate) action: String,
    pub(crate) outcome: TaskOutcome,
}

/// One volume: whose it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VolumeRecord {
    pub(crate) cloud: Option<Uuid>,
    pub(crate) revision: u64,
}

/// The newest state of the cloud that this node has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) cloud: Option<Uuid>,
    pub(crate) revision: u64,
}
