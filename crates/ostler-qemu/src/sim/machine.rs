//! A handle to a simulated machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, watch};
use uuid::Uuid;

use super::faults::SimOperation;
use super::guest::{OnPowerdown, SimLifetime};
use super::host::{Inner, SimMachineState, power_off};
use super::hypervisor::newest_version;
use crate::disk::{Commit, DiskLimits, DiskPlaces, DiskSpec, DiskState, SnapshotDisk, Stream};
use crate::error::{DiskError, Error, QmpError, Result};
use crate::machine::{ExitReason, ExitReport, Machine, MachineEvent, MachineFacts, Progress, RunState};

#[derive(Debug)]
pub(super) struct SimMachine {
    pub(super) host: Arc<Inner>,
    pub(super) id: Uuid,
    pub(super) pid: u32,
}

/// What a simulated state file says.
pub(super) fn state_file_content(id: Uuid) -> String {
    format!("ostler simulated state of {id}\n")
}

impl SimMachine {
    async fn meet(&self, operation: SimOperation) -> Result<()> {
        self.host.faults.meet(operation, Some(self.id)).await.map_err(Error::Simulated)
    }

    fn monitor<T>(&self, work: impl FnOnce(&mut SimMachineState) -> Result<T, QmpError>) -> Result<T> {
        self.host.monitor(self.id, self.pid, work)
    }

    /// Work on a disk that takes its time and can be cancelled.
    async fn work(
        &self,
        operation: SimOperation,
        disk: &str,
        total_bytes: u64,
        progress: &watch::Sender<Progress>,
        mut cancel: watch::Receiver<bool>,
    ) -> Result<()> {
        progress.send_replace(Progress { done_bytes: 0, total_bytes });
        let cancelled = async {
            if cancel.wait_for(|wanted| *wanted).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            () = cancelled => Err(DiskError::Cancelled { disk: disk.into() }.into()),
            met = self.meet(operation) => met,
        }
    }

    fn facts_of(&self, machine: &SimMachineState) -> MachineFacts {
        let version = machine.machine_version.as_deref().unwrap_or(newest_version(machine.machine));
        MachineFacts {
            pid: self.pid,
            machine_version: version.to_owned(),
            accelerator: machine.accelerator,
            cpu_model: machine.cpu_model.as_deref().unwrap_or("simulated").to_owned(),
            disk_places: machine.disks.room,
            started_at: machine.started_at,
        }
    }
}

/// Lets the virtual CPUs go, and sets the timer of a guest that does something by itself.
pub(super) fn let_run(host: &Arc<Inner>, id: Uuid, machine: &mut SimMachineState) {
    machine.run = RunState::Running;
    machine.boots += 1;
    machine.tell(MachineEvent::Resumed);
    let (after, act): (Duration, fn(&mut SimMachineState)) = match host.guest(id).lifetime {
        SimLifetime::Runs => return,
        SimLifetime::PowersOffAfter(after) => (after, |machine| power_off(machine, true)),
        SimLifetime::PanicsAfter(after) => (after, |machine| {
            machine.run = RunState::Panicked;
            machine.tell(MachineEvent::Panicked);
        }),
        SimLifetime::CrashesAfter(after) => (after, |machine| machine.end(ExitReason::Signal(libc::SIGSEGV))),
    };
    later(host, id, machine, after, act);
}

/// Does something to this run of a machine after a while, unless it was stopped meanwhile.
fn later(
    host: &Arc<Inner>,
    id: Uuid,
    machine: &SimMachineState,
    after: Duration,
    act: fn(&mut SimMachineState),
) {
    let (host, pid, boots) = (Arc::clone(host), machine.pid, machine.boots);
    tokio::spawn(async move {
        tokio::time::sleep(after).await;
        host.process(id, pid, |machine| {
            if machine.exit.is_none() && machine.boots == boots && machine.run == RunState::Running {
                act(machine);
            }
        });
    });
}

/// QEMU's own refusal to go on before a reset.
fn needs_reset(run: RunState) -> bool {
    matches!(run, RunState::Shutdown | RunState::Panicked | RunState::InternalError)
}

#[async_trait]
impl Machine for SimMachine {
    fn id(&self) -> Uuid {
        self.id
    }

    fn facts(&self) -> MachineFacts {
        let known = self.host.process(self.id, self.pid, |machine| self.facts_of(machine));
        known.unwrap_or_else(|| MachineFacts {
            pid: self.pid,
            machine_version: String::new(),
            accelerator: crate::spec::Accelerator::Tcg,
            cpu_model: String::new(),
            disk_places: DiskPlaces::default(),
            started_at: std::time::SystemTime::UNIX_EPOCH,
        })
    }

    async fn state(&self) -> Result<RunState, QmpError> {
        self.host.faults.meet(SimOperation::State, Some(self.id)).await.map_err(QmpError::Protocol)?;
        self.monitor(|machine| Ok(machine.run)).map_err(|_| QmpError::Closed)
    }

    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        let live = self.host.process(self.id, self.pid, SimMachineState::subscribe);
        live.unwrap_or_else(|| broadcast::channel(1).1)
    }

    async fn pause(&self) -> Result<()> {
        self.meet(SimOperation::Pause).await?;
        self.monitor(|machine| {
            if machine.run == RunState::Running {
                machine.run = RunState::Paused;
                machine.tell(MachineEvent::Paused);
            }
            Ok(())
        })
    }

    async fn resume(&self) -> Result<()> {
        self.meet(SimOperation::Resume).await?;
        self.monitor(|machine| {
            if needs_reset(machine.run) {
                let desc = "Resetting the Virtual Machine is required".to_owned();
                return Err(QmpError::Refused { command: "cont", class: "GenericError".into(), desc });
            }
            if machine.run != RunState::Running {
                let_run(&self.host, self.id, machine);
            }
            Ok(())
        })
    }

    async fn reset(&self) -> Result<()> {
        self.meet(SimOperation::Reset).await?;
        self.monitor(|machine| {
            machine.tell(MachineEvent::Reset { guest: false });
            if machine.run != RunState::Running {
                machine.run = RunState::Prelaunch;
            }
            Ok(())
        })
    }

    async fn powerdown(&self) -> Result<()> {
        self.meet(SimOperation::Powerdown).await?;
        let habit = self.host.guest(self.id).on_powerdown;
        self.monitor(|machine| {
            machine.tell(MachineEvent::Powerdown);
            match habit {
                OnPowerdown::PowersOff(Duration::ZERO) if machine.run == RunState::Running => {
                    power_off(machine, true)
                }
                OnPowerdown::PowersOff(after) => {
                    later(&self.host, self.id, machine, after, |machine| power_off(machine, true));
                }
                OnPowerdown::Ignores => {}
            }
            Ok(())
        })
    }

    async fn save(&self, to: &Path, progress: watch::Sender<Progress>) -> Result<()> {
        let before = self.monitor(|machine| {
            let before = machine.run;
            machine.run = RunState::Saving;
            Ok(before)
        })?;
        let guard = SaveGuard { machine: self, before, done: false };
        self.meet(SimOperation::Save).await?;
        let unfinished = to.with_extension("partial");
        fs::write(&unfinished, state_file_content(self.id))
            .and_then(|()| fs::rename(&unfinished, to))
            .map_err(Error::io("writing", to))?;
        let total_bytes = self.monitor(|machine| {
            machine.run = RunState::Saved;
            Ok(machine.memory_bytes)
        })?;
        progress.send_replace(Progress { done_bytes: total_bytes, total_bytes });
        guard.done();
        Ok(())
    }

    async fn quit(&self) -> Result<()> {
        self.meet(SimOperation::Quit).await?;
        self.host.process(self.id, self.pid, |machine| machine.end(ExitReason::Clean));
        Ok(())
    }

    async fn exited(&self) -> ExitReport {
        let watching = self.host.process(self.id, self.pid, |machine| match machine.exit {
            Some(reason) => Err(reason),
            None => Ok(machine.exit_watch()),
        });
        let reason = match watching {
            Some(Ok(mut exit)) => exit.wait_for(Option::is_some).await.ok().and_then(|reason| *reason),
            Some(Err(reason)) => Some(reason),
            None => None,
        };
        self.host.exit_report(self.id, self.pid, reason.unwrap_or(ExitReason::Unknown))
    }

    async fn console(&self) -> Result<UnixStream> {
        self.meet(SimOperation::Console).await?;
        self.monitor(|_| Ok(()))?;
        let (ours, mut theirs) =
            UnixStream::pair().map_err(Error::io("making a console for", self.console_log()))?;
        let banner = format!("simulated console of {}\r\n", self.id);
        theirs
            .write_all(banner.as_bytes())
            .await
            .map_err(Error::io("writing to the console of", self.console_log()))?;
        Ok(ours)
    }

    async fn vnc(&self) -> Result<UnixStream> {
        self.meet(SimOperation::Vnc).await?;
        if !self.monitor(|machine| Ok(machine.vnc))? {
            return Err(Error::Missing { id: self.id, what: "screen" });
        }
        let (ours, mut theirs) =
            UnixStream::pair().map_err(Error::io("making a screen for", self.console_log()))?;
        theirs
            .write_all(b"RFB 003.008\n")
            .await
            .map_err(Error::io("writing to the screen of", self.console_log()))?;
        Ok(ours)
    }

    fn console_log(&self) -> PathBuf {
        self.host.run_dir.join(self.id.to_string()).join(crate::rundir::CONSOLE_LOG)
    }

    async fn rotate_console_log(&self, _limit: u64) -> Result<()> {
        self.meet(SimOperation::RotateLog).await
    }

    async fn set_balloon(&self, bytes: u64) -> Result<()> {
        self.meet(SimOperation::Balloon).await?;
        self.monitor(|machine| {
            machine.balloon_bytes = bytes.min(machine.memory_bytes);
            Ok(())
        })
    }

    async fn balloon(&self) -> Result<u64> {
        self.meet(SimOperation::Balloon).await?;
        self.monitor(|machine| Ok(machine.balloon_bytes))
    }

    async fn disks(&self) -> Result<Vec<DiskState>> {
        self.meet(SimOperation::Disks).await?;
        self.monitor(|machine| {
            let mut states = machine.disks.states();
            if let (RunState::IoError, Some(error)) = (machine.run, &machine.io_error) {
                states.iter_mut().filter(|state| state.id == error.0).for_each(|state| state.io = error.1);
            }
            Ok(states)
        })
    }

    async fn disk_attach(&self, disk: DiskSpec) -> Result<()> {
        self.meet(SimOperation::DiskAttach).await?;
        let host = &self.host;
        self.monitor(|machine| Ok(machine.disks.attach(host, machine.machine, disk)))??;
        Ok(())
    }

    async fn disk_detach(&self, id: &str, patience: Duration) -> Result<()> {
        self.meet(SimOperation::DiskDetach).await?;
        let keeps = self.host.guest(self.id).keeps_disks;
        let detach = |machine: &mut SimMachineState| {
            let releases = machine.run == RunState::Running && !keeps;
            Ok(machine.disks.detach(id, releases, patience))
        };
        match self.monitor(detach)? {
            Err(DiskError::GuestDidNotRelease { .. }) => {
                tokio::time::sleep(patience).await;
                Ok(self.monitor(detach)??)
            }
            other => Ok(other?),
        }
    }

    async fn disk_resize(&self, id: &str, bytes: u64) -> Result<()> {
        self.meet(SimOperation::DiskResize).await?;
        self.monitor(|machine| Ok(machine.disks.resize(id, bytes)))??;
        Ok(())
    }

    async fn disk_limits(&self, id: &str, limits: DiskLimits) -> Result<()> {
        self.meet(SimOperation::DiskLimits).await?;
        self.monitor(|machine| Ok(machine.disks.limit(id, limits)))??;
        Ok(())
    }

    async fn disks_snapshot(&self, disks: Vec<SnapshotDisk>) -> Result<Duration> {
        self.meet(SimOperation::DiskSnapshot).await?;
        let host = &self.host;
        self.monitor(|machine| Ok(machine.disks.snapshot(host, &disks)))??;
        Ok(Duration::ZERO)
    }

    async fn disk_stream(
        &self,
        id: &str,
        stream: Stream,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()> {
        let base = stream.base.as_ref().map(|base| base.layer.as_str());
        let total_bytes = self.monitor(|machine| Ok(machine.disks.check_stream(id, base)))??;
        self.work(SimOperation::DiskStream, id, total_bytes, &progress, cancel).await?;
        self.monitor(|machine| Ok(machine.disks.stream(id, base)))??;
        progress.send_replace(Progress { done_bytes: total_bytes, total_bytes });
        Ok(())
    }

    async fn disk_commit(
        &self,
        id: &str,
        commit: Commit,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()> {
        let total_bytes = self.monitor(|machine| Ok(machine.disks.check_commit(id, &commit)))??;
        self.work(SimOperation::DiskCommit, id, total_bytes, &progress, cancel).await?;
        self.monitor(|machine| Ok(machine.disks.commit(id, &commit)))??;
        progress.send_replace(Progress { done_bytes: total_bytes, total_bytes });
        Ok(())
    }
}

/// Lets the machine go on as before when a save fails or its caller goes away.
struct SaveGuard<'a> {
    machine: &'a SimMachine,
    before: RunState,
    done: bool,
}

impl SaveGuard<'_> {
    fn done(mut self) {
        self.done = true;
    }
}

impl Drop for SaveGuard<'_> {
    fn drop(&mut self) {
        if !self.done {
            let SimMachine { host, id, pid } = self.machine;
            host.process(*id, *pid, |machine| machine.run = self.before);
        }
    }
}
