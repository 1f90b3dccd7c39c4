//! The two traits of the driver and the values that pass through them.
//!
//! A [`Machine`] is a handle to a machine whose process exists or existed. Dropping it does nothing to the machine.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::{broadcast, watch};
use uuid::Uuid;

use crate::disk::{Commit, DiskLimits, DiskPlaces, DiskSpec, DiskState, SnapshotDisk, Stream};
use crate::error::{QmpError, Result, StartError};
use crate::host::HostProbe;
use crate::spec::{Accelerator, MachineSpec, StartOptions};

/// The machines of this host.
#[async_trait]
pub trait Hypervisor: Send + Sync + Debug {
    /// What this host can run. Cheap after the first call.
    async fn probe(&self) -> HostProbe;

    /// Starts a machine. When it fails, no process of the machine is left. A second start of a living machine is
    /// refused with [`StartError::AlreadyRunning`], also when the two race.
    async fn start(&self, spec: MachineSpec, opts: StartOptions) -> Result<Arc<dyn Machine>, StartError>;

    /// Every machine this host has a run directory of, except those whose start is under way in this process.
    async fn survey(&self) -> Result<Vec<Survey>>;

    /// Removes what is left of a dead machine (logs, sockets, records). Refused while its process lives. Idempotent.
    async fn forget(&self, id: Uuid) -> Result<()>;

    /// Ends the machine's process at once, whatever state it is in, and returns when it is gone. Idempotent.
    async fn kill(&self, id: Uuid) -> Result<()>;
}

/// One machine that was started or adopted.
#[async_trait]
pub trait Machine: Send + Sync + Debug {
    fn id(&self) -> Uuid;

    fn facts(&self) -> MachineFacts;

    async fn state(&self) -> Result<RunState, QmpError>;

    /// What happens from now on. A receiver that lags misses events: look at [`Machine::state`] then.
    fn events(&self) -> broadcast::Receiver<MachineEvent>;

    async fn pause(&self) -> Result<()>;

    async fn resume(&self) -> Result<()>;

    /// The reset button. A guest that had powered itself off starts again when it is resumed.
    async fn reset(&self) -> Result<()>;

    /// The power button: a request to the guest, which may ignore it.
    async fn powerdown(&self) -> Result<()>;

    /// Suspends to disk: stops the machine and writes its state durably to `to`. On success the machine stays stopped
    /// and the caller ends it; on failure, or when the returned future is dropped, it goes on as before and no file is
    /// left.
    async fn save(&self, to: &Path, progress: watch::Sender<Progress>) -> Result<()>;

    /// Ends the machine's process in order (disks flushed), or by force after a deadline; returns when it is gone.
    async fn quit(&self) -> Result<()>;

    /// Resolves when the process has ended. May be awaited any number of times.
    async fn exited(&self) -> ExitReport;

    /// The serial port. It has one reader at a time: a second connection waits until the first is closed.
    async fn console(&self) -> Result<UnixStream>;

    /// A VNC (RFB) connection to the screen.
    async fn vnc(&self) -> Result<UnixStream>;

    /// Where everything the guest wrote to its serial port is kept.
    fn console_log(&self) -> PathBuf;

    /// Keeps the logs below `limit` bytes: when one has grown past it, it becomes `NAME.1` and begins anew.
    async fn rotate_console_log(&self, limit: u64) -> Result<()>;

    /// Asks the guest to give back memory until it has `bytes`.
    async fn set_balloon(&self, bytes: u64) -> Result<()>;

    /// The memory the guest has now.
    async fn balloon(&self) -> Result<u64>;

    /// The disks, by id, as the process has them: also what an earlier agent attached.
    async fn disks(&self) -> Result<Vec<DiskState>>;

    /// Plugs a disk in. Nothing is left of it when that fails. No error when the same disk with the same top layer is
    /// attached already. Like each of the calls below it may be given up half way: what it left behind, the next call
    /// for the disk finishes or removes.
    async fn disk_attach(&self, disk: DiskSpec) -> Result<()>;

    /// Asks the guest to release a disk, waits for that as long as `patience`, then closes the disk's files. On
    /// [`DiskError::GuestDidNotRelease`](crate::DiskError::GuestDidNotRelease) the disk is still attached. No error when
    /// there is no such disk; the
    /// disk's files are free only after this has returned without one.
    async fn disk_detach(&self, id: &str, patience: Duration) -> Result<()>;

    /// Grows a disk to `bytes`, a multiple of 512; the guest sees it at once.
    async fn disk_resize(&self, id: &str, bytes: u64) -> Result<()>;

    /// Sets all limits of a disk, from now until the machine ends.
    async fn disk_limits(&self, id: &str, limits: DiskLimits) -> Result<()>;

    /// Puts new layers on top of several disks at one instant of the guest: all or none. No error, and zero, when all are
    /// on top already. Returns how long QEMU took over it, which is longer than the disks stood still.
    async fn disks_snapshot(&self, disks: Vec<SnapshotDisk>) -> Result<Duration>;

    /// Copies into the top layer what it has from the layers between it and the stream's base, and
    /// lets go of those layers. When it fails or is cancelled the layers are as before. Goes on by itself when the
    /// returned future is dropped or the agent ends; a call with the same arguments then waits for that end.
    async fn disk_stream(
        &self,
        id: &str,
        stream: Stream,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()>;

    /// Merges layers below the top into one further down, and lets go of them. When it fails or is cancelled the guest's
    /// disk is as before; the layer that was written to holds a part and is of use only below the others. Goes on by
    /// itself like a stream.
    async fn disk_commit(
        &self,
        id: &str,
        commit: Commit,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()>;
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineFacts {
    pub pid: u32,
    /// The versioned machine type in use, to be recorded and given again at the next start.
    pub machine_version: String,
    pub accelerator: Accelerator,
    /// The CPU model in use, to be recorded likewise.
    pub cpu_model: String,
    /// The room for disks, to be given again when a state of this machine is restored.
    pub disk_places: DiskPlaces,
    pub started_at: SystemTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    Running,
    Paused,
    /// The guest powered itself off; its process is kept so that this can be seen.
    Shutdown,
    Panicked,
    /// Stopped because a disk failed or is full.
    IoError,
    /// Ready, but its CPUs have not run since the start or the last reset.
    Prelaunch,
    /// A saved state is being read.
    Restoring,
    /// A state is being written.
    Saving,
    /// A state was written; it stands still.
    Saved,
    /// QEMU met a fault it cannot go on from.
    InternalError,
    /// The guest sleeps (ACPI S3).
    Sleeping,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEvent {
    Paused,
    Resumed,
    /// `guest` is true when the guest did it itself.
    Reset {
        guest: bool,
    },
    Shutdown {
        guest: bool,
    },
    /// The power button was pressed.
    Powerdown,
    Panicked,
    IoError {
        disk: String,
        reason: String,
        nospace: bool,
    },
    /// The process has ended.
    Exited,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    Clean,
    Code(i32),
    Signal(i32),
    /// The process was not our child (the agent was restarted meanwhile), so the kernel does not tell.
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitReport {
    pub reason: ExitReason,
    /// The end of what QEMU wrote, cleaned and bounded.
    pub last_words: String,
}

/// How far a save has come. `total_bytes` is an estimate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// What was found of one machine.
#[derive(Debug)]
pub enum Survey {
    /// Lives and answers. One in [`RunState::Prelaunch`] is complete and never ran, or was reset while it stood still:
    /// it may just be resumed.
    Running(Arc<dyn Machine>),
    /// Lives, but the agent that started it died before it was ready. It never ran; kill it and start again.
    HalfStarted { id: Uuid, pid: u32 },
    /// Has no process.
    Dead { id: Uuid, last_words: String },
    /// Lives and does not answer. It can be killed.
    Unresponsive { id: Uuid, pid: u32, reason: String },
}

impl Survey {
    pub fn id(&self) -> Uuid {
        match self {
            Self::Running(machine) => machine.id(),
            Self::HalfStarted { id, .. } | Self::Dead { id, .. } | Self::Unresponsive { id, .. } => *id,
        }
    }
}
