//! Storage pools: where a node keeps cached images and the disks of its VMs.
//!
//! Who calls it: the node agent, with ids and sizes that the control plane decided. Kinds to come (a directory shared
//! between hosts, Ceph RBD) implement the same trait and pass the same conformance suite.

mod dir;
mod sim;

use std::{fmt::Debug, path::PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt};
use uuid::Uuid;

pub use dir::DirPool;
pub use sim::{SimFault, SimFaults, SimPool};

use crate::{ImageFormat, ImageRef, StorageError};

/// What stores the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolKind {
    Directory,
    Simulated,
}

/// Room in a pool, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolUsage {
    pub total: u64,
    pub used: u64,
    /// What we may still write; less than `total - used` where the file system keeps a reserve.
    pub available: u64,
    /// Sum of the virtual sizes of all volumes: what guests may come to ask for.
    pub provisioned: u64,
}

/// Where the bytes of an image come from.
pub enum ImageSource {
    /// A file of the trusted image store on this host: hard-linked where possible (then its bytes are the store's and
    /// are not read again), else copied and checked.
    Path(PathBuf),
    /// Bytes from elsewhere: written, and checked against the image's SHA-256.
    Stream(Box<dyn AsyncRead + Send + Unpin>),
}

impl Debug for ImageSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => f.debug_tuple("Path").field(path).finish(),
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

/// What a new volume begins with.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum VolumeSource {
    /// Reads as zeroes.
    Blank,
    /// A writable layer over the pool's copy of this image, which the guest sees as `virtual_size` bytes.
    Image { image: ImageRef, virtual_size: u64 },
}

/// A volume to create.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NewVolume {
    pub id: Uuid,
    /// Bytes, a multiple of 512; at least the image's virtual size.
    pub size: u64,
    pub source: VolumeSource,
}

/// A volume as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    pub id: Uuid,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Bytes that it takes in the pool, without its image.
    pub used: u64,
}

/// One file of a volume's chain, to be opened with exactly this driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub path: PathBuf,
    pub format: ImageFormat,
}

/// A place for cached images and volumes. All calls may be repeated at any time, also after a crash in the middle.
#[async_trait]
pub trait Pool: Send + Sync + Debug {
    fn kind(&self) -> PoolKind;

    async fn usage(&self) -> Result<PoolUsage, StorageError>;

    async fn image_present(&self, image: &ImageRef) -> Result<bool, StorageError>;

    /// Brings an image in; fine when it is there already.
    async fn image_add(&self, image: &ImageRef, from: ImageSource) -> Result<(), StorageError>;

    /// Drops a cached image; `in_use` while a volume stands on it, fine when it is gone already.
    async fn image_remove(&self, image: &ImageRef) -> Result<(), StorageError>;

    async fn image_list(&self) -> Result<Vec<ImageRef>, StorageError>;

    /// Creates a volume in milliseconds. The same id with the same size and source again is fine and changes nothing;
    /// with another, `conflict`.
    async fn volume_create(&self, volume: &NewVolume) -> Result<VolumeInfo, StorageError>;

    /// The chain of files, top first, checked against what the headers say.
    async fn volume_layers(&self, id: Uuid) -> Result<Vec<Layer>, StorageError>;

    async fn volume_info(&self, id: Uuid) -> Result<Option<VolumeInfo>, StorageError>;

    /// Deletes a volume; fine when it is gone already.
    async fn volume_delete(&self, id: Uuid) -> Result<(), StorageError>;

    /// Every volume, in no order.
    async fn volume_list(&self) -> Result<Vec<Uuid>, StorageError>;
}

/// Largest volume, so that sums of sizes never come near 2^64.
const MAX_VOLUME: u64 = 1 << 50;

/// Checks what every kind of pool demands of a new volume.
fn check_new_volume(volume: &NewVolume) -> Result<(), StorageError> {
    let size = volume.size;
    if size == 0 || !size.is_multiple_of(512) || size > MAX_VOLUME {
        return Err(StorageError::Invalid {
            what: "volume size",
            why: format!("{size} bytes is not a multiple of 512 between 512 and {MAX_VOLUME}"),
        });
    }
    match &volume.source {
        VolumeSource::Blank => Ok(()),
        VolumeSource::Image { image, virtual_size } => {
            image.file_name()?;
            if size < *virtual_size {
                return Err(StorageError::TooSmall { size, minimum: *virtual_size });
            }
            Ok(())
        }
    }
}

/// Checks that a volume which exists is the one asked for.
fn check_same(volume: &NewVolume, size: u64, image: Option<&ImageRef>) -> Result<(), StorageError> {
    let wanted = match &volume.source {
        VolumeSource::Blank => None,
        VolumeSource::Image { image, .. } => Some(image),
    };
    let name = |image: Option<&ImageRef>| image.map_or_else(|| "blank".to_owned(), ImageRef::to_string);
    let difference = if size != volume.size {
        format!("it has {size} bytes and {} were asked for", volume.size)
    } else if image != wanted {
        format!("it is made from {} and {} was asked for", name(image), name(wanted))
    } else {
        return Ok(());
    };
    Err(StorageError::Conflict { what: format!("volume {}", volume.id), difference })
}

fn volume_missing(id: Uuid) -> StorageError {
    StorageError::NotFound { what: format!("volume {id}") }
}

/// Reads a stream to its end and compares its digest with the image's.
async fn check_stream(
    image: &ImageRef,
    mut stream: Box<dyn AsyncRead + Send + Unpin>,
) -> Result<(), StorageError> {
    let mut hasher = Sha256::new();
    let mut buf = vec![0; 64 << 10];
    loop {
        let read = stream.read(&mut buf).await.map_err(|source| StorageError::Io {
            action: "read the stream of",
            path: image.to_string().into(),
            source,
        })?;
        if read == 0 {
            break;
        }
        hasher.update(&buf[..read]);
    }
    let actual = crate::files::hex(&hasher.finalize());
    if actual == image.sha256 {
        Ok(())
    } else {
        Err(StorageError::Checksum { what: image.to_string(), expected: image.sha256.clone(), actual })
    }
}
