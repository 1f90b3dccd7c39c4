//! Storage pools: where a node keeps cached images, the disks of its VMs and their snapshots.
//!
//! Who calls it: the node agent, with ids and sizes that the control plane decided. Kinds to come (a directory shared
//! between hosts, Ceph RBD) implement the same trait and pass the same conformance suite.
//!
//! # Layers, volumes, snapshots
//!
//! - A *layer* holds blocks over nothing, over a cached image or over one other layer. What a layer does not hold shows
//!   through from below.
//! - A *volume* points to its *top*, the one layer that is written to. A layer with a layer on it, or with a snapshot, is
//!   *frozen*: what it reads as never changes again. (`merge` moves blocks into a frozen layer; it reads the same after.)
//! - A *snapshot* points to a layer and freezes it. It does not need its volume: it stays when the volume is deleted, and
//!   any number of volumes can be made from it.
//! - A layer that no top, no snapshot and no other layer needs is garbage, and only [`Pool::collect`] removes it. So
//!   deleting a snapshot in the middle of a tree removes a pointer and touches no data.
//!
//! # Taking a snapshot of a volume that a machine has open
//!
//! `snapshot_prepare` makes the empty layer, QEMU's `blockdev-snapshot` switches to it, `snapshot_commit` moves the volume's
//! pointer. When nobody has the volume open, the first and the last are all there is to it.
//!
//! After a crash between them the snapshot is *prepared*. While no machine runs it is always committed forward
//! ([`Pool::recover`]): if QEMU never switched, the new layer is empty and reads as the frozen one; if it did, the new layer
//! holds the data. Nothing is lost either way. While a machine runs, QEMU's block graph says which layer it writes to:
//! commit if that is the new one, else `snapshot_abort`.
//!
//! # What callers promise
//!
//! Calls marked *closed* need that no machine has the volume open; the pool cannot see machines. `merge` needs that no
//! machine has the child open. All calls may be repeated at any time, also after a crash in the middle.

mod dir;
mod report;
mod sim;
mod tree;

use std::{collections::HashSet, fmt::Debug, path::PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt};
use uuid::Uuid;

pub use dir::DirPool;
pub use report::{Audit, Broken, CheckReport, Merge, Orphan, SnapshotInfo, SnapshotPlan, Work};
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
    /// A writable layer over a committed snapshot of this pool: a linked clone.
    Snapshot { snapshot: Uuid },
}

/// A volume to create.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NewVolume {
    pub id: Uuid,
    /// Bytes, a multiple of 512; at least the virtual size of the image or the snapshot.
    pub size: u64,
    pub source: VolumeSource,
}

/// A volume as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    pub id: Uuid,
    /// Bytes that the guest sees.
    pub virtual_size: u64,
    /// Bytes that its layers take in the pool and that no other volume, no snapshot of another volume and no snapshot of a
    /// deleted volume needs. Its own snapshots count as far as it stands on them; its image never counts.
    pub used: u64,
    /// Layers in its chain, without the image: 1 when it was just made from an image.
    pub depth: u32,
    /// The layer that is written to.
    pub top: Uuid,
}

/// One file of a volume's chain, to be opened with exactly this driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub path: PathBuf,
    pub format: ImageFormat,
}

impl Layer {
    /// The id of a volume's layer; `None` for an image.
    pub fn id(&self) -> Option<Uuid> {
        self.path.file_stem()?.to_str()?.parse().ok()
    }

    /// What the header of a layer that stands on this one says of it. For QEMU, which writes that header when it has merged
    /// layers of an open volume and knows its files as descriptors only.
    pub fn backing_name(&self) -> Option<String> {
        let name = self.path.file_name()?.to_str()?;
        Some(match self.id() {
            Some(_) => name.to_owned(),
            None => format!("{IMAGES}{name}"),
        })
    }
}

/// What a layer's header says before the file name of an image.
const IMAGES: &str = "../images/";

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
    /// with another, `conflict`. A volume that was grown, flattened or snapshotted since is no longer "the same". The id of
    /// a deleted volume is free again once `collect` has removed what snapshots needed of it.
    async fn volume_create(&self, volume: &NewVolume) -> Result<VolumeInfo, StorageError>;

    /// The whole chain of files, top first, checked against what the headers say.
    async fn volume_layers(&self, id: Uuid) -> Result<Vec<Layer>, StorageError>;

    async fn volume_info(&self, id: Uuid) -> Result<Option<VolumeInfo>, StorageError>;

    /// Deletes a volume; fine when it is gone already. Layers that snapshots and other volumes need stay until `collect`
    /// finds them without use.
    async fn volume_delete(&self, id: Uuid) -> Result<(), StorageError>;

    /// Every volume, in no order.
    async fn volume_list(&self) -> Result<Vec<Uuid>, StorageError>;

    /// Grows a volume; *closed*. Fine when it has that size already; `too_small` when it is larger. A prepared snapshot is
    /// committed first. For an open volume use QEMU's `block_resize`.
    async fn volume_grow(&self, id: Uuid, size: u64) -> Result<VolumeInfo, StorageError>;

    /// Walks the tables of each layer; *closed*. With `repair`, faults and leaks of the top are repaired; the layers below
    /// it may be in use elsewhere and are only looked at.
    async fn volume_check(&self, id: Uuid, repair: bool, work: &Work) -> Result<CheckReport, StorageError>;

    /// Makes a volume stand on nothing but its top; *closed*. A prepared snapshot is committed first. Cancelled, it leaves
    /// the volume as it was, with some room taken that `volume_check` gives back. Also what is empty is compared, so a very
    /// large volume takes its time however little it holds (a minute for a terabyte).
    async fn flatten(&self, volume: Uuid, work: &Work) -> Result<(), StorageError>;

    /// Makes the empty layer `new_layer` over the volume's top and notes the snapshot as prepared. With the same ids again it
    /// is fine and tells the same; `busy` while another snapshot of the volume is prepared.
    async fn snapshot_prepare(
        &self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<SnapshotPlan, StorageError>;

    /// Makes the new layer the volume's top and the snapshot a committed one; fine when it is already.
    async fn snapshot_commit(&self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError>;

    /// Forgets a prepared snapshot and removes its empty layer; fine when it is gone. `conflict` when it was committed.
    async fn snapshot_abort(&self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError>;

    /// Commits what was prepared for a volume and says which; *closed*. Fine when there is no such volume.
    async fn recover(&self, volume: Uuid) -> Result<Vec<Uuid>, StorageError>;

    /// Makes a new empty layer over one of the volume's own snapshots its top; *closed*. The old top becomes garbage unless a
    /// snapshot needs it. A prepared snapshot is committed first.
    async fn snapshot_revert(
        &self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<VolumeInfo, StorageError>;

    /// Drops a committed snapshot; fine when it is gone. `busy` while it is only prepared.
    async fn snapshot_delete(&self, snapshot: Uuid) -> Result<(), StorageError>;

    /// Every snapshot, in no order.
    async fn snapshot_list(&self) -> Result<Vec<SnapshotInfo>, StorageError>;

    /// Deletes the layers that nothing needs, except those `in_use` by machines and what these stand on, and says which.
    /// Deletes nothing and fails with `damaged` while a chain cannot be followed to its end, because what is missing may
    /// come back from a backup.
    async fn collect(&self, in_use: &HashSet<Uuid>) -> Result<Vec<Uuid>, StorageError>;

    /// Layers that only one other layer needs, and so could be merged into it.
    async fn merge_candidates(&self) -> Result<Vec<Merge>, StorageError>;

    /// Makes `child` independent of `layer`, which it stands on, by copying what differs into it; fine when it is already.
    /// No machine may have `child` open. The child reads the same at every moment; cancelled, both are as useful as before.
    /// Afterwards `layer` is garbage.
    async fn merge(&self, layer: Uuid, child: Uuid, work: &Work) -> Result<(), StorageError>;

    /// What belongs to nothing, and what cannot be opened. Deletes nothing.
    async fn audit(&self) -> Result<Audit, StorageError>;
}

/// Largest volume, so that sums of sizes never come near 2^64.
const MAX_VOLUME: u64 = 1 << 50;

/// Checks what every kind of pool demands of a new volume.
fn check_new_volume(volume: &NewVolume) -> Result<(), StorageError> {
    let size = volume.size;
    check_size(size)?;
    match &volume.source {
        VolumeSource::Blank | VolumeSource::Snapshot { .. } => Ok(()),
        VolumeSource::Image { image, virtual_size } => {
            image.file_name()?;
            if size < *virtual_size {
                return Err(StorageError::TooSmall { size, minimum: *virtual_size });
            }
            Ok(())
        }
    }
}

fn check_size(size: u64) -> Result<(), StorageError> {
    if size == 0 || !size.is_multiple_of(512) || size > MAX_VOLUME {
        return Err(StorageError::Invalid {
            what: "volume size",
            why: format!("{size} bytes is not a multiple of 512 between 512 and {MAX_VOLUME}"),
        });
    }
    Ok(())
}

/// Checks a size to grow to. False when there is nothing to do.
fn check_grow(now: u64, size: u64) -> Result<bool, StorageError> {
    check_size(size)?;
    if size < now {
        return Err(StorageError::TooSmall { size, minimum: now });
    }
    Ok(size > now)
}

fn volume_missing(id: Uuid) -> StorageError {
    StorageError::NotFound { what: format!("volume {id}") }
}

fn snapshot_missing(id: Uuid) -> StorageError {
    StorageError::NotFound { what: format!("snapshot {id}") }
}

fn conflict(what: String, difference: impl Into<String>) -> StorageError {
    StorageError::Conflict { what, difference: difference.into() }
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
