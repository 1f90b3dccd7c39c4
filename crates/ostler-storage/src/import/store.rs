//! The directory of images.

use std::path::{Path, PathBuf};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{FinishOptions, ImageRef, ImportProgress, ImportedImage, Upload};
use crate::{ImageFormat, ImportError, QemuImg, StorageError};

/// Images addressed by their SHA-256: `<dir>/<sha256>.<raw|qcow2>`, and `<dir>/incoming/` for what is on its way.
#[derive(Debug, Clone)]
pub struct ImageStore {}

impl ImageStore {
    /// Opens or creates a store. Intermediate files that a killed import left are removed; uploads stay.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, StorageError> {
        Self::open_with(dir, QemuImg::default())
    }

    /// Like `open`, with a certain `qemu-img`.
    pub fn open_with(_dir: impl Into<PathBuf>, _tool: QemuImg) -> Result<Self, StorageError> {
        unimplemented!()
    }

    /// Where an image's file is, whether it exists or not.
    pub fn path(&self, _image: &ImageRef) -> PathBuf {
        unimplemented!()
    }

    /// Opens the staging file `id`, new or where it was left. `busy` while someone else holds it.
    pub async fn upload(&self, _id: &str) -> Result<Upload, StorageError> {
        unimplemented!()
    }

    /// Removes everything staged under `id`; fine when there is nothing.
    pub async fn discard(&self, _id: &str) -> Result<(), StorageError> {
        unimplemented!()
    }

    /// Turns a complete upload into a stored image. May be called again after a crash at any point, also after it had
    /// ended well; call `discard(id)` once the result is recorded.
    pub async fn finish(&self, _id: &str, _options: FinishOptions) -> Result<ImportedImage, ImportError> {
        unimplemented!()
    }

    /// Removes a stored image; fine when it is gone already.
    pub async fn delete(&self, _image: &ImageRef) -> Result<(), StorageError> {
        unimplemented!()
    }

    /// Reads a stored image and compares its digest with its name.
    pub async fn verify(&self, _image: &ImageRef) -> Result<(), StorageError> {
        unimplemented!()
    }

    /// Writes an image to the new file `to` in `format`.
    pub async fn export(
        &self,
        _image: &ImageRef,
        _format: ImageFormat,
        _to: &Path,
        _progress: &watch::Sender<ImportProgress>,
        _cancel: &CancellationToken,
    ) -> Result<(), StorageError> {
        unimplemented!()
    }

    /// Every stored image.
    pub fn list(&self) -> Result<Vec<ImageRef>, StorageError> {
        unimplemented!()
    }

    /// Removes everything staged under ids that are not in `keep`, and returns the ids removed.
    pub async fn sweep(&self, _keep: &[String]) -> Result<Vec<String>, StorageError> {
        unimplemented!()
    }
}
