//! Volumes: the disks of VMs, and disks on their own.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::disk::{DiskCache, DiskDiscard, DiskLimits};
use crate::image::ImageUse;
use crate::metadata::Labels;
use crate::resource::{resource, words};
use crate::{ByteSize, Fault, Metadata, Name, OperationId, SnapshotId, VmId};

pub const VOLUME_SIZE_MIN: ByteSize = ByteSize::mib(1);
pub const VOLUME_SIZE_MAX: ByteSize = ByteSize::gib(64 * 1024);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    pub metadata: Metadata,
    pub spec: VolumeSpec,
    pub status: VolumeStatus,
}

resource!(Volume, Volume, project: true, phase: |v| v.status.phase.as_str(), node: |v| v.status.node.as_ref().map(Name::as_str));

words! {
    VolumePhase {
        /// Waits for a node.
        Pending => "pending",
        /// Placed; its node makes it.
        Creating => "creating",
        Ready => "ready",
        Deleting => "deleting",
        Error => "error",
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeSpec {
    /// Bytes, a multiple of 512.
    pub size: ByteSize,
    /// Starts as a linked copy of this image; blank without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageUse>,
    /// Starts as a linked copy of what this snapshot holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotUse>,
    /// The VM that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
    /// Not to be deleted until this is taken back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub limits: DiskLimits,
    #[serde(default = "VolumeSpec::cache_default")]
    pub cache: DiskCache,
    #[serde(default = "VolumeSpec::discard_default")]
    pub discard: DiskDiscard,
}

impl VolumeSpec {
    const fn cache_default() -> DiskCache {
        DiskCache::Writeback
    }
    const fn discard_default() -> DiskDiscard {
        DiskDiscard::Unmap
    }

    /// A blank volume with every default.
    pub fn blank(size: ByteSize) -> Self {
        Self {
            size,
            image: None,
            snapshot: None,
            vm: None,
            protected: false,
            limits: DiskLimits::default(),
            cache: Self::cache_default(),
            discard: Self::discard_default(),
        }
    }
}

/// What a volume was cloned from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotUse {
    pub snapshot: SnapshotId,
    /// Which of its disks, by its id in the pool.
    pub part: Uuid,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeStatus {
    pub phase: VolumePhase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Fault>,
    /// The node whose pool holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Name>,
    /// Bytes it takes in the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<ByteSize>,
    /// Bytes the guest sees now; less than `spec.size` while it grows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// The snapshot that was taken, or gone back to, last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotId>,
    /// It is being made to stand on nothing but itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flatten: Option<OperationId>,
}

impl VolumeStatus {
    /// Of a volume that waits for a node.
    pub const fn pending() -> Self {
        Self {
            phase: VolumePhase::Pending,
            reason: None,
            node: None,
            used: None,
            size: None,
            snapshot: None,
            flatten: None,
        }
    }
}

/// A new volume. Without an image or a snapshot it is blank and reads as zeroes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreate {
    pub name: Name,
    #[serde(default)]
    pub labels: Labels,
    /// Bytes, a multiple of 512. The image's or the snapshot's when not given.
    #[serde(default)]
    pub size: Option<ByteSize>,
    /// Linked copy of this image (name or id).
    #[serde(default)]
    pub image: Option<String>,
    /// Linked copy of this snapshot (name or id).
    #[serde(default)]
    pub snapshot: Option<String>,
    /// Which disk of the snapshot, by the name its volume had; needed when there are several.
    #[serde(default)]
    pub disk: Option<String>,
    /// The node that shall hold it; the one with most room when not given.
    #[serde(default)]
    pub node: Option<Name>,
    #[serde(default)]
    pub protected: bool,
    #[serde(default)]
    pub limits: DiskLimits,
    #[serde(default = "VolumeSpec::cache_default")]
    pub cache: DiskCache,
    #[serde(default = "VolumeSpec::discard_default")]
    pub discard: DiskDiscard,
}

impl VolumeCreate {
    /// A request with every default, for callers that set a few fields.
    pub fn named(name: Name) -> Self {
        Self {
            name,
            labels: Labels::new(),
            size: None,
            image: None,
            snapshot: None,
            disk: None,
            node: None,
            protected: false,
            limits: DiskLimits::default(),
            cache: VolumeSpec::cache_default(),
            discard: VolumeSpec::discard_default(),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumePatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protected: Option<bool>,
    /// Replaces all limits, also while it is in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<DiskLimits>,
    /// Changes while no machine has it open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<DiskCache>,
    /// Changes while no machine has it open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discard: Option<DiskDiscard>,
}
