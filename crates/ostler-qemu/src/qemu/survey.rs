//! Finding machines again, after a restart of the agent or at any other time. What is true is read from the locks and
//! from QEMU; the record adds names.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::launch::Launched;
use super::machine::QemuMachine;
use super::save::stop_migration;
use crate::config::QemuConfig;
use crate::error::{QmpError, Result, describe};
use crate::process::pidfd::{Patience, Pidfd};
use crate::rundir::{QMP_SOCKET, RunDir};

/// What a directory and its lock say.
#[derive(Debug)]
pub(super) enum Found {
    Nothing,
    Dead { last_words: String },
    Alive { dir: RunDir, pidfd: Pidfd },
}

/// Looks at one directory. Waits for a launch that is under way, also one whose agent died.
pub(super) fn look(run_dir: &Path, id: Uuid) -> Result<Found> {
    let Some(dir) = RunDir::open(run_dir, id)? else { return Ok(Found::Nothing) };
    if !dir.lock_in_place()? {
        return Ok(Found::Nothing);
    }
    let holder = dir.holder();
    dir.unlock();
    Ok(match holder? {
        Some(pidfd) => Found::Alive { dir, pidfd },
        None => Found::Dead { last_words: dir.last_words() },
    })
}

/// What became of an attempt to adopt.
#[derive(Debug)]
pub(super) enum Adopted {
    Machine(Arc<QemuMachine>),
    HalfStarted,
    Unresponsive(String),
    /// It ended meanwhile.
    Dead(String),
}

pub(super) async fn adopt(config: &QemuConfig, dir: RunDir, pidfd: Pidfd) -> Adopted {
    if !dir.is_ready() {
        return Adopted::HalfStarted;
    }
    let record = match dir.read_record() {
        Ok(record) => record,
        Err(error) => {
            return Adopted::Unresponsive(format!("its record is not readable: {}", describe(&error)));
        }
    };
    let qmp = match dir.connect(QMP_SOCKET) {
        Ok(stream) => stream,
        Err(error) => return Adopted::Unresponsive(format!("its monitor cannot be reached: {error}")),
    };
    let launched = Launched { dir: dir.clone(), record, pidfd, qmp, limits: Vec::new(), restore_from: None };
    let (machine, ready) = match QemuMachine::new(config, launched, Patience::WhileWanted) {
        Ok(made) => made,
        Err(error) => return Adopted::Unresponsive(format!("its monitor cannot be used: {error}")),
    };
    let greeted = async {
        ready.answer().await?;
        // The agent that was writing this state is gone, so nobody would finish its file.
        stop_migration(&machine.connection_now()).await
    };
    match greeted.await {
        Ok(()) => Adopted::Machine(machine),
        Err(QmpError::Closed) if ended_soon(&machine).await => Adopted::Dead(dir.last_words()),
        Err(error) => Adopted::Unresponsive(describe(&error)),
    }
}

async fn ended_soon(machine: &QemuMachine) -> bool {
    tokio::time::timeout(Duration::from_secs(2), machine.ended()).await.is_ok()
}
