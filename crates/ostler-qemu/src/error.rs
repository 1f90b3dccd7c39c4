//! What can go wrong, in three kinds: talking to QEMU, starting a machine, everything else.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use uuid::Uuid;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error with all that led to it, on one line: what failed, then each reason. For people; the messages alone leave
/// out their sources.
pub fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let reason = source.to_string();
        // Some messages have taken their source in already.
        if !text.ends_with(&reason) {
            text = format!("{text}: {reason}");
        }
        next = source.source();
    }
    text
}

/// Talking to QEMU's monitor failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("QEMU's monitor cannot be reached")]
    Connect(#[source] io::Error),
    #[error("QEMU's monitor closed the connection")]
    Closed,
    #[error("QEMU did not answer '{command}' within {} ms", after.as_millis())]
    Timeout { command: &'static str, after: Duration },
    #[error("QEMU's monitor sent what is not QMP: {0}")]
    Protocol(String),
    /// Too many commands wait for an answer already.
    #[error("QEMU has not answered earlier commands, so '{command}' was not sent")]
    Backlog { command: &'static str },
    #[error("QEMU refused '{command}': {desc}")]
    Refused { command: &'static str, class: String, desc: String },
}

/// An operation on a machine failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("{what} '{}' failed", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("machine {id} still runs as process {pid}: end it first")]
    StillRunning { id: Uuid, pid: u32 },
    #[error("machine {id} has ended")]
    Ended { id: Uuid },
    #[error("process {pid} of machine {id} did not end within {} s after it was killed: it hangs in the kernel, most likely on a disk that does not answer", after.as_secs())]
    Unkillable { id: Uuid, pid: u32, after: Duration },
    #[error("the machine's state could not be written: {0}")]
    Save(String),
    #[error("machine {id} has no {what}")]
    Missing { id: Uuid, what: &'static str },
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Made to fail by a test through the simulated hypervisor.
    #[error("simulated failure: {0}")]
    Simulated(String),
}

/// An operation on a disk of a running machine failed. The disk is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("the machine has no disk '{disk}'")]
    NotAttached { disk: String },
    #[error("disk '{disk}' is attached already, with layer '{top}' on top: detach it first")]
    OtherAttached { disk: String, top: String },
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    #[error("disk '{disk}' cannot be attached to or detached from a running machine: {reason}")]
    NotHotPluggable { disk: String, reason: String },
    #[error(
        "there is no free {bus} place for disk '{disk}': detach another disk, or restart the machine, which makes more places"
    )]
    NoPlace { disk: String, bus: crate::disk::DiskBus },
    /// A file of the disk.
    #[error(transparent)]
    File(Box<StartError>),
    #[error("the files of disk '{disk}' could not be opened within {} s: does their file system answer?", after.as_secs())]
    FileTimeout { disk: String, after: Duration },
    /// It stays attached and usable; a guest that lets go later has it removed by the next attempt.
    #[error("the guest did not release disk '{disk}' within {} s: unmount it in the guest and try again, or stop the machine", after.as_secs())]
    GuestDidNotRelease { disk: String, after: Duration },
    #[error("disk '{disk}' has {from} bytes and cannot shrink to {to}")]
    Shrink { disk: String, from: u64, to: u64 },
    #[error("disk '{disk}' has {size} bytes and its new layer {overlay}: make it of the same size")]
    SizeDiffers { disk: String, size: u64, overlay: u64 },
    #[error("disk '{disk}' is read-only")]
    ReadOnly { disk: String },
    #[error("disk '{disk}' has no layer '{layer}'")]
    NoLayer { disk: String, layer: String },
    /// The new layers of a snapshot were in place for some disks only: not something a snapshot of ours leaves.
    #[error("the snapshot is in place for some of its disks only (disk '{disk}' lacks it)")]
    PartOfSnapshot { disk: String },
    #[error("the work on disk '{disk}' failed: {reason}")]
    Job { disk: String, reason: String },
    #[error("the work on disk '{disk}' was cancelled")]
    Cancelled { disk: String },
}

impl DiskError {
    pub(crate) fn fixed_bus(disk: &str) -> Self {
        let reason =
            "the sata and ide controllers cannot do that: use bus virtio or scsi, or stop the machine first";
        Self::NotHotPluggable { disk: disk.into(), reason: reason.into() }
    }

    pub(crate) fn no_scsi(disk: &str) -> Self {
        let reason = "the machine has no SCSI controller: it gets one when it starts with a scsi disk or is told to have one";
        Self::NotHotPluggable { disk: disk.into(), reason: reason.into() }
    }

    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }
}

/// Checks that are shared with the start speak of it.
impl From<StartError> for DiskError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Invalid { field, reason } => Self::Invalid { field, reason },
            other => Self::File(Box::new(other)),
        }
    }
}

impl Error {
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}

/// A machine did not start. Nothing of it runs.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("machine {id} already runs as process {pid}")]
    AlreadyRunning { id: Uuid, pid: u32 },
    /// Another start of it has not ended yet.
    #[error("machine {id} is being started already")]
    StartUnderWay { id: Uuid },
    #[error("{binary} was not found: install QEMU (Debian and Ubuntu: apt-get install qemu-system-x86)")]
    BinaryMissing { binary: String },
    #[error(
        "UEFI firmware was not found in {searched}: install it (Debian and Ubuntu: apt-get install ovmf)"
    )]
    FirmwareMissing { searched: String },
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    #[error("port {port} on {addr} cannot be forwarded: {reason}")]
    PortInUse { addr: std::net::IpAddr, port: u16, reason: String },
    #[error("not enough memory on the host for a guest of {memory_bytes} bytes: {last_words}")]
    OutOfMemory { memory_bytes: u64, last_words: String },
    #[error("{what} '{}' cannot be opened: {source}", path.display())]
    File { what: String, path: PathBuf, source: io::Error },
    #[error("disk {disk} cannot be used: {reason}")]
    BadImage { disk: String, reason: String },
    #[error("the saved state cannot be restored: {last_words}")]
    BadState { last_words: String },
    #[error("all {count} user ids of this host are in use by machines: give the agent a larger range")]
    NoFreeUser { count: u32 },
    #[error("QEMU ended while it started ({how}): {last_words}")]
    Died { how: String, last_words: String },
    #[error("QEMU was not ready within {} s: {last_words}", after.as_secs())]
    Timeout { after: Duration, last_words: String },
    #[error("QEMU refused the machine: {source}; {last_words}")]
    Qmp { source: QmpError, last_words: String },
    #[error("{what} failed")]
    Io { what: String, source: io::Error },
    /// Made to fail by a test through the simulated hypervisor.
    #[error("simulated failure: {0}")]
    Simulated(String),
}

impl StartError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), reason: reason.into() }
    }
}
