//! Watching a VM's machine: its events, its end, and a look at it now and then, so that nothing depends on events alone.
//!
//! Everything here only changes what is seen; telling it is the task's main loop's business.

use std::sync::Arc;

use futures::FutureExt;
use ostler_api::Fault;
use ostler_api::vm::{EndCause, MachineState};
use ostler_qemu::{DiskIo, ExitReport, MachineEvent, RunState};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;

use crate::fault;
use crate::host::{jitter, within};
use crate::keep::Durable;
use crate::machine_spec::disk_id;
use crate::record::Ended;
use crate::vm_task::{RETRY, Sight, VmTask};

/// Console logs are begun anew beyond this.
const CONSOLE_LOG_MAX: u64 = 4 << 20;
/// A console log is looked after with every so many looks at the machine.
const LOOKS_PER_ROTATION: u32 = 6;
const DISK_FULL: &str = "disk_full";
/// So much room lets a guest go on that waits for some.
const ROOM: u64 = 64 << 20;

impl VmTask {
    /// Waits for the next thing that happens, and takes it in.
    pub(crate) async fn wait(&mut self) {
        self.schedule();
        let next = [self.look_at, self.repeat_at, self.retry_at].into_iter().flatten().min();
        let timer = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let happened = async {
            match &mut self.live {
                None => std::future::pending().await,
                Some(live) => {
                    let machine = Arc::clone(&live.machine);
                    tokio::select! {
                        event = live.event() => Happened::Event(event),
                        report = machine.exited() => Happened::Exited(report),
                    }
                }
            }
        };
        let happened = tokio::select! {
            biased;
            () = self.handle.rung() => return,
            () = self.host.stopping.cancelled() => return,
            happened = happened => happened,
            () = timer => Happened::Timer,
        };
        Box::pin(self.react(happened)).await;
    }

    /// Sets the time of the next look.
    fn schedule(&mut self) {
        let every = match self.host.config.look_every {
            every if self.stray => every.or(Some(RETRY)),
            every => every.filter(|_| self.live.is_some()),
        };
        self.look_at = match (self.look_at, every) {
            (_, None) => None,
            (Some(at), Some(_)) => Some(at),
            (None, Some(every)) => Some(Instant::now() + jitter(every)),
        };
    }

    async fn react(&mut self, happened: Happened) {
        match happened {
            Happened::Timer => self.due().await,
            Happened::Exited(report) => self.died(&report).await,
            Happened::Event(Ok(MachineEvent::IoError { disk, reason, nospace })) => {
                let fault = Some(io_error(&self.disk_name(&disk), &reason, nospace));
                self.sight = Sight { fault, ..Sight::of(MachineState::IoError) };
            }
            Happened::Event(Ok(MachineEvent::Exited)) => {
                if let Some(machine) = self.live.as_ref().map(|live| Arc::clone(&live.machine))
                    && let Ok(report) =
                        within("the machine's end", self.host.config.times.end, machine.exited()).await
                {
                    self.died(&report).await;
                }
            }
            Happened::Event(Ok(MachineEvent::Powerdown)) => {}
            Happened::Event(Ok(
                MachineEvent::Paused
                | MachineEvent::Resumed
                | MachineEvent::Reset { .. }
                | MachineEvent::Shutdown { .. }
                | MachineEvent::Panicked,
            ))
            | Happened::Event(Err(RecvError::Lagged(_) | RecvError::Closed)) => self.look().await,
        }
    }

    async fn due(&mut self) {
        let now = Instant::now();
        if self.look_at.take_if(|at| *at <= now).is_some() {
            if self.stray {
                let found = self.host.survey_one(self.id().0).await;
                match found {
                    Ok(found) => self.adopt(found).await,
                    Err(fault) => tracing::debug!(reason = fault.message, "still not known what runs"),
                }
            } else {
                self.look().await;
                self.go_on_with_room().await;
                self.rotate().await;
            }
        }
        if self.repeat_at.take_if(|at| *at <= now).is_some() && self.record.answered.is_some() {
            self.repeat_answer();
        }
        // What is to be tried again stands in the inbox; waking up is enough.
        self.retry_at.take_if(|at| *at <= now);
    }

    async fn rotate(&mut self) {
        self.looks = self.looks.wrapping_add(1);
        if let Some(live) = &self.live
            && self.looks.is_multiple_of(LOOKS_PER_ROTATION)
        {
            let rotate = live.machine.rotate_console_log(CONSOLE_LOG_MAX);
            match within("looking after the console log", self.host.config.times.ask, rotate).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(error = fault::chain(&error), "the console log grows on"),
                Err(late) => tracing::warn!(error = late.message, "the console log grows on"),
            }
        }
    }

    /// Asks the machine how it is. Its answer becomes what is seen.
    pub(crate) async fn look(&mut self) {
        let Some(machine) = self.live.as_ref().map(|live| Arc::clone(&live.machine)) else { return };
        let answer = within("asking QEMU for its state", self.host.config.times.ask, machine.state()).await;
        let reason = match answer {
            Ok(Ok(state)) => return self.apply(state).await,
            Ok(Err(error)) => fault::chain(&error),
            Err(late) => late.message,
        };
        match machine.exited().now_or_never() {
            Some(report) => self.died(&report).await,
            None => self.see_unresponsive(&reason),
        }
    }

    pub(crate) fn see_unresponsive(&mut self, reason: &str) {
        // The first reason stays: what is seen has not changed with the wording.
        if self.sight.state != MachineState::Unresponsive {
            let fault = Some(fault::unresponsive(reason));
            self.sight = Sight { fault, ..Sight::of(MachineState::Unresponsive) };
        }
    }

    async fn apply(&mut self, state: RunState) {
        let machine_state = match state {
            RunState::Running | RunState::Sleeping => MachineState::Running,
            RunState::Paused | RunState::Saving | RunState::Saved => MachineState::Paused,
            RunState::Prelaunch | RunState::Restoring => MachineState::Starting,
            RunState::IoError => MachineState::IoError,
            RunState::Panicked | RunState::InternalError => MachineState::Panicked,
            RunState::Shutdown => return self.guest_off().await,
        };
        if self.sight.state == machine_state {
            return;
        }
        let fault = match state {
            RunState::Panicked => Some(fault::fault(
                "guest_panicked",
                "the guest's kernel panicked; see ostler vm log, then reset it: ostler vm stop and start",
            )),
            RunState::InternalError => Some(fault::fault(
                "qemu_internal_error",
                "QEMU met a fault it cannot go on from; stop and start the VM",
            )),
            RunState::IoError => Some(self.waits_for().await),
            _ => None,
        };
        self.sight = Sight { fault, ..Sight::of(machine_state) };
    }

    /// What a guest waits for whose disk failed, by QEMU's word.
    async fn waits_for(&self) -> Fault {
        let machine = self.live.as_ref().map(|live| Arc::clone(&live.machine));
        let disks = match &machine {
            Some(machine) => self.host.disks_of(machine).await.unwrap_or_default(),
            None => Vec::new(),
        };
        match disks.into_iter().find(|disk| disk.io != DiskIo::Ok) {
            Some(disk) => io_error(&self.disk_name(&disk.id), "", disk.io == DiskIo::NoSpace),
            None => io_error("a disk", "", false),
        }
    }

    /// What people call a disk that QEMU calls `id`.
    fn disk_name(&self, id: &str) -> String {
        let disks = self.vm.iter().flat_map(|vm| &vm.spec.disks);
        let volume = disks.map(|disk| disk.volume).find(|volume| disk_id(*volume) == id);
        match volume.and_then(|volume| self.host.volumes.name(volume)) {
            Some(name) => format!("volume {name}"),
            None => format!("disk {id}"),
        }
    }

    /// A guest that waits for room goes on when there is some again; nobody has to get up for that.
    async fn go_on_with_room(&mut self) {
        let full = self.sight.state == MachineState::IoError
            && self.sight.fault.as_ref().is_some_and(|fault| fault.code == DISK_FULL);
        if !full {
            return;
        }
        let usage =
            within("looking for room in the pool", self.host.config.times.pool, self.host.pool.usage());
        let Ok(Ok(usage)) = usage.await else { return };
        let Some(machine) = self.live.as_ref().map(|live| Arc::clone(&live.machine)) else { return };
        if usage.available < ROOM {
            return;
        }
        tracing::info!(available = usage.available, "there is room again: the guest goes on");
        if let Err(fault) = self.let_run(&machine).await {
            tracing::warn!(reason = fault.message, "the guest still waits");
        }
    }

    /// The guest has powered itself off: its process has done its work.
    async fn guest_off(&mut self) {
        match self.end(EndCause::GuestShutdown).await {
            Ok(()) => self.sight = Sight::absent(Some(EndCause::GuestShutdown), None),
            Err(fault) => self.sight = Sight { fault: Some(fault), ..Sight::of(MachineState::Unresponsive) },
        }
    }

    /// The process is gone and nobody asked for it.
    pub(crate) async fn died(&mut self, report: &ExitReport) {
        let fault = fault::died(report);
        tracing::warn!(reason = fault.message, "QEMU died");
        if let Err(fault) = self.retire().await {
            tracing::warn!(reason = fault.message, "what is left of the machine stays");
        }
        self.record.ended = Some(Ended { cause: EndCause::Died, fault: Some(fault) });
        self.persist_or_warn(Durable::Agent).await;
        self.sight = self.rest();
    }
}

#[derive(Debug)]
enum Happened {
    Event(Result<MachineEvent, RecvError>),
    Exited(ExitReport),
    Timer,
}

fn io_error(disk: &str, reason: &str, nospace: bool) -> Fault {
    let reason = if reason.is_empty() { "an I/O error" } else { reason };
    if nospace {
        fault::fault(
            DISK_FULL,
            format!(
                "{disk} has no space left in the node's pool and the guest waits; free some: it goes on within a minute, or at once with ostler vm start"
            ),
        )
    } else {
        fault::fault(
            "disk_error",
            format!(
                "{disk} reported {reason} and the guest waits; mend it, then start the VM: ostler vm start"
            ),
        )
    }
}
