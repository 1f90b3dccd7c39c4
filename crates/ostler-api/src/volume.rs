//! Volumes: the disks of VMs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::image::ImageUse;
use crate::metadata::Labels;
use crate::resource::{resource, words};
use crate::{ByteSize, Fault, Metadata, Name, VmId};

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
    /// The VM it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmId>,
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
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumePatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
}
