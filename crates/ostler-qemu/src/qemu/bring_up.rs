//! From a QEMU process that holds its breath (`-S`) to a machine that runs: its disks get their limits, a saved state is
//! read, the virtual CPUs are let go. Disks and NICs are on the command line, made of the same values that plug them into
//! a running machine: plugged in one by one they cost a start a tenth of its time.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;
use tokio::time::{sleep, timeout};

use super::faults::{self, Stage};
use super::launch::Launched;
use super::machine::{KILL_DEADLINE, QemuMachine};
use crate::args::Limits;
use crate::config::QemuConfig;
use crate::error::{Error, QmpError, StartError};
use crate::machine::{ExitReason, Machine, MachineEvent};
use crate::process::pidfd::Patience;
use crate::qmp::commands::{
    BlockSetIoThrottle, Command, Cont, GetFd, MigrateIncoming, MigrationStatus, QueryMigrate,
};
use crate::qmp::{Connection, Pending};
use crate::spec::{MachineSpec, StartOptions};

const STATE_FD: &str = "state";

/// On failure the process is ended before this returns.
pub(super) async fn bring_up(
    config: &QemuConfig,
    mut launched: Launched,
    spec: &MachineSpec,
    opts: &StartOptions,
) -> Result<Arc<QemuMachine>, StartError> {
    let limits = std::mem::take(&mut launched.limits);
    let state = launched.restore_from.take();
    let (machine, ready) = QemuMachine::new(config, launched, Patience::UntilItEnds)
        .map_err(StartError::io("using the monitor's socket"))?;
    let limit = config.start_timeout + if state.is_some() { config.state_timeout } else { Duration::ZERO };
    let restoring = state.is_some();
    let steps = timeout(limit, run_steps(&machine, ready, limits, state, opts.paused)).await;
    let failure = match steps {
        Ok(Ok(())) => return Ok(machine),
        Ok(Err(failure)) => Some(failure),
        Err(_) => None,
    };
    // A monitor that hangs up is a process that ends: its words say more than the broken connection.
    let ended = match &failure {
        Some((_, QmpError::Closed)) => machine.ended_within(Duration::from_secs(2)).await,
        _ => None,
    };
    end(&machine).await?;
    let last_words = machine.last_words();
    Err(match (failure, ended) {
        (_, Some(reason)) => faults::died(spec, restoring, reason, last_words),
        (Some((stage, source)), None) => faults::refused(spec, stage, source, last_words),
        (None, None) => StartError::Timeout { after: limit, last_words },
    })
}

async fn end(machine: &QemuMachine) -> Result<(), StartError> {
    let failed = |source: Error| StartError::Io {
        what: "ending a QEMU that did not start".into(),
        source: std::io::Error::other(source),
    };
    machine.kill(KILL_DEADLINE).await.map_err(failed)
}

type Step = (Stage, Pin<Box<dyn Future<Output = Result<(), QmpError>> + Send>>);

fn step<C: Command + 'static>(stage: Stage, pending: Pending<C>) -> Step {
    (stage, Box::pin(async move { pending.answer().await.map(drop) }))
}

async fn run_steps(
    machine: &QemuMachine,
    ready: Pending<crate::qmp::commands::QmpCapabilities>,
    limits: Vec<Limits>,
    state: Option<Arc<OwnedFd>>,
    paused: bool,
) -> Result<(), (Stage, QmpError)> {
    let other = |error| (Stage::Other, error);
    // The deadline of the whole start is the one that counts: QEMU answers nothing before it has set up its memory.
    let connection = machine.connection_now().with_timeout(Duration::MAX);
    let mut events = machine.events();
    let mut steps = vec![step(Stage::Other, ready)];
    steps.extend(limits.into_iter().map(|Limits { disk, throttle }| {
        step(Stage::Disk(disk), connection.submit(&BlockSetIoThrottle(throttle)))
    }));
    for (stage, answer) in steps {
        answer.await.map_err(|error| (stage, error))?;
    }
    if let Some(state) = state {
        restore(&connection, state).await.map_err(other)?;
    }
    machine.mark_ready().map_err(|error| other(QmpError::Connect(std::io::Error::other(error))))?;
    if !paused {
        let answer = connection.submit(&Cont {}).answer();
        // The event comes when the CPUs run; the answer only when QEMU's main loop gets a turn beside them.
        tokio::select! {
            biased;
            result = answer => { result.map_err(other)?; }
            result = seen(&mut events, |event| matches!(event, MachineEvent::Resumed)) => result.map_err(other)?,
        }
    }
    Ok(())
}

/// Waits for an event; one that was missed because there were too many counts as seen.
async fn seen(
    events: &mut broadcast::Receiver<MachineEvent>,
    wanted: fn(&MachineEvent) -> bool,
) -> Result<(), QmpError> {
    loop {
        match events.recv().await {
            Ok(event) if wanted(&event) => return Ok(()),
            Err(broadcast::error::RecvError::Lagged(_)) => return Ok(()),
            Ok(MachineEvent::Exited) | Err(broadcast::error::RecvError::Closed) => {
                return Err(QmpError::Closed);
            }
            Ok(_) => {}
        }
    }
}

async fn restore(connection: &Connection, state: Arc<OwnedFd>) -> Result<(), QmpError> {
    let named = connection.submit_fd(&GetFd { fdname: STATE_FD.into() }, state);
    let begun = connection.submit(&MigrateIncoming { uri: format!("fd:{STATE_FD}") });
    named.answer().await?;
    begun.answer().await?;
    let mut pause = Duration::from_millis(1);
    loop {
        match connection.execute(&QueryMigrate {}).await?.status {
            Some(MigrationStatus::Completed) => return Ok(()),
            Some(MigrationStatus::Failed) => {
                return Err(QmpError::Refused {
                    command: MigrateIncoming::NAME,
                    class: "GenericError".into(),
                    desc: "the saved state does not fit the machine or is damaged".into(),
                });
            }
            _ => {}
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

impl QemuMachine {
    async fn ended_within(&self, limit: Duration) -> Option<ExitReason> {
        timeout(limit, self.ended()).await.ok()
    }
}
