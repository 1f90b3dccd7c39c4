//! A pool in a directory of any file system.
//!
//! | file | is |
//! |---|---|
//! | `images/<sha256>.<raw or qcow2>` | a cached image |
//! | `volumes/<id>.qcow2` | a layer. Its header, which we wrote, names as backing file nothing, `../images/<sha256>.<format>` or `<id>.qcow2` |
//! | `volumes/<id>.json` | what the id is: `{"top":"<id>"}`, a volume with that top, or `"layer"`, only a layer. Without the file, a layer is also a volume whose top it is |
//! | `snapshots/<id>.json` | `{"volume":…,"layer":…}`, and `"next":…` while it is only prepared |
//! | `volumes.lock`, `images.lock`, `locks/` | locks |
//!
//! Everything is derived from these files; nothing else is remembered. Of a layer only the header is ever read here, and
//! guests cannot write there. Each file appears whole and on disk under its name, and the files of one change come in an
//! order in which every prefix means either the state before or the state after:
//!
//! - a layer that is no volume: the note that says so, then the layer; removed the other way round.
//! - a snapshot: the layer, the record with `next`, (QEMU's switch), the pointer, the record without `next`.
//! - a deleted volume: the pointer, then the records of what was prepared for it, then its top.
//!
//! Locks hold between processes too and die with their holder. On the `.lock` of a folder, who adds a file holds the shared
//! lock and who changes or removes one the exclusive one, always for milliseconds. Who works on a layer for long (merge,
//! flatten, grow, check) holds locks in `locks/`: exclusive on the layer that is written to and shared on those below it, so
//! that these are neither removed nor written to meanwhile. Others are told `busy`.

mod care;
mod image;
mod layer;
mod scan;
mod snapshot;
mod volume;
mod work;

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use uuid::Uuid;

use super::{
    Audit, CheckReport, ImageSource, Layer, Merge, NewVolume, Pool, PoolKind, PoolUsage, SnapshotInfo,
    SnapshotPlan, VolumeInfo, Work,
};
use crate::{
    ImageRef, QemuImg, StorageError, blocking,
    files::{self, Context, Lock, LockKind, Scratch},
};

/// Prefix of files that are not whole yet.
const SCRATCH: &str = ".new-";

/// A pool in a directory. Clones share it; several processes may, too.
#[derive(Debug, Clone)]
pub struct DirPool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    images: PathBuf,
    volumes: PathBuf,
    snapshots: PathBuf,
    locks: PathBuf,
    tool: QemuImg,
}

impl DirPool {
    /// Opens or creates a pool and removes what a killed process left half-written.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StorageError> {
        Self::open_with(dir, QemuImg::default())
    }

    /// Opens or creates a pool that runs this `qemu-img`.
    pub fn open_with(dir: impl Into<PathBuf>, tool: QemuImg) -> Result<Self, StorageError> {
        let dir = std::path::absolute(dir.into()).context("resolve", Path::new("."))?;
        let inner = Inner {
            images: dir.join("images"),
            volumes: dir.join("volumes"),
            snapshots: dir.join("snapshots"),
            locks: dir.join("locks"),
            dir,
            tool,
        };
        for folder in [&inner.images, &inner.volumes, &inner.snapshots, &inner.locks] {
            files::create_dir(folder)?;
        }
        files::sync_dir(&inner.dir)?;
        for (folders, lock) in [
            (&[&inner.images][..], inner.image_lock()),
            (&[&inner.volumes, &inner.snapshots][..], inner.volume_lock()),
        ] {
            // While someone adds a file, its scratch file is not garbage.
            if let Some(_lock) = Lock::try_exclusive(&lock)? {
                folders.iter().try_for_each(|folder| sweep(folder))?;
            }
        }
        inner.sweep_locks()?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The folder of the pool.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    async fn run<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce(&Inner) -> Result<T, StorageError> + Send + 'static,
    ) -> Result<T, StorageError> {
        let inner = self.inner.clone();
        blocking::run(name, move || work(&inner)).await
    }
}

fn sweep(folder: &Path) -> Result<(), StorageError> {
    for entry in fs::read_dir(folder).context("list", folder)? {
        let entry = entry.context("list", folder)?;
        if entry.file_name().as_encoded_bytes().starts_with(SCRATCH.as_bytes()) {
            files::remove(&entry.path())?;
        }
    }
    Ok(())
}

fn scratch(folder: &Path) -> Result<Scratch, StorageError> {
    Scratch::create(folder.join(format!("{SCRATCH}{}", Uuid::new_v4().simple())))
}

impl Inner {
    fn image_lock(&self) -> PathBuf {
        self.dir.join("images.lock")
    }

    fn volume_lock(&self) -> PathBuf {
        self.dir.join("volumes.lock")
    }

    fn shared(&self) -> Result<Lock, StorageError> {
        Lock::wait(&self.volume_lock(), LockKind::Shared)
    }

    fn exclusive(&self) -> Result<Lock, StorageError> {
        Lock::wait(&self.volume_lock(), LockKind::Exclusive)
    }

    fn image_path(&self, image: &ImageRef) -> Result<PathBuf, StorageError> {
        Ok(self.images.join(image.file_name()?))
    }

    fn layer_path(&self, id: Uuid) -> PathBuf {
        self.volumes.join(format!("{id}.qcow2"))
    }

    fn role_path(&self, id: Uuid) -> PathBuf {
        self.volumes.join(format!("{id}.json"))
    }

    fn record_path(&self, snapshot: Uuid) -> PathBuf {
        self.snapshots.join(format!("{snapshot}.json"))
    }
}

/// Bytes of a stream written at once.
const PIECE: usize = 1 << 20;

#[async_trait]
impl Pool for DirPool {
    fn kind(&self) -> PoolKind {
        PoolKind::Directory
    }

    async fn usage(&self) -> Result<PoolUsage, StorageError> {
        self.run("pool-usage", Inner::usage).await
    }

    async fn image_present(&self, image: &ImageRef) -> Result<bool, StorageError> {
        let path = self.inner.image_path(image)?;
        self.run("image-present", move |_| match fs::symlink_metadata(&path) {
            Ok(metadata) => Ok(metadata.is_file()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StorageError::io("look at", &path, error)),
        })
        .await
    }

    async fn image_add(&self, image: &ImageRef, from: ImageSource) -> Result<(), StorageError> {
        let image = image.clone();
        let mut stream = match from {
            ImageSource::Path(path) => {
                let cancel = tokio_util::sync::CancellationToken::new();
                let _guard = cancel.clone().drop_guard();
                return self
                    .run("image-add", move |inner| inner.image_add_file(&image, &path, &cancel))
                    .await;
            }
            ImageSource::Stream(stream) => stream,
        };
        image.file_name()?;
        let (_lock, part) = self
            .run("image-add", |inner| {
                let lock = Lock::wait(&inner.image_lock(), LockKind::Shared)?;
                Ok((lock, scratch(&inner.images)?))
            })
            .await?;
        let part = Arc::new(part);
        let (mut hasher, mut offset) = (Sha256::new(), 0u64);
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            let read = (&mut stream).take(PIECE as u64).read_to_end(&mut piece).await;
            if read.context("read the stream of", Path::new(&image.to_string()))? == 0 {
                break;
            }
            let at = offset;
            offset += piece.len() as u64;
            let target = part.clone();
            hasher = self
                .run("image-add", move |_| {
                    hasher.update(&piece);
                    files::write_sparse(&target.file, at, &piece).context("write", &target.path)?;
                    Ok(hasher)
                })
                .await?;
        }
        let actual = files::hex(&hasher.finalize());
        let part = Arc::into_inner(part).expect("no write is left");
        self.run("image-add", move |inner| {
            part.file.set_len(offset).context("write", &part.path)?;
            inner.image_publish(&image, part, actual)
        })
        .await
    }

    async fn image_remove(&self, image: &ImageRef) -> Result<(), StorageError> {
        let image = image.clone();
        self.run("image-remove", move |inner| inner.image_remove(&image)).await
    }

    async fn image_list(&self) -> Result<Vec<ImageRef>, StorageError> {
        self.run("image-list", |inner| files::list_images(&inner.images)).await
    }

    async fn volume_create(&self, volume: &NewVolume) -> Result<VolumeInfo, StorageError> {
        let volume = volume.clone();
        self.run("volume-create", move |inner| inner.volume_create(&volume)).await
    }

    async fn volume_layers(&self, id: Uuid) -> Result<Vec<Layer>, StorageError> {
        self.run("volume-layers", move |inner| inner.volume_layers(id)).await
    }

    async fn volume_info(&self, id: Uuid) -> Result<Option<VolumeInfo>, StorageError> {
        self.run("volume-info", move |inner| inner.volume_info(id)).await
    }

    async fn volume_delete(&self, id: Uuid) -> Result<(), StorageError> {
        self.run("volume-delete", move |inner| inner.volume_delete(id)).await
    }

    async fn volume_list(&self) -> Result<Vec<Uuid>, StorageError> {
        self.run("volume-list", Inner::volume_list).await
    }

    async fn volume_grow(&self, id: Uuid, size: u64) -> Result<VolumeInfo, StorageError> {
        let (work, _guard) = Work::default().guarded();
        self.run("volume-grow", move |inner| inner.volume_grow(id, size, &work)).await
    }

    async fn volume_check(&self, id: Uuid, repair: bool, work: &Work) -> Result<CheckReport, StorageError> {
        let (work, _guard) = work.guarded();
        self.run("volume-check", move |inner| inner.volume_check(id, repair, &work)).await
    }

    async fn flatten(&self, volume: Uuid, work: &Work) -> Result<(), StorageError> {
        let (work, _guard) = work.guarded();
        self.run("flatten", move |inner| inner.flatten(volume, &work)).await
    }

    async fn snapshot_prepare(
        &self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<SnapshotPlan, StorageError> {
        self.run("snap-prepare", move |inner| inner.snapshot_prepare(volume, snapshot, new_layer)).await
    }

    async fn snapshot_commit(&self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError> {
        self.run("snap-commit", move |inner| inner.snapshot_commit(volume, snapshot)).await
    }

    async fn snapshot_abort(&self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError> {
        self.run("snap-abort", move |inner| inner.snapshot_abort(volume, snapshot)).await
    }

    async fn recover(&self, volume: Uuid) -> Result<Vec<Uuid>, StorageError> {
        self.run("snap-recover", move |inner| inner.recover(volume)).await
    }

    async fn snapshot_revert(
        &self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<VolumeInfo, StorageError> {
        self.run("snap-revert", move |inner| inner.snapshot_revert(volume, snapshot, new_layer)).await
    }

    async fn snapshot_delete(&self, snapshot: Uuid) -> Result<(), StorageError> {
        self.run("snap-delete", move |inner| inner.snapshot_delete(snapshot)).await
    }

    async fn snapshot_list(&self) -> Result<Vec<SnapshotInfo>, StorageError> {
        self.run("snap-list", Inner::snapshot_list).await
    }

    async fn collect(&self, in_use: &HashSet<Uuid>) -> Result<Vec<Uuid>, StorageError> {
        let in_use = in_use.clone();
        self.run("pool-collect", move |inner| inner.collect(&in_use)).await
    }

    async fn merge_candidates(&self) -> Result<Vec<Merge>, StorageError> {
        self.run("pool-merges", Inner::merge_candidates).await
    }

    async fn merge(&self, layer: Uuid, child: Uuid, work: &Work) -> Result<(), StorageError> {
        let (work, _guard) = work.guarded();
        self.run("layer-merge", move |inner| inner.merge(layer, child, &work)).await
    }

    async fn audit(&self) -> Result<Audit, StorageError> {
        self.run("pool-audit", Inner::audit).await
    }
}
