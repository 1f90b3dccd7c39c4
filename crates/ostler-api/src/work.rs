//! The words between the server and a node's agent: work down, reports up.
//!
//! The agent opens `GET /v1/nodes/{node}/work` and gets [`WorkLine`]s: first everything that is placed on it, then
//! `Synced`, then changes. It answers with batches of [`Report`]s. Both are level-triggered: a lost line heals at the
//! next `Synced`, a lost report is sent again.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::snapshot::Snapshot;
use crate::vm::{Vm, VmObserved};
use crate::volume::Volume;
use crate::{ByteSize, Fault, OperationId, SnapshotId, StreamId, VmId, VolumeId};

/// One line of a node's work stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum WorkLine {
    /// First line. A store that is another cloud's, or older than what the agent has seen, must not make it drop VMs.
    Hello {
        cloud: Uuid,
        revision: u64,
    },
    /// A VM that is placed here, new or changed.
    Vm {
        vm: Box<Vm>,
    },
    /// It is no longer placed here: end it, keep nothing of it.
    VmGone {
        vm: VmId,
    },
    Volume {
        volume: Box<Volume>,
    },
    VolumeGone {
        volume: VolumeId,
    },
    /// A snapshot to take, to go back to or to delete, or one that is here.
    Snapshot {
        snapshot: Box<Snapshot>,
    },
    SnapshotGone {
        snapshot: SnapshotId,
    },
    /// An image file that no resource needs any more.
    ImageGone {
        sha256: String,
    },
    /// The checksums of all images there are, before `Synced`: a cached file of any other is not needed.
    Images {
        sha256: Vec<String>,
    },
    /// All that is placed here has been sent; what the agent has besides is not wanted.
    Synced {
        revision: u64,
    },
    /// Somebody wants to talk with a VM: connect `GET /v1/nodes/{node}/streams/{stream}` and join the two.
    Stream {
        stream: StreamRequest,
    },
    /// Nothing happened; the connection lives.
    Bookmark {
        revision: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StreamRequest {
    pub id: StreamId,
    pub vm: VmId,
    #[serde(flatten)]
    pub what: StreamKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "stream", rename_all = "snake_case")]
pub enum StreamKind {
    /// The serial console, both ways, after `scrollback` bytes of what it printed before.
    Console { scrollback: u64 },
    /// The display, RFB.
    Vnc,
    /// What the serial console has printed, at most the last `tail` bytes; goes on with `follow`.
    Log { tail: u64, follow: bool },
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Report {
    Vm(Box<VmReport>),
    Volume(VolumeReport),
    Snapshot(SnapshotReport),
}

/// What the node sees of a VM now, and its answer to the VM's task once there is one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmReport {
    pub vm: VmId,
    pub observed: VmObserved,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<TaskAnswer>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TaskAnswer {
    pub operation: OperationId,
    /// The name of the action answered, since a rebuild and the start behind it are one operation.
    pub action: String,
    pub outcome: TaskOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum TaskOutcome {
    Progress { stage: String, done: u64, total: Option<u64> },
    Done,
    Failed { fault: Fault },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VolumeReport {
    pub volume: VolumeId,
    pub state: VolumeState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum VolumeState {
    Ready {
        used: ByteSize,
        /// Bytes the guest sees.
        size: ByteSize,
    },
    Failed {
        fault: Fault,
    },
    /// How far a flatten is, in hundredths of a percent.
    Flattening {
        operation: OperationId,
        done: u64,
    },
    Flattened {
        operation: OperationId,
        used: ByteSize,
    },
    NotFlattened {
        operation: OperationId,
        fault: Fault,
    },
    /// It is there, and cannot grow to the size that is wanted.
    NotGrown {
        size: ByteSize,
        fault: Fault,
    },
    /// Deleted, or was never there.
    Gone,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotReport {
    pub snapshot: SnapshotId,
    pub state: SnapshotState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum SnapshotState {
    Ready,
    /// It could not be taken, or not be deleted yet.
    Failed {
        fault: Fault,
    },
    Reverted {
        operation: OperationId,
    },
    NotReverted {
        operation: OperationId,
        fault: Fault,
    },
    /// Deleted, or was never there.
    Gone,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Reports {
    pub reports: Vec<Report>,
}

/// Which reports were taken. One that was not is about something that is no longer placed here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReportsTaken {
    pub taken: u32,
    pub dropped: u32,
}

/// The answer to a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Heartbeat {
    /// Seconds without one after which the node counts as unreachable.
    pub lease_secs: u32,
}
