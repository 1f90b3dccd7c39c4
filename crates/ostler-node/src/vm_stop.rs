//! Ends of a machine: shutdown, stop, delete, and the one way in which a process is ended and cleaned up.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ostler_api::Fault;
use ostler_api::vm::{EndCause, MachineState};
use ostler_api::vm_action::VmTask as Task;
use ostler_qemu::{Machine, MachineEvent, RunState};
use tokio::time::Instant;

use crate::console_log::older;
use crate::fault;
use crate::host::within;
use crate::keep::{Durable, blocking};
use crate::record::{Ended, Record};
use crate::vm_task::{Outcome, Sight, VmTask};

impl VmTask {
    /// Pulls the plug; saved memory is dropped.
    pub(crate) async fn stop(&mut self) -> Outcome {
        if let Err(fault) = self.end(EndCause::Asked).await {
            return fault.into();
        }
        self.drop_saved().await;
        self.sight = Sight::absent(Some(EndCause::Asked), None);
        Outcome::Done
    }

    /// Presses the power button until the guest is off, or the time is over.
    pub(crate) async fn shutdown(&mut self, task: &Task, timeout: u32, force: bool) -> Outcome {
        if self.record.saved && self.live.is_none() {
            let message = "the VM is suspended: resume it first, or drop its memory with ostler vm stop";
            return fault::fault("not_running", message).into();
        }
        let until = Instant::now() + Duration::from_secs(timeout.into());
        while let Some(machine) = self.live.as_ref().map(|live| Arc::clone(&live.machine)) {
            let now = Instant::now();
            if now >= until {
                break;
            }
            self.press(&machine).await;
            let again = until.min(now + self.host.config.times.press);
            match self.wait_for_off(task, again).await {
                Off::Never => return Outcome::Superseded,
                Off::Yes => {}
                Off::NotYet => {
                    self.look().await;
                    continue;
                }
            }
            break;
        }
        let off = match &self.live {
            None => !self.stray,
            Some(live) => {
                let ask = within("the guest's state", self.host.config.times.ask, live.machine.state()).await;
                matches!(ask, Ok(Ok(RunState::Shutdown)))
            }
        };
        if !off && !force {
            let message = format!(
                "the guest did not power off within {timeout} s and still runs; give it more time, or force it \
                 off: ostler vm stop"
            );
            return fault::fault("shutdown_timeout", message).into();
        }
        if let Err(fault) = self.end(EndCause::Asked).await {
            return fault.into();
        }
        self.sight = Sight::absent(Some(EndCause::Asked), None);
        Outcome::Done
    }

    async fn press(&self, machine: &Arc<dyn Machine>) {
        match within("pressing the power button", self.host.config.times.ask, machine.powerdown()).await {
            Ok(Ok(())) => tracing::debug!("pressed the power button"),
            Ok(Err(error)) => tracing::info!(error = fault::chain(&error), "the power button does not work"),
            Err(late) => tracing::info!(error = late.message, "the power button does not work"),
        }
    }

    async fn wait_for_off(&mut self, task: &Task, until: Instant) -> Off {
        let (host, handle) = (Arc::clone(&self.host), Arc::clone(&self.handle));
        let called_off = Self::called_off(&host, &handle, task);
        let Some(live) = &mut self.live else { return Off::Yes };
        let machine = Arc::clone(&live.machine);
        let off = async {
            loop {
                let event = tokio::select! {
                    event = live.event() => event,
                    _ = machine.exited() => return Off::Yes,
                };
                match event {
                    Ok(MachineEvent::Shutdown { .. } | MachineEvent::Exited) => return Off::Yes,
                    // It may be among those that were missed. The button is not pressed sooner for that.
                    Err(_) if matches!(machine.state().await, Ok(RunState::Shutdown)) => return Off::Yes,
                    Err(_) => {}
                    Ok(
                        MachineEvent::Paused
                        | MachineEvent::Resumed
                        | MachineEvent::Reset { .. }
                        | MachineEvent::Powerdown
                        | MachineEvent::Panicked
                        | MachineEvent::IoError { .. },
                    ) => {}
                }
            }
        };
        tokio::select! {
            biased;
            () = called_off => Off::Never,
            off = off => off,
            () = tokio::time::sleep_until(until) => Off::NotYet,
        }
    }

    /// Ends it and forgets it; its record disappears last.
    pub(crate) async fn delete(&mut self) -> Outcome {
        match self.remove().await {
            Ok(()) => {
                self.sight = Sight::absent(Some(EndCause::Asked), None);
                Outcome::Done
            }
            Err(fault) => fault.into(),
        }
    }

    /// Leaves nothing of the VM on this host but its volumes, which have lives of their own.
    pub(crate) async fn remove(&mut self) -> Result<(), Fault> {
        self.end(EndCause::Asked).await?;
        self.remove_state_files().await;
        let drop = self.host.config.keep.vm_drop(self.id());
        let dropped = within("removing the VM's files", self.host.config.times.pool, drop).await?;
        dropped.map_err(|error| {
            let dir = self.host.vm_dir(self.id());
            fault::fault("io", format!("{} cannot be removed: {error}", dir.display()))
        })?;
        let generation = self.record.generation;
        *self.record = Record { generation, ..Record::default() };
        self.recorded = false;
        Ok(())
    }

    /// Makes sure that no process of the VM is left, and cleans up behind it. `cause` is what an agent that is
    /// restarted in the middle of it takes the end for.
    pub(crate) async fn end(&mut self, cause: EndCause) -> Result<(), Fault> {
        if let Some(run) = &mut self.record.run
            && run.ending != Some(cause)
        {
            run.ending = Some(cause);
            self.persist_or_warn(Durable::Agent).await;
        }
        let limit = self.host.config.times.end;
        let mut ended = false;
        if let Some(live) = &self.live {
            match within("ending QEMU", limit, live.machine.quit()).await {
                Ok(Ok(())) => ended = true,
                Ok(Err(error)) => tracing::warn!(error = fault::chain(&error), "using force"),
                Err(late) => tracing::warn!(error = late.message, "using force"),
            }
        }
        if !ended {
            let kill = self.host.hypervisor.kill(self.id().0);
            within("ending QEMU by force", limit, kill)
                .await?
                .map_err(|error| fault::machine_failed("QEMU cannot be ended", &error))?;
        }
        let ran = self.record.run.is_some();
        self.retire().await?;
        if ran {
            self.record.ended = Some(Ended { cause, fault: None });
            self.persist_or_warn(Durable::Agent).await;
        }
        Ok(())
    }

    /// Its process has ended: keeps its last console output, gives everything else back.
    pub(crate) async fn retire(&mut self) -> Result<(), Fault> {
        let limit = self.host.config.times.end;
        *self.handle.machine.lock() = None;
        let log = self.record.run.as_ref().and_then(|run| run.console_log.clone());
        if let Some(log) = log.filter(|_| self.host.config.keep.on_disk()) {
            let kept = self.host.console_file(self.id());
            let keep = blocking(move || move_logs(&log, &kept));
            if let Ok(Err(error)) = within("keeping the console log", limit, keep).await {
                tracing::debug!(%error, "the last console output is lost");
            }
        }
        *self.handle.console_log.lock() = None;
        within("cleaning up behind QEMU", limit, self.host.hypervisor.forget(self.id().0))
            .await?
            .map_err(|error| fault::machine_failed("cleaning up behind QEMU", &error))?;
        self.live = None;
        self.stray = false;
        self.record.run = None;
        self.let_go();
        Ok(())
    }

    /// Its disks are closed.
    pub(crate) fn let_go(&self) {
        let closed = std::mem::take(&mut *self.handle.open.lock());
        self.host.disks_released.notify_waiters();
        self.host.tidy.wake_postponed(&closed);
    }

    /// Drops saved memory: first from the record, so that it is never restored over disks that went on.
    pub(crate) async fn drop_saved(&mut self) {
        if self.record.saved {
            self.record.saved = false;
            self.persist_or_warn(Durable::Host).await;
        }
        self.remove_state_files().await;
    }

    pub(crate) async fn remove_state_files(&self) {
        let state = self.host.state_file(self.id());
        let files = [state.with_extension("partial"), state];
        let remove = blocking(move || {
            for file in files {
                match std::fs::remove_file(file) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                    _ => {}
                }
            }
            Ok(())
        });
        if let Ok(Err(error)) = within("removing saved memory", self.host.config.times.pool, remove).await {
            tracing::warn!(%error, "saved memory that is no longer valid stays on the disk");
        }
    }

    pub(crate) fn not_running(&self) -> Fault {
        match (&self.sight.fault, self.sight.state) {
            (Some(fault), _) => fault.clone(),
            (None, MachineState::Saved) => {
                fault::fault("not_running", "the VM is suspended; resume it: ostler vm resume")
            }
            (None, _) => fault::fault("not_running", "the VM does not run; start it: ostler vm start"),
        }
    }
}

enum Off {
    Yes,
    NotYet,
    /// Nobody waits for it any more.
    Never,
}

fn move_file(from: &Path, to: &Path) -> std::io::Result<()> {
    if let Some(dir) = to.parent() {
        std::fs::create_dir_all(dir)?;
    }
    if std::fs::rename(from, to).is_err() {
        std::fs::copy(from, to)?;
    }
    Ok(())
}

/// The log, and the one before it if it began anew.
fn move_logs(from: &Path, to: &Path) -> std::io::Result<()> {
    match move_file(&older(from), &older(to)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    move_file(from, to)
}
