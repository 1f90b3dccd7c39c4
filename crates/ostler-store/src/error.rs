//! What can go wrong with a store, with what a person can do about it. Callers decide by variant; the text is for the log
//! and for the operator.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{LeaseId, Revision};

pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// An error is cloned for every transaction of a group commit that failed, hence the shared sources.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error(
        "the history up to revision {compacted} is gone: list again and watch from the revision of the list"
    )]
    TooOld {
        /// The newest revision that can no longer be watched.
        compacted: Revision,
    },
    #[error("revision {asked} lies in the future: the store is at {current}")]
    FutureRevision { asked: Revision, current: Revision },
    #[error("lease {id} does not exist or has ended: ask for a new one")]
    LeaseNotFound { id: LeaseId },
    #[error("{what} is too large: {size}, at most {limit} are allowed")]
    TooLarge { what: String, size: usize, limit: usize },
    #[error("the request is not valid: {reason}")]
    Invalid { reason: String },
    #[error("{} is in use by another server{}: stop that one, or choose another data directory", path.display(), holder(*pid))]
    Locked { path: PathBuf, pid: Option<u32> },
    #[error("the database {} is damaged ({detail}): {restore}", path.display())]
    Damaged { path: PathBuf, detail: String, restore: String },
    #[error("{} is not a database of Ostler ({detail}): choose another data directory, or move the file away", path.display())]
    NotADatabase { path: PathBuf, detail: String },
    #[error(
        "the stored data has schema version {found}, this server knows versions up to {supported}: run a newer server, \
         or restore the copy that was made before the upgrade"
    )]
    SchemaTooNew { found: u32, supported: u32 },
    #[error("the stored data has schema version {found} and not {expected}: nothing was upgraded")]
    SchemaMismatch { found: u32, expected: u32 },
    #[error("key {key} cannot be upgraded ({reason}): nothing was changed")]
    Upgrade { key: String, reason: String },
    #[error("no room left for {}: nothing was changed; free some disk space and try again", path.display())]
    Full { path: PathBuf },
    #[error("{doing} failed")]
    Io {
        doing: String,
        #[source]
        source: Arc<dyn Error + Send + Sync>,
    },
    #[error("the store is closed")]
    Closed,
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
}

impl StoreError {
    pub(crate) fn io(doing: impl Into<String>, source: impl Error + Send + Sync + 'static) -> Self {
        Self::Io { doing: doing.into(), source: Arc::new(source) }
    }

    pub(crate) fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid { reason: reason.into() }
    }

    /// An I/O error on a file, with a full disk told apart.
    pub(crate) fn file(doing: &str, path: &Path, source: std::io::Error) -> Self {
        match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Self::Full { path: path.to_owned() }
            }
            _ => Self::io(format!("{doing} {}", path.display()), source),
        }
    }
}
