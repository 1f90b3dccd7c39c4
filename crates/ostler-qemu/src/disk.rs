//! Disks: what one is made of, what limits it has, and what a running machine tells of it.
//!
//! A disk is a stack of files. Each may carry a *name*, which the block node in QEMU is named after, so that a running
//! QEMU can be asked which file takes the writes without any record of ours (`args::names` has the scheme).

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

/// One file of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskLayer {
    pub path: PathBuf,
    pub format: DiskFormat,
    /// What [`DiskState::top`] gives back: letters, digits and `_`, unique within the disk, and with the disk's id at most
    /// 26 characters. The last 12 hexadecimal digits of a UUID do. A layer that takes part in snapshots needs one.
    pub name: Option<String>,
}

impl DiskLayer {
    pub fn new(path: impl Into<PathBuf>, format: DiskFormat) -> Self {
        Self { path: path.into(), format, name: None }
    }

    pub fn named(self, name: impl Into<String>) -> Self {
        Self { name: Some(name.into()), ..self }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskBus {
    #[default]
    Virtio,
    /// On the machine's one virtio-scsi controller, which is there when the machine started with a disk of this bus or
    /// was told to have one ([`DiskPlaces::scsi`]).
    Scsi,
    Sata,
    Ide,
}

impl fmt::Display for DiskBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Virtio => "virtio",
            Self::Scsi => "scsi",
            Self::Sata => "sata",
            Self::Ide => "ide",
        })
    }
}

/// What the host keeps in memory of a disk. The guest's flushes reach the medium with each of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskCache {
    /// The host's page cache; the guest sees a disk with a volatile cache.
    #[default]
    Writeback,
    /// Past the host's page cache (`O_DIRECT`, Linux AIO). Refused by file systems that lack it.
    None,
    /// The host's page cache, and each write is flushed: for guests that never flush.
    Writethrough,
}

/// What becomes of blocks that the guest discards or fills with zeroes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskDiscard {
    /// Given back to the pool.
    #[default]
    Unmap,
    /// Kept; zeroes are still noted rather than written where the format can.
    Ignore,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskSpec {
    /// Short and unique within the machine: `[a-z0-9-]`, at most 20 characters.
    pub id: String,
    /// The file that takes the writes first, then each file below it. What a header says of a backing file is not used.
    pub layers: Vec<DiskLayer>,
    pub bus: DiskBus,
    pub read_only: bool,
    pub cdrom: bool,
    /// At most 20 printable ASCII characters.
    pub serial: Option<String>,
    /// Lower boots first.
    pub boot_index: Option<u32>,
    pub cache: DiskCache,
    pub discard: DiskDiscard,
    pub limits: DiskLimits,
    /// Of a virtio or SCSI disk: its number on the bus, which decides where the guest finds it. None takes the first free
    /// one. A saved state is restored, and a machine migrated, with the places of [`DiskState::place`].
    pub place: Option<u16>,
}

/// The room for disks that a machine is started with. The guest sees it, so a saved state is restored, and a machine
/// migrated, with the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPlaces {
    /// How many virtio disks fit: root ports on q35, fixed elsewhere.
    pub virtio: u16,
    /// Whether there is a SCSI controller.
    pub scsi: bool,
}

/// In operations or bytes a second; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    pub sustained: u64,
    /// What is allowed for [`DiskLimits::burst_seconds`] at a stretch; at least `sustained`, which it needs.
    pub burst: u64,
}

impl Rate {
    pub fn sustained(sustained: u64) -> Self {
        Self { sustained, burst: 0 }
    }
}

/// A total excludes the limits for reads and writes alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLimits {
    pub iops_total: Rate,
    pub iops_read: Rate,
    pub iops_write: Rate,
    pub bps_total: Rate,
    pub bps_read: Rate,
    pub bps_write: Rate,
    /// How long bursts last; 0 is one second. Needs a burst.
    pub burst_seconds: u32,
}

impl DiskLimits {
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// Whether a disk's last request worked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DiskIo {
    #[default]
    Ok,
    /// There was no room for it.
    NoSpace,
    Failed,
}

/// A disk of a running machine, as QEMU has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskState {
    pub id: String,
    /// The name of the layer that takes the writes; none when it was given none.
    pub top: Option<String>,
    pub node_name: String,
    /// In bytes, as the guest sees it.
    pub virtual_size: u64,
    pub read_only: bool,
    pub limits: DiskLimits,
    /// None for disks on SATA and IDE.
    pub place: Option<u16>,
    /// What the guest waits for, while it waits.
    pub io: DiskIo,
}

/// One disk of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotDisk {
    pub id: String,
    /// An empty qcow2 file of the disk's size, with a name, that takes the writes from then on.
    pub overlay: DiskLayer,
}

/// What a stream copies, and how fast.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stream {
    /// What stays below the top; none copies all there is.
    pub base: Option<StreamBase>,
    /// 0 is as fast as it goes.
    pub bytes_per_second: u64,
}

/// What is merged into what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// The name of the uppermost layer that goes. Not the top, which the guest writes to: stream that.
    pub layer: String,
    /// The layer further down that takes what it and those between hold. It is opened for writing, so nothing else may
    /// lie on it.
    pub into: DiskLayer,
    /// The layer above `layer`, whose header is written at the end; none when that is the top, which is written to anyway.
    pub above: Option<DiskLayer>,
    /// What the header of the layer above `layer` says of its backing file afterwards.
    pub backing_file: String,
    /// 0 is as fast as it goes.
    pub bytes_per_second: u64,
}

/// Where a stream ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamBase {
    /// The name of the layer that stays below the top.
    pub layer: String,
    /// What the top's header says of its backing file afterwards. QEMU knows its files as descriptors only, so it cannot
    /// tell by itself.
    pub backing_file: String,
}
