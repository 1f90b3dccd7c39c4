//! Suspend to disk, the whole story: stop, write the state to a descriptor of an unfinished file, make it durable, give
//! it its name. Whatever goes wrong, and also when the caller goes away, the machine goes on as it was and no file stays.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep};

use super::machine::QemuMachine;
use crate::error::{Error, QmpError, Result};
use crate::files::{on_own_thread, sync_parent};
use crate::machine::{Machine, Progress, RunState};
use crate::qmp::Connection;
use crate::qmp::commands::{
    CloseFd, Cont, GetFd, Migrate, MigrateCancel, MigrateSetParameters, MigrationStatus, QueryMigrate, Stop,
};

/// More than any disk takes: the disk sets the pace.
const BANDWIDTH: u64 = 1 << 40;

pub(super) async fn save(machine: &QemuMachine, to: &Path, progress: watch::Sender<Progress>) -> Result<()> {
    let work = Save {
        qmp: machine.qmp().await?,
        was_running: machine.state().await? == RunState::Running,
        to: to.to_owned(),
        unfinished: unfinished_name(to),
        fdname: machine.fresh_descriptor_name("state"),
        limit: machine.state_timeout,
        progress,
    };
    // A task of its own: when the caller is dropped, so is `given_up`'s other end, and the task undoes what it did.
    let (still_wanted, given_up) = oneshot::channel::<()>();
    let result = tokio::spawn(work.run(given_up)).await;
    drop(still_wanted);
    result.map_err(|error| Error::Save(error.to_string()))?
}

fn unfinished_name(to: &Path) -> PathBuf {
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    to.with_file_name(name)
}

struct Save {
    qmp: Connection,
    was_running: bool,
    to: PathBuf,
    unfinished: PathBuf,
    fdname: String,
    limit: Duration,
    progress: watch::Sender<Progress>,
}

impl Save {
    async fn run(self, mut given_up: oneshot::Receiver<()>) -> Result<()> {
        let result = tokio::select! {
            result = self.write() => result,
            _ = &mut given_up => Err(Error::Save("the caller gave up".into())),
        };
        if result.is_err() {
            self.undo().await;
        }
        result
    }

    async fn write(&self) -> Result<()> {
        let path = self.unfinished.clone();
        let create = move || File::options().write(true).create(true).truncate(true).mode(0o600).open(path);
        let created = on_own_thread("save", create).await.and_then(|result| result);
        let file = Arc::new(OwnedFd::from(created.map_err(Error::io("making", &self.unfinished))?));
        let qmp = &self.qmp;
        qmp.execute(&Stop {}).await?;
        qmp.execute(&MigrateSetParameters { max_bandwidth: BANDWIDTH }).await?;
        qmp.submit_fd(&GetFd { fdname: self.fdname.clone() }, Arc::clone(&file)).answer().await?;
        qmp.execute(&Migrate { uri: format!("fd:{}", self.fdname) }).await?;
        self.completed().await?;
        let (from, to) = (self.unfinished.clone(), self.to.clone());
        let finish = move || -> io::Result<()> {
            rustix::fs::fsync(&*file)?;
            fs::rename(&from, &to)?;
            sync_parent(&to)
        };
        on_own_thread("save", finish).await.and_then(|result| result).map_err(Error::io("keeping", &self.to))
    }

    async fn completed(&self) -> Result<()> {
        let deadline = Instant::now() + self.limit;
        let mut pause = Duration::from_millis(2);
        loop {
            let info = self.qmp.execute(&QueryMigrate {}).await?;
            if let Some(ram) = info.ram {
                let done_bytes = ram.total.saturating_sub(ram.remaining);
                self.progress.send_replace(Progress { done_bytes, total_bytes: ram.total });
            }
            match info.status {
                Some(MigrationStatus::Completed) => return Ok(()),
                Some(MigrationStatus::Failed | MigrationStatus::Cancelled) => {
                    return Err(Error::Save(
                        info.error_desc.unwrap_or_else(|| "QEMU gave no reason; is the disk full?".into()),
                    ));
                }
                _ if Instant::now() > deadline => {
                    return Err(Error::Save(format!("not done after {} s", self.limit.as_secs())));
                }
                _ => {}
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    /// Each step is tried whatever became of the one before.
    async fn undo(&self) {
        if let Err(error) = self.stand_down().await {
            tracing::warn!(%error, "a save that failed could not be undone in full");
        }
        for file in [&self.unfinished, &self.to] {
            match fs::remove_file(file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(file = %file.display(), %error, "an unfinished state file stays");
                }
                _ => {}
            }
        }
    }

    async fn stand_down(&self) -> Result<(), QmpError> {
        stop_migration(&self.qmp).await?;
        // Unknown when it was used or never given.
        let _ = self.qmp.execute(&CloseFd { fdname: self.fdname.clone() }).await;
        if self.was_running {
            self.qmp.execute(&Cont {}).await?;
        }
        Ok(())
    }
}

/// Cancels a state that is being written and waits until that is over.
pub(super) async fn stop_migration(qmp: &Connection) -> Result<(), QmpError> {
    let mut pause = Duration::from_millis(1);
    for _ in 0..200 {
        match qmp.execute(&QueryMigrate {}).await?.status {
            Some(
                MigrationStatus::Setup
                | MigrationStatus::Active
                | MigrationStatus::PreSwitchover
                | MigrationStatus::Device,
            ) => {
                qmp.execute(&MigrateCancel {}).await?;
            }
            Some(MigrationStatus::Cancelling) => {}
            None
            | Some(
                MigrationStatus::None
                | MigrationStatus::Cancelled
                | MigrationStatus::Completed
                | MigrationStatus::Failed
                | MigrationStatus::Other,
            ) => return Ok(()),
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Err(QmpError::Timeout { command: "migrate_cancel", after: Duration::from_secs(10) })
}
