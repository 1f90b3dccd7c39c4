//! A pool in a directory of any file system.

use std::path::PathBuf;

use async_trait::async_trait;
use uuid::Uuid;

use super::{ImageSource, Layer, NewVolume, Pool, PoolKind, PoolUsage, VolumeInfo};
use crate::{ImageRef, StorageError};

/// A pool in a directory: `<dir>/images/<sha256>.<format>` and `<dir>/volumes/<uuid>.qcow2`.
#[derive(Debug, Clone)]
pub struct DirPool {}

impl DirPool {
    /// Opens or creates a pool and removes what a killed process left half-written.
    pub fn open(_dir: impl Into<PathBuf>) -> Result<Self, StorageError> {
        unimplemented!()
    }
}

#[async_trait]
impl Pool for DirPool {
    fn kind(&self) -> PoolKind {
        PoolKind::Directory
    }

    async fn usage(&self) -> Result<PoolUsage, StorageError> {
        unimplemented!()
    }

    async fn image_present(&self, _image: &ImageRef) -> Result<bool, StorageError> {
        unimplemented!()
    }

    async fn image_add(&self, _image: &ImageRef, _from: ImageSource) -> Result<(), StorageError> {
        unimplemented!()
    }

    async fn image_remove(&self, _image: &ImageRef) -> Result<(), StorageError> {
        unimplemented!()
    }

    async fn image_list(&self) -> Result<Vec<ImageRef>, StorageError> {
        unimplemented!()
    }

    async fn volume_create(&self, _volume: &NewVolume) -> Result<VolumeInfo, StorageError> {
        unimplemented!()
    }

    async fn volume_layers(&self, _id: Uuid) -> Result<Vec<Layer>, StorageError> {
        unimplemented!()
    }

    async fn volume_info(&self, _id: Uuid) -> Result<Option<VolumeInfo>, StorageError> {
        unimplemented!()
    }

    async fn volume_delete(&self, _id: Uuid) -> Result<(), StorageError> {
        unimplemented!()
    }

    async fn volume_list(&self) -> Result<Vec<Uuid>, StorageError> {
        unimplemented!()
    }
}
