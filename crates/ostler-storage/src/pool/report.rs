//! What the calls about snapshots and care answer, and the handle of a long piece of work.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Layer;

/// A long piece of work as its caller sees it; clones are the same work.
#[derive(Debug, Clone, Default)]
pub struct Work {
    /// Ends the work with `cancelled`. Dropping the call's future does, too.
    pub cancel: CancellationToken,
    /// Hundredths of a percent.
    progress: Arc<AtomicU64>,
}

impl Work {
    /// What is done, in hundredths of a percent.
    pub fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    pub(super) fn advance(&self, done: u64) {
        self.progress.store(done, Ordering::Relaxed);
    }

    /// The same work, which the guard also ends when the caller's future is dropped.
    pub(super) fn guarded(&self) -> (Self, tokio_util::sync::DropGuard) {
        let cancel = self.cancel.child_token();
        let work = Self { cancel: cancel.clone(), progress: Arc::clone(&self.progress) };
        (work, cancel.drop_guard())
    }
}

/// A snapshot as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    pub id: Uuid,
    /// The volume it was taken of, which may be gone.
    pub volume: Uuid,
    /// The frozen layer.
    pub layer: Uuid,
    /// Not committed yet: see [`super::Pool::recover`].
    pub prepared: bool,
    /// Bytes that a guest saw.
    pub virtual_size: u64,
    /// Bytes that its layer takes, without those below it: what was written between the snapshot before and this one.
    pub used: u64,
}

/// What QEMU needs to switch an open volume to a new layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotPlan {
    /// The chain that the snapshot freezes, top first, with the image if there is one.
    pub frozen: Vec<Layer>,
    /// The new empty layer, which names the first of `frozen` as its backing file.
    pub overlay: Layer,
    /// Layers in `frozen`, without the image.
    pub depth: u32,
}

/// A layer that could be merged into the only one that stands on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Merge {
    pub layer: Uuid,
    pub into_child: Uuid,
}

/// What a check of a volume's layers found, after the repair if there was one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// No corruption is left. Leaks only take room.
    pub clean: bool,
    /// Clusters that take room and are not used.
    pub leaks: u64,
    /// Entries that are wrong.
    pub corruptions: u64,
    /// Leaks and corruptions that were repaired.
    pub repaired: u64,
}

/// What does not add up in a pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Audit {
    pub orphans: Vec<Orphan>,
    pub broken: Vec<Broken>,
}

/// A file that no volume, no snapshot and no image accounts for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    pub path: PathBuf,
    pub bytes: u64,
    pub why: String,
}

/// A volume or a snapshot that cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Broken {
    Volume { id: Uuid, why: String },
    Snapshot { id: Uuid, why: String },
}
