//! The directory of images: `<dir>/<sha256>.<raw|qcow2>`, mode 0444, and `<dir>/incoming/` for what is on its way.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    FinishOptions, ImageRef, ImportProgress, ImportedImage, Upload, export, finish, staging::Staging,
};
use crate::{
    ImageFormat, ImportError, QemuImg, StorageError, blocking,
    files::{self, Context},
};

/// Images addressed by the SHA-256 of their bytes. Clones share the directory; several processes may, too.
#[derive(Debug, Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    tool: QemuImg,
}

impl Inner {
    fn incoming(&self) -> PathBuf {
        self.dir.join("incoming")
    }

    fn staging(&self, id: &str) -> Result<Staging, StorageError> {
        Staging::new(&self.incoming(), id)
    }
}

impl ImageStore {
    /// Opens or creates a store. Intermediate files that a killed import left are removed; uploads stay.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StorageError> {
        Self::open_with(dir, QemuImg::default())
    }

    /// Like `open`, with a certain `qemu-img`.
    pub fn open_with(dir: impl Into<PathBuf>, tool: QemuImg) -> Result<Self, StorageError> {
        let dir = std::path::absolute(dir.into()).context("resolve", Path::new("."))?;
        let inner = Inner { dir, tool };
        let incoming = inner.incoming();
        files::create_dir(&inner.dir)?;
        files::create_dir(&incoming)?;
        for id in Staging::ids(&incoming)? {
            let staging = Staging::new(&incoming, &id)?;
            // What is locked belongs to a living import.
            if let Some(_lock) = staging.try_lock()? {
                // A record may name one of them as the file to be stored.
                if !staging.done().exists() {
                    staging.remove_intermediate()?;
                }
            }
        }
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Where an image's file is, whether it exists or not. Of an image that could not exist, a path that does not.
    pub fn path(&self, image: &ImageRef) -> PathBuf {
        let name = image.file_name().unwrap_or_else(|_| "invalid-image-reference".to_owned());
        self.inner.dir.join(name)
    }

    /// Opens the staging file `id`, new or where it was left. `busy` while someone else holds it.
    pub async fn upload(&self, id: &str) -> Result<Upload, StorageError> {
        let staging = self.inner.staging(id)?;
        blocking::run("upload-open", move || Upload::open(staging)).await
    }

    /// Removes everything staged under `id`; fine when there is nothing. A stored image stays.
    pub async fn discard(&self, id: &str) -> Result<(), StorageError> {
        let staging = self.inner.staging(id)?;
        blocking::run("upload-discard", move || {
            let _lock = staging.lock()?;
            staging.remove_all()
        })
        .await
    }

    /// Turns a complete upload into a stored image. May be called again after a crash at any point, also after it had
    /// ended well; call `discard(id)` once the result is recorded. Dropping the future cancels the work.
    pub async fn finish(&self, id: &str, options: FinishOptions) -> Result<ImportedImage, ImportError> {
        let staging = self.inner.staging(id)?;
        let inner = self.inner.clone();
        let cancel = options.cancel.child_token();
        let _guard = cancel.clone().drop_guard();
        blocking::run("import", move || finish::finish(&inner.dir, &staging, &inner.tool, &options, &cancel))
            .await
    }

    /// Removes a stored image; fine when it is gone already.
    pub async fn delete(&self, image: &ImageRef) -> Result<(), StorageError> {
        let (inner, name) = (self.inner.clone(), image.file_name()?);
        blocking::run("image-delete", move || {
            if files::remove(&inner.dir.join(name))? {
                files::sync_dir(&inner.dir)?;
            }
            Ok(())
        })
        .await
    }

    /// Reads a stored image and compares its digest with its name.
    pub async fn verify(&self, image: &ImageRef) -> Result<(), StorageError> {
        let (path, image) = (self.inner.dir.join(image.file_name()?), image.clone());
        let cancel = CancellationToken::new();
        let _guard = cancel.clone().drop_guard();
        blocking::run("image-verify", move || {
            let file = files::open_regular(&path)?;
            let actual = files::digest(&file, &path, false, &cancel, |_| {})?;
            if actual == image.sha256 {
                Ok(())
            } else {
                Err(StorageError::Checksum { what: image.to_string(), expected: image.sha256, actual })
            }
        })
        .await
    }

    /// Writes an image to the new file `to` in `format`. The file appears whole or not at all.
    pub async fn export(
        &self,
        image: &ImageRef,
        format: ImageFormat,
        to: &Path,
        progress: &watch::Sender<ImportProgress>,
        cancel: &CancellationToken,
    ) -> Result<(), StorageError> {
        let (inner, image, to) = (self.inner.clone(), image.clone(), to.to_owned());
        let (progress, cancel) = (progress.clone(), cancel.child_token());
        let _guard = cancel.clone().drop_guard();
        blocking::run("image-export", move || {
            let path = inner.dir.join(image.file_name()?);
            export::export(&inner.tool, &path, image.format, format, &to, &progress, &cancel)
        })
        .await
    }

    /// Every stored image.
    pub fn list(&self) -> Result<Vec<ImageRef>, StorageError> {
        files::list_images(&self.inner.dir)
    }

    /// Removes everything staged under ids that are not in `keep` and that nobody works on; returns the ids removed.
    pub async fn sweep(&self, keep: &[String]) -> Result<Vec<String>, StorageError> {
        let (incoming, keep) = (self.inner.incoming(), keep.to_vec());
        blocking::run("upload-sweep", move || {
            let mut removed = Vec::new();
            for id in Staging::ids(&incoming)? {
                if keep.contains(&id) {
                    continue;
                }
                let staging = Staging::new(&incoming, &id)?;
                if let Some(_lock) = staging.try_lock()? {
                    staging.remove_all()?;
                    removed.push(id);
                }
            }
            Ok(removed)
        })
        .await
    }
}
