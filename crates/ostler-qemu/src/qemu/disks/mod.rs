//! The disks of a running machine: reading them from QEMU, and what the calls have in common.
//!
//! Nothing is recorded: ids, layers and descriptor sets are read from QEMU's names each time, so an agent that was
//! restarted goes on. One call at a time works on a machine's disks. Each begins by sweeping up what a call that was cut
//! off left behind (nodes and descriptor sets that nothing uses), so none needs to be undone by whoever cut it off.

mod attach;
mod snapshot;
mod stream;

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{MutexGuard, broadcast};
use tokio::time::{sleep, timeout};

use self::attach::Place;
use super::launch::open_for;
use super::machine::QemuMachine;
use crate::args::{self, FIRST_DISK_SET, names};
use crate::disk::{DiskIo, DiskLimits, DiskState};
use crate::error::{DiskError, Error, QmpError, Result, StartError};
use crate::files::on_own_thread;
use crate::qmp::Connection;
use crate::qmp::block::BlockNodeInfo;
use crate::qmp::commands::{
    AddFd, BlockResize, BlockSetIoThrottle, BlockdevDel, QueryBlock, QueryFdsets, QueryNamedBlockNodes,
    RemoveFd,
};

/// What QEMU announces and the calls wait for. Whoever misses one finds out by asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Signal {
    DeviceDeleted(String),
    UnplugRefused(String),
    Job,
}

/// How long to wait for a signal before asking.
const ASK_AFTER: Duration = Duration::from_millis(250);

pub(super) fn signal(name: &str, data: &serde_json::Value) -> Option<Signal> {
    let device = || data["device"].as_str().map(str::to_owned);
    match name {
        "DEVICE_DELETED" => device().map(Signal::DeviceDeleted),
        "DEVICE_UNPLUG_GUEST_ERROR" => device().map(Signal::UnplugRefused),
        "JOB_STATUS_CHANGE" => Some(Signal::Job),
        _ => None,
    }
}

/// The next signal, or none after a while.
async fn next_signal(signals: &mut broadcast::Receiver<Signal>) -> Result<Option<Signal>, QmpError> {
    match timeout(ASK_AFTER, signals.recv()).await {
        Ok(Ok(signal)) => Ok(Some(signal)),
        Ok(Err(broadcast::error::RecvError::Closed)) => {
            sleep(ASK_AFTER).await;
            Ok(None)
        }
        Ok(Err(broadcast::error::RecvError::Lagged(_))) | Err(_) => Ok(None),
    }
}

/// A disk that a device holds.
#[derive(Debug)]
struct Disk {
    id: String,
    /// What QEMU calls the device in commands on its block side.
    qdev: String,
    top: BlockNodeInfo,
    node_name: String,
    io: DiskIo,
}

impl Disk {
    fn state(&self, places: &[Place]) -> DiskState {
        DiskState {
            place: places.iter().find(|place| place.disk == self.id).map(|place| place.number),
            id: self.id.clone(),
            top: self.layer().map(str::to_owned),
            node_name: self.node_name.clone(),
            virtual_size: self.top.image.virtual_size,
            read_only: self.top.ro,
            limits: self.top.limits(),
            io: self.io,
        }
    }

    fn layer(&self) -> Option<&str> {
        names::owner(&self.node_name)?.layer
    }
}

/// The right to work on the disks of a machine.
struct Desk<'a> {
    machine: &'a QemuMachine,
    qmp: Connection,
    _turn: MutexGuard<'a, ()>,
}

impl QemuMachine {
    async fn desk(&self) -> Result<Desk<'_>> {
        self.check_alive()?;
        let turn = self.disk_turn.lock().await;
        Ok(Desk { machine: self, qmp: self.qmp().await?, _turn: turn })
    }

    pub(super) async fn read_disks(&self) -> Result<Vec<DiskState>> {
        self.check_alive()?;
        let qmp = self.qmp().await?;
        let disks = read(&qmp).await?;
        let places = attach::places(&qmp, self.machine_type()).await?;
        Ok(disks.iter().map(|disk| disk.state(&places)).collect())
    }

    pub(super) async fn resize_disk(&self, id: &str, bytes: u64) -> Result<()> {
        let desk = self.desk().await?;
        let disk = desk.disk(id).await?;
        let from = disk.top.image.virtual_size;
        if bytes < from {
            return Err(DiskError::Shrink { disk: id.into(), from, to: bytes }.into());
        }
        if !bytes.is_multiple_of(512) {
            let reason = format!("{bytes} bytes is not a multiple of 512");
            return Err(DiskError::invalid(format!("disks[{id}].size"), reason).into());
        }
        if disk.top.ro {
            return Err(DiskError::ReadOnly { disk: id.into() }.into());
        }
        if bytes > from {
            desk.qmp.execute(&BlockResize { node_name: disk.node_name, size: bytes }).await?;
        }
        Ok(())
    }

    pub(super) async fn limit_disk(&self, id: &str, limits: DiskLimits) -> Result<()> {
        args::limits(id, &limits).map_err(DiskError::from)?;
        let desk = self.desk().await?;
        let disk = desk.disk(id).await?;
        desk.qmp.execute(&BlockSetIoThrottle(args::throttle(disk.qdev, &limits))).await?;
        Ok(())
    }
}

async fn read(qmp: &Connection) -> Result<Vec<Disk>, QmpError> {
    let drives = qmp.execute(&QueryBlock {}).await?;
    let mut disks: Vec<Disk> = drives
        .into_iter()
        .filter_map(|drive| {
            let (qdev, top) = drive.qdev.zip(drive.inserted)?;
            let id = names::disk_of_device(&qdev)?.to_owned();
            let node_name = top.node_name.clone()?;
            let io = match drive.io_status.as_deref() {
                Some("nospace") => DiskIo::NoSpace,
                Some("failed") => DiskIo::Failed,
                Some(_) | None => DiskIo::Ok,
            };
            Some(Disk { id, qdev, top, node_name, io })
        })
        .collect();
    disks.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(disks)
}

impl Desk<'_> {
    async fn find(&self, id: &str) -> Result<Option<Disk>, QmpError> {
        Ok(read(&self.qmp).await?.into_iter().find(|disk| disk.id == id))
    }

    async fn disk(&self, id: &str) -> Result<Disk> {
        let found = self.find(id).await?;
        found.ok_or_else(|| DiskError::NotAttached { disk: id.to_owned() }.into())
    }

    async fn nodes(&self) -> Result<Vec<BlockNodeInfo>, QmpError> {
        self.qmp.execute(&QueryNamedBlockNodes { flat: true }).await
    }

    /// Closes what belongs to a disk and is used by nothing: nodes, then descriptor sets. QEMU refuses to close what is
    /// used, so everything but the top is just tried, again as long as something goes (a node keeps those below it).
    async fn sweep(&self, id: &str) -> Result<(), QmpError> {
        let top = self.find(id).await?.map(|disk| disk.node_name);
        loop {
            let mut gone = false;
            for node in self.nodes().await?.into_iter().filter_map(|node| node.node_name) {
                let ours = names::owner(&node).is_some_and(|owner| owner.disk == id && !owner.file);
                if !ours || top.as_deref() == Some(&node) {
                    continue;
                }
                match self.qmp.execute(&BlockdevDel { node_name: node }).await {
                    Ok(_) => gone = true,
                    Err(QmpError::Refused { .. }) => {}
                    Err(other) => return Err(other),
                }
            }
            if !gone {
                return self.sweep_descriptors().await;
            }
        }
    }

    async fn sweep_descriptors(&self) -> Result<(), QmpError> {
        let used: HashSet<u32> = self.nodes().await?.iter().filter_map(BlockNodeInfo::fdset).collect();
        for set in self.qmp.execute(&QueryFdsets {}).await? {
            // A set of a machine that stands still goes when it runs again.
            if set.fdset_id >= FIRST_DISK_SET && !used.contains(&set.fdset_id) {
                match self.qmp.execute(&RemoveFd { fdset_id: set.fdset_id }).await {
                    Ok(_) | Err(QmpError::Refused { .. }) => {}
                    Err(other) => return Err(other),
                }
            }
        }
        Ok(())
    }

    /// Sweeps after a failure; that the sweep fails too is for the log, and for the next call to set right.
    async fn undo(&self, id: &str) {
        if let Err(error) = self.sweep(id).await {
            tracing::warn!(disk = id, %error, "what a failed step left of a disk could not be removed yet");
        }
    }

    /// The first of `count` descriptor sets in a row that are free.
    async fn free_sets(&self, count: usize) -> Result<u32, QmpError> {
        let taken: HashSet<u32> =
            self.qmp.execute(&QueryFdsets {}).await?.iter().map(|set| set.fdset_id).collect();
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let mut first = FIRST_DISK_SET;
        while let Some(set) = (first..first.saturating_add(count)).rev().find(|set| taken.contains(set)) {
            first = set + 1;
        }
        Ok(first)
    }

    /// Gives QEMU opened files as sets in a row. Each travels alone, so a chain takes a moment.
    async fn hand_over(&self, files: Vec<OwnedFd>) -> Result<u32> {
        let first = self.free_sets(files.len()).await?;
        let pending: Vec<_> = (first..)
            .zip(files)
            .map(|(fdset_id, file)| self.qmp.submit_fd(&AddFd { fdset_id }, Arc::new(file)))
            .collect();
        for answer in pending {
            answer.answer().await?;
        }
        Ok(first)
    }

    /// Opens files on a thread of its own: a file system that hangs costs this call only.
    async fn open(&self, disk: &str, files: Vec<(std::path::PathBuf, bool)>) -> Result<Vec<OwnedFd>> {
        let what = format!("disk {disk}");
        let open = move || {
            let each = files.iter().map(|(path, write)| open_for(&what, path, *write));
            each.collect::<Result<Vec<_>, StartError>>()
        };
        let after = self.machine.open_timeout;
        let opened = timeout(after, on_own_thread("open-disk", open)).await;
        let opened = opened.map_err(|_| DiskError::FileTimeout { disk: disk.into(), after })?;
        let opened = opened.map_err(Error::io("opening the files of", disk))?;
        Ok(opened.map_err(|error| DiskError::File(Box::new(error)))?)
    }
}
