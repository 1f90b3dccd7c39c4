//! What a VM's task begins with: the machine that was found, or why there is none.
//!
//! Called at the start of each task, and again while a process exists that could not be adopted.

use std::sync::Arc;
use std::time::SystemTime;

use ostler_api::Time;
use ostler_api::vm::{EndCause, MachineFacts, MachineState};
use ostler_qemu::{Machine, RunState, Survey};
use uuid::Uuid;

use crate::fault;
use crate::host::within;
use crate::keep::Durable;
use crate::machine_spec::accelerator_back;
use crate::record::{Ended, Hardware, Run};
use crate::vm_task::{Live, Sight, VmTask};

impl VmTask {
    pub(crate) async fn adopt(&mut self, found: Option<Survey>) {
        self.handle.estrange(self.record.estranged);
        match found {
            Some(Survey::Running(machine)) => self.adopt_machine(machine).await,
            Some(Survey::Unresponsive { pid, reason, .. }) => {
                if !self.stray {
                    tracing::warn!(pid, reason, "a machine does not answer; it is looked at again");
                }
                self.stray = true;
                self.open_recorded();
                self.see_unresponsive(&reason);
            }
            // It never ran. If a start is still wanted, it is made anew.
            Some(Survey::HalfStarted { pid, .. }) => {
                tracing::info!(pid, "ending a machine whose start was cut short");
                self.stray = true;
                self.open_recorded();
                match self.end(EndCause::Asked).await {
                    Ok(()) => self.sight = self.rest(),
                    Err(fault) => self.see_unresponsive(&fault.message),
                }
            }
            Some(Survey::Dead { last_words, .. }) => self.adopt_dead(&last_words).await,
            None => self.adopt_dead("").await,
        }
    }

    async fn adopt_machine(&mut self, machine: Arc<dyn Machine>) {
        self.stray = false;
        let state = within("asking QEMU for its state", self.host.config.times.ask, machine.state()).await;
        let facts = machine.facts();
        tracing::info!(pid = facts.pid, state = ?state.as_ref().ok(), "adopted");
        self.take_machine(machine);
        if self.record.saved {
            if matches!(state, Ok(Ok(RunState::Saved))) {
                // Its memory is written and recorded; only its end was cut off.
                match self.end(EndCause::Asked).await {
                    Ok(()) => self.sight = self.rest(),
                    Err(fault) => self.see_unresponsive(&fault.message),
                }
                return;
            }
            // It ran on since, so that its disks no longer fit to the saved memory.
            self.drop_saved().await;
        } else if matches!(state, Ok(Ok(RunState::Saved))) {
            // A suspend that was cut off before it counted.
            let machine = self.live.as_ref().map(|live| Arc::clone(&live.machine));
            if let Some(machine) = machine
                && let Err(fault) = self.command("letting the guest run", machine.resume()).await
            {
                tracing::warn!(
                    reason = fault.message,
                    "the guest stands still after a suspend that was cut off"
                );
            }
            self.remove_state_files().await;
        }
        self.persist_or_warn(Durable::Agent).await;
        self.sight = Sight::of(MachineState::Starting);
        self.look().await;
    }

    /// There is no process.
    async fn adopt_dead(&mut self, last_words: &str) {
        self.stray = false;
        let run = self.record.run.clone();
        if let Err(fault) = self.retire().await {
            tracing::warn!(reason = fault.message, "what is left of the machine stays");
        }
        if let Some(run) = run {
            self.record.ended = self.why_gone(&run, last_words);
            tracing::info!(ended = ?self.record.ended, "the machine is gone");
            self.persist_or_warn(Durable::Agent).await;
        }
        self.sight = self.rest();
    }

    fn why_gone(&self, run: &Run, last_words: &str) -> Option<Ended> {
        let (cause, fault) = match run {
            Run { ending: Some(cause), .. } => (*cause, None),
            // Its start was not finished.
            Run { facts: None, .. } => return None,
            run if run.host_boot != self.host.host_boot => {
                let message = "the node was restarted while the VM ran; start it again: ostler vm start";
                (EndCause::HostRestarted, Some(fault::fault("host_restarted", message)))
            }
            Run { .. } => {
                (EndCause::Died, Some(fault::died_with("ended while the agent was away", last_words)))
            }
        };
        Some(Ended { cause, fault })
    }

    /// What a VM without a process is: its memory in a file, or nothing.
    pub(crate) fn rest(&self) -> Sight {
        match &self.record.ended {
            _ if self.record.saved => Sight::of(MachineState::Saved),
            None => Sight::absent(None, None),
            Some(Ended { cause, fault }) => Sight::absent(Some(*cause), fault.clone()),
        }
    }

    /// A machine is there: makes it this task's, with the facts of its run.
    pub(crate) fn take_machine(&mut self, machine: Arc<dyn Machine>) {
        let facts = machine.facts();
        let accelerator = accelerator_back(facts.accelerator);
        let new_run = self.new_run();
        let run = self.record.run.get_or_insert(new_run);
        run.host_boot.clone_from(&self.host.host_boot);
        run.console_log = Some(machine.console_log());
        run.facts = Some(MachineFacts {
            boot: run.boot,
            pid: facts.pid,
            machine_version: facts.machine_version.clone(),
            accelerator,
            cpu_model: facts.cpu_model.clone(),
            started: time(facts.started_at),
        });
        let hardware =
            Hardware { machine_version: facts.machine_version, cpu_model: facts.cpu_model, accelerator };
        self.record.hardware = Some(hardware);
        self.open_recorded();
        *self.handle.console_log.lock() = Some(machine.console_log());
        *self.handle.machine.lock() = Some(Arc::clone(&machine));
        self.live = Some(Live { events: Some(machine.events()), machine });
    }

    pub(crate) fn new_run(&self) -> Run {
        let disks = self.vm.iter().flat_map(|vm| &vm.spec.disks);
        Run {
            boot: Uuid::now_v7(),
            host_boot: self.host.host_boot.clone(),
            facts: None,
            volumes: disks.map(|disk| disk.volume).collect(),
            console_log: None,
            ending: None,
        }
    }

    /// Tells the volumes' side which disks the recorded machine has open.
    pub(crate) fn open_recorded(&self) {
        let volumes = self.record.run.iter().flat_map(|run| run.volumes.iter().copied()).collect();
        *self.handle.open.lock() = volumes;
    }
}

/// In whole milliseconds, as all times of the API.
fn time(at: SystemTime) -> Time {
    jiff::Timestamp::try_from(at)
        .and_then(|at| jiff::Timestamp::from_millisecond(at.as_millisecond()))
        .map_or_else(|_| Time::now(), Time)
}
