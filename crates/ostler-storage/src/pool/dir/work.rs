//! Locks on single layers, for work that takes long.

use std::{fs, path::PathBuf};

use uuid::Uuid;

use super::Inner;
use crate::{
    StorageError,
    files::{self, Context, Lock, LockKind},
    pool::tree::Chain,
};

/// A lock on a layer, given back when dropped or when the process dies.
#[derive(Debug)]
pub(super) struct WorkLock {
    path: PathBuf,
    kind: LockKind,
    _lock: Lock,
}

impl Drop for WorkLock {
    fn drop(&mut self) {
        match self.kind {
            // Removed while nobody else has it, so that whoever comes next makes a new one.
            LockKind::Exclusive => drop(fs::remove_file(&self.path)),
            // Others may hold it, too: it is swept at the next start.
            LockKind::Shared => {}
        }
    }
}

impl Inner {
    fn work_path(&self, layer: Uuid) -> PathBuf {
        self.locks.join(format!("{layer}.lock"))
    }

    /// Takes the lock on a layer, or `busy`.
    pub(super) fn work_lock(&self, layer: Uuid, kind: LockKind) -> Result<WorkLock, StorageError> {
        let path = self.work_path(layer);
        let lock = match kind {
            LockKind::Exclusive => Lock::try_exclusive(&path)?,
            LockKind::Shared => Lock::try_shared(&path)?,
        };
        let lock = lock.ok_or_else(|| StorageError::Busy { what: format!("layer {layer}") })?;
        Ok(WorkLock { path, kind, _lock: lock })
    }

    /// Locks the top of a chain as told and the layers below it against writing.
    pub(super) fn work_locks(&self, chain: &Chain, top: LockKind) -> Result<Vec<WorkLock>, StorageError> {
        let kinds = std::iter::once(top).chain(std::iter::repeat(LockKind::Shared));
        chain.layers.iter().zip(kinds).map(|((id, _), kind)| self.work_lock(*id, kind)).collect()
    }

    /// Refuses while someone works on a layer.
    pub(super) fn check_idle(&self, layer: Uuid) -> Result<(), StorageError> {
        if self.work_path(layer).exists() {
            self.work_lock(layer, LockKind::Exclusive)?;
        }
        Ok(())
    }

    /// Removes the locks that nobody holds.
    pub(super) fn sweep_locks(&self) -> Result<(), StorageError> {
        for entry in fs::read_dir(&self.locks).context("list", &self.locks)? {
            let path = entry.context("list", &self.locks)?.path();
            if let Some(_lock) = Lock::try_exclusive(&path)? {
                files::remove(&path)?;
            }
        }
        Ok(())
    }
}
