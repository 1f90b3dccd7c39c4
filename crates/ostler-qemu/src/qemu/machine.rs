//! A machine that was started or adopted: its monitor, its process, its run directory.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, watch};
use tokio::time::timeout;
use uuid::Uuid;

use super::disks::{Signal, signal};
use super::events::translate;
use super::launch::Launched;
use super::save;
use crate::config::QemuConfig;
use crate::disk::{Commit, DiskLimits, DiskSpec, DiskState, SnapshotDisk, Stream};
use crate::error::{Error, QmpError, Result};
use crate::files::on_own_thread;
use crate::machine::{ExitReason, ExitReport, Machine, MachineEvent, MachineFacts, Progress, RunState};
use crate::process::pidfd::{Patience, Pidfd};
use crate::qmp::commands::{
    AddClient, Balloon, Cont, GetFd, QmpCapabilities, QueryBalloon, QueryStatus, Quit, Status, Stop,
    SystemPowerdown, SystemReset,
};
use crate::qmp::log::TrafficLog;
use crate::qmp::{Connection, Pending};
use crate::rundir::{CONSOLE_LOG, CONSOLE_SOCKET, QEMU_LOG, QMP_SOCKET, Record, RunDir};
use crate::spec::MachineType;

/// A killed process ends in a moment, unless it waits for a disk that does not answer.
pub(super) const KILL_DEADLINE: Duration = Duration::from_secs(30);
const EVENTS_KEPT: usize = 64;

#[derive(Debug)]
pub(super) struct QemuMachine {
    dir: RunDir,
    record: Record,
    pidfd: Pidfd,
    ended: watch::Receiver<Option<ExitReason>>,
    events: broadcast::Sender<MachineEvent>,
    connection: Mutex<Connection>,
    /// One attempt at a time: QEMU's monitor has one client.
    reconnecting: tokio::sync::Mutex<()>,
    qmp_timeout: Duration,
    quit_timeout: Duration,
    pub(super) state_timeout: Duration,
    descriptor_names: AtomicU64,
    signals: broadcast::Sender<Signal>,
    /// One call at a time works on the disks.
    pub(super) disk_turn: tokio::sync::Mutex<()>,
    /// For opening the files of one disk.
    pub(super) open_timeout: Duration,
}

impl QemuMachine {
    /// Takes over a process and the connected socket of its monitor. The answer says when the monitor listens.
    pub(super) fn new(
        config: &QemuConfig,
        launched: Launched,
        patience: Patience,
    ) -> io::Result<(Arc<Self>, Pending<QmpCapabilities>)> {
        let Launched { dir, record, pidfd, qmp, limits: _, restore_from: _ } = launched;
        let (events, _) = broadcast::channel(EVENTS_KEPT);
        let (signals, _) = broadcast::channel(EVENTS_KEPT);
        let announce = events.clone();
        let ended = pidfd.watch(patience, move || {
            // Nobody may be listening.
            let _ = announce.send(MachineEvent::Exited);
        });
        let (connection, ready) = connect(qmp, &dir, events.clone(), signals.clone(), config.qmp_timeout)?;
        let machine = Self {
            dir,
            record,
            pidfd,
            ended,
            events,
            connection: Mutex::new(connection),
            reconnecting: tokio::sync::Mutex::new(()),
            qmp_timeout: config.qmp_timeout,
            quit_timeout: config.quit_timeout,
            state_timeout: config.state_timeout,
            descriptor_names: AtomicU64::new(0),
            signals,
            disk_turn: tokio::sync::Mutex::new(()),
            open_timeout: config.start_timeout,
        };
        Ok((Arc::new(machine), ready))
    }

    pub(super) fn connection_now(&self) -> Connection {
        self.connection.lock().clone()
    }

    /// The monitor's connection, made anew if it broke while the process lives.
    pub(super) async fn qmp(&self) -> Result<Connection, QmpError> {
        let current = self.connection_now();
        if !current.is_closed() {
            return Ok(current);
        }
        let _turn = self.reconnecting.lock().await;
        let current = self.connection_now();
        if !current.is_closed() {
            return Ok(current);
        }
        if self.has_ended() {
            return Err(QmpError::Closed);
        }
        let stream = self.dir.connect(QMP_SOCKET).map_err(QmpError::Connect)?;
        let (events, signals) = (self.events.clone(), self.signals.clone());
        let (connection, ready) =
            connect(stream, &self.dir, events, signals, self.qmp_timeout).map_err(QmpError::Connect)?;
        ready.answer().await?;
        *self.connection.lock() = connection.clone();
        Ok(connection)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    pub(super) async fn ended(&self) -> ExitReason {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.unwrap_or(ExitReason::Unknown),
            // The watching task ends only after it has told; a runtime that shuts down tells nobody.
            Err(_) => ExitReason::Unknown,
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.pidfd.pid()
    }

    pub(super) fn last_words(&self) -> String {
        self.dir.last_words()
    }

    pub(super) fn mark_ready(&self) -> Result<()> {
        self.dir.mark_ready()
    }

    /// Ends the process by force.
    pub(super) async fn kill(&self, within: Duration) -> Result<()> {
        if self.has_ended() {
            return Ok(());
        }
        self.pidfd.kill().map_err(Error::io("killing the process of", self.dir.file("")))?;
        let (id, pid) = (self.record.id, self.pid());
        timeout(within, self.ended()).await.map(drop).map_err(|_| Error::Unkillable {
            id,
            pid,
            after: within,
        })
    }

    /// Gives QEMU a descriptor under a name that was not used before.
    pub(super) fn fresh_descriptor_name(&self, kind: &str) -> String {
        format!("{kind}-{}", self.descriptor_names.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn signals(&self) -> broadcast::Receiver<Signal> {
        self.signals.subscribe()
    }

    pub(super) fn machine_type(&self) -> MachineType {
        self.record.machine
    }

    pub(super) fn check_alive(&self) -> Result<()> {
        if self.has_ended() { Err(Error::Ended { id: self.record.id }) } else { Ok(()) }
    }
}

fn connect(
    stream: StdUnixStream,
    dir: &RunDir,
    events: broadcast::Sender<MachineEvent>,
    signals: broadcast::Sender<Signal>,
    deadline: Duration,
) -> io::Result<(Connection, Pending<QmpCapabilities>)> {
    let stream = UnixStream::from_std(stream)?;
    let sink = move |name: &str, data: &serde_json::Value| {
        if let Some(event) = translate(name, data) {
            let _ = events.send(event);
        }
        if let Some(signal) = signal(name, data) {
            let _ = signals.send(signal);
        }
    };
    Ok(Connection::open(stream, Box::new(sink), TrafficLog::open(Arc::clone(dir.fd())), deadline))
}

fn run_state(status: Status) -> RunState {
    match status {
        Status::Running => RunState::Running,
        Status::Shutdown => RunState::Shutdown,
        Status::GuestPanicked => RunState::Panicked,
        Status::IoError => RunState::IoError,
        Status::Prelaunch => RunState::Prelaunch,
        Status::Inmigrate | Status::RestoreVm => RunState::Restoring,
        Status::FinishMigrate | Status::SaveVm => RunState::Saving,
        Status::Postmigrate => RunState::Saved,
        Status::InternalError => RunState::InternalError,
        Status::Suspended => RunState::Sleeping,
        // Stopped for reasons that this driver never gives; resuming goes on.
        Status::Paused | Status::Watchdog | Status::Debug | Status::Colo | Status::Other => RunState::Paused,
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn id(&self) -> Uuid {
        self.record.id
    }

    fn facts(&self) -> MachineFacts {
        MachineFacts {
            pid: self.pid(),
            machine_version: self.record.machine_version.clone(),
            accelerator: self.record.accelerator,
            cpu_model: self.record.cpu_model.clone(),
            disk_places: self.record.disk_places,
            started_at: self.record.started_at(),
        }
    }

    async fn state(&self) -> Result<RunState, QmpError> {
        Ok(run_state(self.qmp().await?.execute(&QueryStatus {}).await?.status))
    }

    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.events.subscribe()
    }

    async fn pause(&self) -> Result<()> {
        self.check_alive()?;
        self.qmp().await?.execute(&Stop {}).await?;
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        self.check_alive()?;
        self.qmp().await?.execute(&Cont {}).await?;
        Ok(())
    }

    async fn reset(&self) -> Result<()> {
        self.check_alive()?;
        let qmp = self.qmp().await?;
        let mut events = self.events.subscribe();
        qmp.execute(&SystemReset {}).await?;
        // QEMU answers before it resets; what follows (resume above all) needs it done.
        let done = async {
            loop {
                match events.recv().await {
                    Ok(MachineEvent::Reset { .. }) | Err(broadcast::error::RecvError::Lagged(_)) => {
                        return Ok(());
                    }
                    Ok(MachineEvent::Exited) | Err(broadcast::error::RecvError::Closed) => {
                        return Err(QmpError::Closed);
                    }
                    Ok(_) => {}
                }
            }
        };
        let after = self.qmp_timeout;
        timeout(after, done).await.unwrap_or(Err(QmpError::Timeout { command: "system_reset", after }))?;
        Ok(())
    }

    async fn powerdown(&self) -> Result<()> {
        self.check_alive()?;
        self.qmp().await?.execute(&SystemPowerdown {}).await?;
        Ok(())
    }

    async fn save(&self, to: &Path, progress: watch::Sender<Progress>) -> Result<()> {
        self.check_alive()?;
        save::save(self, to, progress).await
    }

    async fn quit(&self) -> Result<()> {
        let orderly = async {
            // Whether the answer comes or the connection breaks first does not matter; the end does.
            if let Ok(qmp) = self.qmp().await {
                let _ = qmp.execute(&Quit {}).await;
                self.ended().await;
            }
        };
        let _ = timeout(self.quit_timeout, orderly).await;
        self.kill(KILL_DEADLINE).await
    }

    async fn exited(&self) -> ExitReport {
        let reason = self.ended().await;
        ExitReport { reason, last_words: self.last_words() }
    }

    async fn console(&self) -> Result<UnixStream> {
        self.check_alive()?;
        let failed = || Error::io("connecting to", self.dir.file(CONSOLE_SOCKET));
        let dir = self.dir.clone();
        // A full queue of waiting clients would block.
        let stream =
            on_own_thread("console", move || dir.connect(CONSOLE_SOCKET)).await.and_then(|result| result);
        UnixStream::from_std(stream.map_err(failed())?).map_err(failed())
    }

    async fn vnc(&self) -> Result<UnixStream> {
        self.check_alive()?;
        if !self.record.vnc {
            return Err(Error::Missing { id: self.record.id, what: "screen" });
        }
        let (ours, theirs) = UnixStream::pair()
            .map_err(Error::io("making a socket pair for the screen of", self.dir.file("")))?;
        let theirs = theirs.into_std().map_err(Error::io("using a socket of", self.dir.file("")))?;
        let fdname = self.fresh_descriptor_name("vnc");
        let qmp = self.qmp().await?;
        qmp.submit_fd(&GetFd { fdname: fdname.clone() }, Arc::new(OwnedFd::from(theirs))).answer().await?;
        // The caller has checked who may see the screen; the socket leads nowhere else.
        qmp.execute(&AddClient { protocol: "vnc", fdname, skipauth: true }).await?;
        Ok(ours)
    }

    fn console_log(&self) -> PathBuf {
        self.dir.file(CONSOLE_LOG)
    }

    async fn rotate_console_log(&self, limit: u64) -> Result<()> {
        let dir = self.dir.clone();
        let rotated = on_own_thread("rotate-logs", move || {
            dir.rotate(CONSOLE_LOG, limit)?;
            dir.rotate(QEMU_LOG, limit)
        });
        rotated.await.map_err(Error::io("rotating", self.dir.file(CONSOLE_LOG)))?
    }

    async fn set_balloon(&self, bytes: u64) -> Result<()> {
        self.check_alive()?;
        self.qmp().await?.execute(&Balloon { value: bytes }).await?;
        Ok(())
    }

    async fn balloon(&self) -> Result<u64> {
        self.check_alive()?;
        Ok(self.qmp().await?.execute(&QueryBalloon {}).await?.actual)
    }

    async fn disks(&self) -> Result<Vec<DiskState>> {
        self.read_disks().await
    }

    async fn disk_attach(&self, disk: DiskSpec) -> Result<()> {
        self.attach_disk(disk).await
    }

    async fn disk_detach(&self, id: &str, patience: Duration) -> Result<()> {
        self.detach_disk(id, patience).await
    }

    async fn disk_resize(&self, id: &str, bytes: u64) -> Result<()> {
        self.resize_disk(id, bytes).await
    }

    async fn disk_limits(&self, id: &str, limits: DiskLimits) -> Result<()> {
        self.limit_disk(id, limits).await
    }

    async fn disks_snapshot(&self, disks: Vec<SnapshotDisk>) -> Result<Duration> {
        self.snapshot_disks(disks).await
    }

    async fn disk_stream(
        &self,
        id: &str,
        stream: Stream,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()> {
        self.stream_disk(id, stream, progress, cancel).await
    }

    async fn disk_commit(
        &self,
        id: &str,
        commit: Commit,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()> {
        self.commit_disk(id, commit, progress, cancel).await
    }
}
