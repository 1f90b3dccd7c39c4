//! Errors of stores and pools, without HTTP. Each has a stable `code()` that callers map to their own answers;
//! the message says what failed with its values, and the source goes to the log.

use std::{io, path::Path, path::PathBuf};

use crate::{Refusal, ToolError};

/// Why an operation on a store or a pool failed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("{what} does not exist")]
    NotFound { what: String },
    #[error("{what} already exists and is different: {difference}")]
    Conflict { what: String, difference: String },
    #[error("{what} is in use by {by}")]
    InUse { what: String, by: String },
    #[error("{what} is being worked on by someone else; try again later")]
    Busy { what: String },
    #[error("invalid {what}: {why}")]
    Invalid { what: &'static str, why: String },
    #[error(
        "a volume of {size} bytes cannot hold what is in it, {minimum} bytes; ask for at least {minimum} bytes"
    )]
    TooSmall { size: u64, minimum: u64 },
    #[error("no space left on the file system of {}; free some or grow it", path.display())]
    NoSpace { path: PathBuf },
    #[error("{what} has SHA-256 {actual}, expected {expected}")]
    Checksum { what: String, expected: String, actual: String },
    #[error("{} is damaged or not ours: {why}", path.display())]
    Damaged { path: PathBuf, why: String },
    #[error("qemu-img failed")]
    Tool(#[from] ToolError),
    #[error("cancelled")]
    Cancelled,
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl StorageError {
    /// Stable name of the kind of failure.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "not_found",
            Self::Conflict { .. } => "conflict",
            Self::InUse { .. } => "in_use",
            Self::Busy { .. } => "busy",
            Self::Invalid { .. } => "invalid",
            Self::TooSmall { .. } => "too_small",
            Self::NoSpace { .. } => "no_space",
            Self::Checksum { .. } => "checksum_mismatch",
            Self::Damaged { .. } => "damaged",
            Self::Tool(tool) => tool.code(),
            Self::Cancelled => "cancelled",
            Self::Io { .. } => "io",
        }
    }

    /// Sorts an I/O error: a full disk, quota or file limit is `NoSpace`, a missing file is `NotFound`.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { path: path.to_owned() }
            }
            io::ErrorKind::NotFound => Self::NotFound { what: path.display().to_string() },
            _ => Self::Io { action, path: path.to_owned(), source },
        }
    }
}

/// Why an import did not end in an image. The uploaded bytes stay, unless a caller discards them.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The content is not one that we take; trying again with the same bytes gives the same answer.
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl ImportError {
    /// Stable name of the kind of failure.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Refused(refusal) => refusal.code(),
            Self::Storage(error) => error.code(),
        }
    }

    /// True when the same bytes can never be imported, so that a retry is of no use.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Refused(_) => true,
            Self::Storage(error) => matches!(error, StorageError::Checksum { .. }),
        }
    }
}

impl From<ToolError> for ImportError {
    fn from(error: ToolError) -> Self {
        Self::Storage(error.into())
    }
}
