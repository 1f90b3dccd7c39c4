//! Cached images of a pool in a directory: taken as the same inode where possible, checked, and kept while a layer stands on
//! them.

use std::{fs, path::Path};

use tokio_util::sync::CancellationToken;

use super::{Inner, scratch};
use crate::{
    ImageFormat, ImageRef, ProbeLimits, StorageError,
    files::{self, Lock, LockKind, Scratch},
    probe::{probe, window::Window},
    qcow2,
};

impl Inner {
    /// The virtual size of a cached image, which must still stand on its own.
    pub(super) fn image_size(&self, image: &ImageRef) -> Result<u64, StorageError> {
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

    pub(super) fn image_remove(&self, image: &ImageRef) -> Result<(), StorageError> {
        let path = self.image_path(image)?;
        let _lock = Lock::wait(&self.volume_lock(), LockKind::Exclusive)?;
        if !path.exists() {
            return Ok(());
        }
        let scan = self.scan()?;
        if let Some(by) = scan.image_holder(image) {
            return Err(StorageError::InUse { what: image.to_string(), by });
        }
        files::remove(&path)?;
        files::sync_dir(&self.images)
    }

    /// Takes an image from a file: the same inode where possible, else the same blocks, else a copy that is checked.
    pub(super) fn image_add_file(
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

    pub(super) fn image_publish(
        &self,
        image: &ImageRef,
        part: Scratch,
        actual: String,
    ) -> Result<(), StorageError> {
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
