//! Images: read-only, addressed by checksum, what root disks, kernels and CDs are made from.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::metadata::Labels;
use crate::resource::{resource, words};
use crate::{ByteSize, Fault, ImageId, Metadata, Name};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    pub metadata: Metadata,
    pub spec: ImageSpec,
    pub status: ImageStatus,
}

resource!(Image, Image, project: true, phase: |image| image.status.phase.as_str(), node: |_image| None);

words! {
    ImageFormat { Raw => "raw", Qcow2 => "qcow2", Vmdk => "vmdk", Vdi => "vdi", Vhdx => "vhdx" }
}

words! {
    /// What is in it, found from the content.
    ImageContent { Disk => "disk", Iso => "iso", Kernel => "kernel", Initrd => "initrd" }
}

words! {
    ImagePhase {
        /// Waits for its data.
        Queued => "queued",
        /// Data comes in.
        Uploading => "uploading",
        /// Is being unpacked, checked and converted.
        Importing => "importing",
        Active => "active",
        Error => "error",
        Deleting => "deleting",
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageSpec {
    /// Fetched by the server when set; else the data is uploaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// SHA-256 that the data as given must have, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_sha256: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageStatus {
    pub phase: ImagePhase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Fault>,
    /// Set when active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<ImageData>,
}

/// What is known of an active image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageData {
    /// SHA-256 of the image as stored, in hex: its address.
    pub sha256: String,
    /// SHA-256 of the data as given.
    pub source_sha256: String,
    /// As stored: `raw` or `qcow2`.
    pub format: ImageFormat,
    /// As given.
    pub source_format: ImageFormat,
    pub content: ImageContent,
    /// Size a guest sees.
    pub virtual_size: ByteSize,
    /// Size of the stored file.
    pub size: ByteSize,
}

/// An image as a spec refers to it: resolved once, so that check and use see the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageUse {
    pub image: ImageId,
    pub sha256: String,
    pub format: ImageFormat,
    pub virtual_size: ByteSize,
}

/// A new image. With `url` the server fetches it; else upload with `PUT /v1/images/{image}/upload`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageCreate {
    pub name: Name,
    #[serde(default)]
    pub labels: Labels,
    #[serde(default)]
    pub url: Option<String>,
    #[serde(default)]
    pub expected_sha256: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImagePatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
}

/// How far an upload is: go on from `offset`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UploadState {
    /// Bytes that are safely here.
    pub offset: u64,
}
