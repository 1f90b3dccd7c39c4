//! A pool in a directory of any file system: `<dir>/images/<sha256>.<raw|qcow2>` and `<dir>/volumes/<uuid>.qcow2`.
//!
//! A volume is a qcow2 file whose header we wrote; its backing file can be nothing but `../images/<sha256>.<format>`.
//! The header is all that is ever read of it, and guests cannot write there.
//!
//! Locks are on `volumes.lock` and `images.lock` in `<dir>` and hold between processes too: who adds a file holds the shared
//! lock, who looks at all of them to remove something holds the exclusive one.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use tokio::io::AsyncReadExt;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    ImageSource, Layer, NewVolume, Pool, PoolKind, PoolUsage, VolumeInfo, VolumeSource, check_new_volume,
    check_same, volume_missing,
};
use crate::{
    ImageFormat, ImageRef, ProbeLimits, StorageError, blocking,
    files::{self, Context, Lock, LockKind, Scratch},
    probe::{probe, window::Window},
    qcow2,
};

/// Prefix of files that are not whole yet.
const SCRATCH: &str = ".new-";
/// What a volume's header says before its backing image.
const IMAGES: &str = "../images/";

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
}

/// What a volume's header says.
struct Volume {
    virtual_size: u64,
    used: u64,
    image: Option<ImageRef>,
}

impl DirPool {
    /// Opens or creates a pool and removes what a killed process left half-written.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StorageError> {
        let dir = std::path::absolute(dir.into()).context("resolve", Path::new("."))?;
        let inner = Inner { images: dir.join("images"), volumes: dir.join("volumes"), dir };
        for (folder, lock) in [(&inner.images, inner.image_lock()), (&inner.volumes, inner.volume_lock())] {
            files::create_dir(folder)?;
            // While someone adds a file, its scratch file is not garbage.
            if let Some(_lock) = Lock::try_exclusive(&lock)? {
                sweep(folder)?;
            }
        }
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

    fn image_path(&self, image: &ImageRef) -> Result<PathBuf, StorageError> {
        Ok(self.images.join(image.file_name()?))
    }

    fn volume_path(&self, id: Uuid) -> PathBuf {
        self.volumes.join(format!("{id}.qcow2"))
    }

    fn volume_ids(&self) -> Result<Vec<Uuid>, StorageError> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.volumes).context("list", &self.volumes)? {
            let name = entry.context("list", &self.volumes)?.file_name();
            let id: Option<Uuid> =
                name.to_str().and_then(|name| name.strip_suffix(".qcow2")).and_then(|id| id.parse().ok());
            ids.extend(id);
        }
        Ok(ids)
    }

    /// Reads a volume's header; `None` when there is no such volume.
    fn volume_read(&self, id: Uuid) -> Result<Option<Volume>, StorageError> {
        let path = self.volume_path(id);
        let mut file = match files::open_regular(&path) {
            Err(StorageError::NotFound { .. }) => return Ok(None),
            other => other?,
        };
        let used = file.metadata().context("look at", &path)?.blocks() * 512;
        let damaged = |why: String| StorageError::Damaged { path: path.clone(), why };
        let header = Window::new(&mut file)
            .and_then(|mut window| match qcow2::is_qcow2(&mut window)? {
                true => qcow2::Header::read(&mut window).map(Some),
                false => Ok(None),
            })
            .map_err(|refusal| damaged(refusal.to_string()))?
            .ok_or_else(|| damaged("it is not a qcow2 file".to_owned()))?;
        if header.crypt_method != 0 || header.incompatible != 0 || header.data_file.is_some() {
            return Err(damaged(format!(
                "its header has features that we never set ({:#x})",
                header.incompatible
            )));
        }
        let image = match (&header.backing_file, &header.backing_format) {
            (None, _) => None,
            (Some(name), format) => {
                let image = name.strip_prefix(IMAGES).and_then(ImageRef::from_file_name);
                let image = image.filter(|image| format.as_deref() == Some(image.format.as_str()));
                Some(image.ok_or_else(|| {
                    damaged(format!("its backing file {name:?} is not an image of this pool"))
                })?)
            }
        };
        Ok(Some(Volume { virtual_size: header.size, used, image }))
    }

    fn volume_info(&self, id: Uuid) -> Result<Option<VolumeInfo>, StorageError> {
        let volume = self.volume_read(id)?;
        Ok(volume.map(|volume| VolumeInfo { id, virtual_size: volume.virtual_size, used: volume.used }))
    }

    fn volume_create(&self, new: &NewVolume) -> Result<VolumeInfo, StorageError> {
        check_new_volume(new)?;
        let _lock = Lock::wait(&self.volume_lock(), LockKind::Shared)?;
        if let Some(existing) = self.volume_read(new.id)? {
            check_same(new, existing.virtual_size, existing.image.as_ref())?;
            return Ok(VolumeInfo { id: new.id, virtual_size: existing.virtual_size, used: existing.used });
        }
        let empty = match &new.source {
            VolumeSource::Blank => qcow2::Empty::new(new.size, None),
            VolumeSource::Image { image, .. } => {
                let minimum = self.image_size(image)?;
                if new.size < minimum {
                    return Err(StorageError::TooSmall { size: new.size, minimum });
                }
                let name = format!("{IMAGES}{}", image.file_name()?);
                qcow2::Empty::new(new.size, Some((&name, image.format)))
            }
        };
        let scratch = scratch(&self.volumes)?;
        empty.write(&scratch.file).context("write", &scratch.path)?;
        scratch.publish(&self.volume_path(new.id), 0o600)?;
        // Someone else may have made it at the same moment: then theirs counts, if it is the same.
        let made = self.volume_read(new.id)?.ok_or_else(|| volume_missing(new.id))?;
        check_same(new, made.virtual_size, made.image.as_ref())?;
        Ok(VolumeInfo { id: new.id, virtual_size: made.virtual_size, used: made.used })
    }

    /// The virtual size of a cached image, which must still stand on its own.
    fn image_size(&self, image: &ImageRef) -> Result<u64, StorageError> {
        let path = self.image_path(image)?;
        let mut file = match files::open_regular(&path) {
            Err(StorageError::NotFound { .. }) => {
                return Err(StorageError::NotFound { what: image.to_string() });
            }
            other => other?,
        };
        let damaged = |why: String| StorageError::Damaged { path: path.clone(), why };
        let mut window = Window::new(&mut file).map_err(|refusal| damaged(refusal.to_string()))?;
        match image.format {
            ImageFormat::Qcow2 => qcow2::Header::read(&mut window)
                .and_then(|header| header.refuse_references().map(|()| header.size))
                .map_err(|refusal| damaged(refusal.to_string())),
            ImageFormat::Raw => Ok(window.len().next_multiple_of(512)),
            ImageFormat::Vmdk | ImageFormat::Vdi | ImageFormat::Vhdx => {
                Err(damaged(format!("{} is not a format that we store", image.format)))
            }
        }
    }

    fn volume_layers(&self, id: Uuid) -> Result<Vec<Layer>, StorageError> {
        let volume = self.volume_read(id)?.ok_or_else(|| volume_missing(id))?;
        let mut layers = vec![Layer { path: self.volume_path(id), format: ImageFormat::Qcow2 }];
        if let Some(image) = volume.image {
            self.image_size(&image)?;
            layers.push(Layer { path: self.image_path(&image)?, format: image.format });
        }
        Ok(layers)
    }

    fn image_remove(&self, image: &ImageRef) -> Result<(), StorageError> {
        let path = self.image_path(image)?;
        let _lock = Lock::wait(&self.volume_lock(), LockKind::Exclusive)?;
        if !path.exists() {
            return Ok(());
        }
        for id in self.volume_ids()? {
            let by = match self.volume_read(id) {
                Ok(Some(volume)) if volume.image.as_ref() == Some(image) => format!("volume {id}"),
                Ok(_) => continue,
                // A volume that cannot be read may stand on anything.
                Err(_) => format!("volume {id}, maybe: its header cannot be read"),
            };
            return Err(StorageError::InUse { what: image.to_string(), by });
        }
        files::remove(&path)?;
        files::sync_dir(&self.images)
    }

    /// Takes an image from a file: the same inode where possible, else the same blocks, else a copy that is checked.
    fn image_add_file(
        &self,
        image: &ImageRef,
        from: &Path,
        cancel: &CancellationToken,
    ) -> Result<(), StorageError> {
        let to = self.image_path(image)?;
        if to.exists() {
            return Ok(());
        }
        let source = files::open_regular(from)?;
        check_content(image, &source, from)?;
        // A name that is a link is not followed by `open_regular`, and here it would be linked as such.
        match fs::hard_link(from, &to) {
            Ok(()) => return files::sync_dir(&self.images),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
            // Another file system, too many links, or not allowed: then the bytes are taken.
            Err(_) => {}
        }
        let _lock = Lock::wait(&self.image_lock(), LockKind::Shared)?;
        let part = scratch(&self.images)?;
        if !files::reflink(&source, &part.file) {
            files::copy_sparse(&source, from, &part.file, &part.path, cancel, |_| {})?;
        }
        let actual = files::digest(&part.file, &part.path, false, cancel, |_| {})?;
        self.image_publish(image, part, actual)
    }

    fn image_publish(&self, image: &ImageRef, part: Scratch, actual: String) -> Result<(), StorageError> {
        if actual != image.sha256 {
            return Err(StorageError::Checksum {
                what: image.to_string(),
                expected: image.sha256.clone(),
                actual,
            });
        }
        check_content(image, &part.file, &part.path)?;
        part.publish(&self.image_path(image)?, 0o444)?;
        Ok(())
    }

    fn usage(&self) -> Result<PoolUsage, StorageError> {
        let stat =
            rustix::fs::statvfs(&self.dir).map_err(std::io::Error::from).context("look at", &self.dir)?;
        let mut provisioned = 0u64;
        for id in self.volume_ids()? {
            // A damaged volume, or one that was just deleted, promises nothing.
            if let Ok(Some(volume)) = self.volume_read(id) {
                provisioned = provisioned.saturating_add(volume.virtual_size);
            }
        }
        Ok(PoolUsage {
            total: stat.f_blocks * stat.f_frsize,
            used: (stat.f_blocks - stat.f_bfree) * stat.f_frsize,
            available: stat.f_bavail * stat.f_frsize,
            provisioned,
        })
    }
}

/// The file must be what the reference says, and stand on its own.
fn check_content(image: &ImageRef, mut file: &fs::File, path: &Path) -> Result<(), StorageError> {
    let damaged = |why: String| StorageError::Damaged { path: path.to_owned(), why };
    let probed = probe(&mut file, &ProbeLimits { max_virtual_size: u64::MAX })
        .map_err(|refusal| damaged(refusal.to_string()))?;
    if probed.format == image.format {
        Ok(())
    } else {
        Err(damaged(format!("it is {} and should be {}", probed.format, image.format)))
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
                let cancel = CancellationToken::new();
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
        self.run("volume-delete", move |inner| {
            if files::remove(&inner.volume_path(id))? {
                files::sync_dir(&inner.volumes)?;
            }
            Ok(())
        })
        .await
    }

    async fn volume_list(&self) -> Result<Vec<Uuid>, StorageError> {
        self.run("volume-list", Inner::volume_ids).await
    }
}
