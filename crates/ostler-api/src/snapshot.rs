//! Snapshots: what one or several disks held at one instant.
//!
//! A snapshot is of a VM (all its disks, at the same instant) or of one volume. Snapshots form a tree: each names the one
//! that its disks stood on when it was taken. Going back to one and taking another begins a branch.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::metadata::Labels;
use crate::resource::{resource, words};
use crate::{ByteSize, Fault, Metadata, Name, OperationId, SnapshotId, Time, VmId, VolumeId};

/// Most snapshots of one VM or volume.
pub const SNAPSHOTS_MAX: usize = 32;
/// Longest description, in characters.
pub const DESCRIPTION_MAX: usize = 1024;
/// Seconds until taking, reverting or deleting counts as failed when the node says nothing.
pub const SNAPSHOT_DEADLINE_SECS: u64 = 120;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    pub metadata: Metadata,
    pub spec: SnapshotSpec,
    pub status: SnapshotStatus,
}

resource!(Snapshot, Snapshot, project: true, phase: |s| s.status.phase.as_str(), node: |s| s.status.node.as_ref().map(Name::as_str));

words! {
    SnapshotPhase {
        /// Its node takes it.
        Creating => "creating",
        Ready => "ready",
        /// Its disks are put back to it.
        Reverting => "reverting",
        Deleting => "deleting",
        /// See the reason; deleting works.
        Error => "error",
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotSpec {
    /// The VM whose disks it holds; absent for the snapshot of a volume on its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    pub disks: Vec<SnapshotDisk>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
}

/// What it holds of one volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotDisk {
    pub volume: VolumeId,
    /// The volume's name when it was taken.
    pub name: Name,
    /// Bytes the guest saw.
    pub size: ByteSize,
    /// Its id in the pool.
    pub part: Uuid,
    /// The layer that the volume writes to from then on.
    pub layer: Uuid,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotStatus {
    pub phase: SnapshotPhase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Fault>,
    /// The node whose pool holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Name>,
    /// The snapshot its disks stood on when it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// The instant it shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken: Option<Time>,
    /// Past it, what is under way counts as failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Time>,
    /// A revert under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revert: Option<SnapshotRevert>,
}

/// Putting the disks back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotRevert {
    pub operation: OperationId,
    /// The new layer of each disk, in the order of `spec.disks`.
    pub layers: Vec<Uuid>,
}

/// A new snapshot, of a VM or of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    pub name: Name,
    #[serde(default)]
    pub labels: Labels,
    /// All disks of this VM (name or id).
    #[serde(default)]
    pub vm: Option<String>,
    /// This volume (name or id).
    #[serde(default)]
    pub volume: Option<String>,
    /// For people.
    #[serde(default)]
    pub description: String,
}

/// Changes to a snapshot. What is absent stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotPatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}
