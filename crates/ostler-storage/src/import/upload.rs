//! A staging file that survives restarts: bytes are appended, and `offset` tells where to go on.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::staging::{Mark, Staging};
use crate::{
    StorageError, blocking,
    files::{Context, Lock},
};

/// Where a download came from, so that it can go on after a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadSource {
    pub url: String,
    /// Names the version of the file: a strong `ETag` or a `Last-Modified` date, as the server wrote it.
    pub validator: String,
}

/// What uploads leave free of a file system, though never more than one part in [`RESERVE_PART`] of it. The control plane's
/// database is often on the same one: filled to the last byte, not even deleting the image could be written down.
const RESERVE_MAX: u64 = 64 << 20;
const RESERVE_PART: u64 = 32;

/// An upload in progress; only one holder at a time. Dropping it keeps what was written.
#[derive(Debug)]
pub struct Upload {
    /// Also held by a write whose caller went away, so that nobody else gets the file before it ends.
    held: Arc<Held>,
    offset: u64,
    mark: Mark,
}

#[derive(Debug)]
struct Held {
    staging: Staging,
    file: File,
    _lock: Lock,
}

impl Upload {
    pub(super) fn open(staging: Staging) -> Result<Self, StorageError> {
        let lock = staging.lock()?;
        let (file, offset, mark) = staging.open_upload()?;
        Ok(Self { held: Arc::new(Held { staging, file, _lock: lock }), offset, mark })
    }

    /// Bytes staged so far: where the sender goes on.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Where the bytes so far came from, if a download brought them.
    pub fn source(&self) -> Option<&UploadSource> {
        self.mark.source.as_ref()
    }

    /// Appends bytes. When this is cut off, the offset stays, and the same bytes may be written again.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), StorageError> {
        let (held, offset, len) = (self.held.clone(), self.offset, bytes.len() as u64);
        blocking::run("upload-write", move || {
            check_room(&held.file, len)
                .and_then(|()| held.file.write_all_at(&bytes, offset))
                .context("write", &held.staging.upload())
        })
        .await?;
        self.offset += len;
        Ok(())
    }

    /// Makes what was written so far survive a crash of the machine.
    pub async fn sync(&mut self) -> Result<(), StorageError> {
        let mark = Mark { synced: self.offset, ..self.mark.clone() };
        self.save(mark, None).await
    }

    /// Drops everything and begins again at 0.
    pub async fn restart(&mut self) -> Result<(), StorageError> {
        let mark = Mark { synced: 0, source: None, ..self.mark.clone() };
        self.save(mark, Some(0)).await?;
        self.offset = 0;
        Ok(())
    }

    /// Records where the bytes come from.
    pub(crate) async fn set_source(&mut self, source: Option<UploadSource>) -> Result<(), StorageError> {
        let mark = Mark { source, ..self.mark.clone() };
        self.save(mark, None).await
    }

    async fn save(&mut self, mark: Mark, truncate: Option<u64>) -> Result<(), StorageError> {
        let (held, saved) = (self.held.clone(), mark.clone());
        blocking::run("upload-sync", move || {
            let path = held.staging.upload();
            if let Some(len) = truncate {
                held.file.set_len(len).context("truncate", &path)?;
            }
            held.file.sync_data().context("sync", &path)?;
            held.staging.write_mark(&saved)
        })
        .await?;
        self.mark = mark;
        Ok(())
    }
}

/// Refuses `bytes` more when they would eat into the reserve.
fn check_room(file: &File, bytes: u64) -> io::Result<()> {
    let stat = rustix::fs::fstatvfs(file)?;
    let size = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    let reserve = RESERVE_MAX.min(size(stat.f_blocks) / RESERVE_PART);
    // A file system that does not know its size has no reserve.
    if reserve > 0 && size(stat.f_bavail) < bytes.saturating_add(reserve) {
        return Err(io::ErrorKind::StorageFull.into());
    }
    Ok(())
}
