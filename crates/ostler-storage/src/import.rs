//! The image store and the way of an image into it: staging, unpacking, checking, converting, renaming into place.

mod export;
mod finish;
mod staging;
mod store;
mod unpack;
mod upload;

use std::fmt;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use store::ImageStore;
pub use upload::{Upload, UploadSource};

use crate::{ImageContent, ImageFormat, ProbeLimits, StorageError};

/// A stored image: what names its file.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ImageRef {
    /// SHA-256 of the stored bytes, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// `Raw` or `Qcow2`.
    pub format: ImageFormat,
}

impl ImageRef {
    /// The file name in a store or pool. Refuses what is not a digest, so that no path can be smuggled in.
    pub fn file_name(&self) -> Result<String, StorageError> {
        check_digest(&self.sha256)?;
        match self.format {
            ImageFormat::Raw | ImageFormat::Qcow2 => Ok(format!("{}.{}", self.sha256, self.format)),
            ImageFormat::Vmdk | ImageFormat::Vdi | ImageFormat::Vhdx => Err(StorageError::Invalid {
                what: "image format",
                why: format!("images are stored as raw or qcow2, never as {}", self.format),
            }),
        }
    }

    /// The image that a file of this name holds, if it is one of ours.
    pub(crate) fn from_file_name(name: &str) -> Option<Self> {
        let (sha256, format) = name.split_once('.')?;
        let image = Self { sha256: sha256.to_owned(), format: format.parse().ok()? };
        image.file_name().is_ok().then_some(image)
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image {}.{}", self.sha256, self.format)
    }
}

/// Checks that a text is a SHA-256 in lower-case hexadecimal.
pub(crate) fn check_digest(text: &str) -> Result<(), StorageError> {
    if text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        Ok(())
    } else {
        Err(StorageError::Invalid {
            what: "SHA-256",
            why: format!("{text:?} is not 64 lower-case hexadecimal digits"),
        })
    }
}

/// What an import is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImportStage {
    /// Bytes come in.
    #[default]
    Transfer,
    /// The uploaded bytes are read and compared with the expected checksum.
    Checksum,
    Unpack,
    /// `qemu-img check` reads the tables.
    Check,
    Convert,
    /// The result is read once for its digest and written to disk.
    Store,
}

impl ImportStage {
    /// A word for a progress line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Transfer => "transfer",
            Self::Checksum => "checksum",
            Self::Unpack => "unpack",
            Self::Check => "check",
            Self::Convert => "convert",
            Self::Store => "store",
        }
    }
}

/// How far an import is: `done` of `total` in the unit of the stage (bytes; hundredths of a percent for `Convert`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImportProgress {
    pub stage: ImportStage,
    pub done: u64,
    /// Unknown for a download without a length.
    pub total: Option<u64>,
}

/// How to end an import.
#[derive(Debug, Clone)]
pub struct FinishOptions {
    /// SHA-256 of the uploaded bytes, as they came (so of the compressed file if it was compressed).
    pub expected_sha256: Option<String>,
    pub limits: ProbeLimits,
    pub progress: watch::Sender<ImportProgress>,
    pub cancel: CancellationToken,
}

/// The result of an import.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportedImage {
    /// SHA-256 of the stored file.
    pub sha256: String,
    /// SHA-256 of the uploaded bytes.
    pub source_sha256: String,
    /// `Raw` or `Qcow2`: how it is stored.
    pub format: ImageFormat,
    pub source_format: ImageFormat,
    pub content: ImageContent,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Length of the stored file.
    pub stored_size: u64,
}

impl ImportedImage {
    /// The name of the stored file.
    pub fn image_ref(&self) -> ImageRef {
        ImageRef { sha256: self.sha256.clone(), format: self.format }
    }
}
