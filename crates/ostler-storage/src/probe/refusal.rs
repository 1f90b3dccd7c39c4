//! Why an image is refused: a stable code for programs and a sentence for people.

use std::io;

use super::ImageFormat;

/// Why the prober refuses a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "the {format} image depends on the backing file {name:?}; flatten it first (qemu-img convert) and import the result"
    )]
    BackingFile { format: ImageFormat, name: String },
    #[error(
        "the {format} image keeps its data in the external file {name:?}; convert it to a self-contained image first"
    )]
    ExternalDataFile { format: ImageFormat, name: String },
    #[error(
        "the {format} image names the extent {name:?} outside itself; convert it to one self-contained file first (qemu-img convert)"
    )]
    ExternalExtent { format: ImageFormat, name: String },
    #[error("{what} is {value} bytes, over the limit of {limit} bytes")]
    TooLarge { what: &'static str, value: u64, limit: u64 },
    #[error("the {format} image is empty")]
    Empty { format: ImageFormat },
    #[error("the {format} image is damaged: {field} is {value}, {why}")]
    Damaged { format: ImageFormat, field: &'static str, value: String, why: String },
    #[error("the {format} image ends too early: {field} needs {needed} bytes and the file has {len}")]
    Truncated { format: ImageFormat, field: &'static str, needed: u64, len: u64 },
    #[error(
        "the {format} image was not closed cleanly ({why}); open and close it with the tool that wrote it, or repair a copy, and import again"
    )]
    Unclean { format: ImageFormat, why: &'static str },
    #[error("the image is encrypted ({scheme}); decrypt it before the import")]
    Encrypted { scheme: &'static str },
    #[error("version {version} of {format} is not supported")]
    UnsupportedVersion { format: ImageFormat, version: u64 },
    #[error("the {format} image needs features that are not known: {features}")]
    UnknownFeatures { format: ImageFormat, features: String },
    #[error("{what} files are not supported; convert to one of raw, qcow2, vmdk, vdi, vhdx")]
    UnsupportedFormat { what: &'static str },
    #[error("the compressed stream is damaged: {why}")]
    BadCompression { why: String },
    #[error("the file is compressed more than once; unpack the outer layer first")]
    NestedCompression,
    #[error(
        "the consistency check found {corruptions} corruptions; repair a copy with qemu-img check -r all and import that"
    )]
    Corrupt { corruptions: u64 },
    #[error("the file could not be read: {0}")]
    Unreadable(String),
}

impl Refusal {
    /// Stable name of the reason.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BackingFile { .. } => "backing_file",
            Self::ExternalDataFile { .. } => "external_data_file",
            Self::ExternalExtent { .. } => "external_extent",
            Self::TooLarge { .. } => "too_large",
            Self::Empty { .. } => "empty",
            Self::Damaged { .. } => "damaged_header",
            Self::Truncated { .. } => "truncated",
            Self::Unclean { .. } => "unclean",
            Self::Encrypted { .. } => "encrypted",
            Self::UnsupportedVersion { .. } => "unsupported_version",
            Self::UnknownFeatures { .. } => "unknown_features",
            Self::UnsupportedFormat { .. } => "unsupported_format",
            Self::BadCompression { .. } => "bad_compression",
            Self::NestedCompression => "nested_compression",
            Self::Corrupt { .. } => "corrupt",
            Self::Unreadable(_) => "unreadable",
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Unreadable(error.to_string())
    }
}
