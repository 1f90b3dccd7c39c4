//! Actions on a machine that lives: reset, pause, resume, reboot.

use std::sync::Arc;

use ostler_api::Fault;
use ostler_api::vm::{MachineState, Vm};
use ostler_api::vm_action::VmTask as Task;
use ostler_qemu::Machine;

use crate::fault;
use crate::host::within;
use crate::keep::Durable;
use crate::vm_task::{Outcome, Sight, VmTask};

impl VmTask {
    /// The machine, once it was looked at; a fault when there is none that can be talked to.
    pub(crate) async fn living(&mut self) -> Result<Arc<dyn Machine>, Fault> {
        self.look().await;
        match &self.live {
            Some(live) if self.sight.state != MachineState::Unresponsive => Ok(Arc::clone(&live.machine)),
            _ => Err(self.not_running()),
        }
    }

    /// One command to the machine. An end of its process in between is seen as such.
    pub(crate) async fn command(
        &mut self,
        what: &str,
        command: impl Future<Output = Result<(), ostler_qemu::Error>>,
    ) -> Result<(), Fault> {
        match within(what, self.host.config.times.ask, command).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                self.look().await;
                if self.live.is_none() {
                    Err(self.not_running())
                } else {
                    Err(fault::machine_failed(what, &error))
                }
            }
            Err(late) => {
                self.look().await;
                Err(late)
            }
        }
    }

    pub(crate) async fn reset(&mut self) -> Outcome {
        match self.try_reset().await {
            Ok(()) => Outcome::Done,
            Err(fault) => fault.into(),
        }
    }

    async fn try_reset(&mut self) -> Result<(), Fault> {
        let machine = self.living().await?;
        self.command("resetting the machine", machine.reset()).await?;
        // After a panic or a disk error the guest stands still until it is told to go on.
        if !matches!(self.sight.state, MachineState::Running | MachineState::Paused) {
            self.command("letting the guest run", machine.resume()).await?;
        }
        self.look().await;
        Ok(())
    }

    pub(crate) async fn pause(&mut self) -> Outcome {
        match self.try_pause().await {
            Ok(()) => Outcome::Done,
            Err(fault) => fault.into(),
        }
    }

    async fn try_pause(&mut self) -> Result<(), Fault> {
        let machine = self.living().await?;
        if self.sight.state != MachineState::Paused {
            self.command("pausing the guest", machine.pause()).await?;
            self.look().await;
        }
        match self.sight.state {
            MachineState::Paused => Ok(()),
            _ => Err(self.not_running()),
        }
    }

    /// From paused; from suspended it is a start.
    pub(crate) async fn resume(&mut self, vm: &Arc<Vm>, task: &Task) -> Outcome {
        if self.live.is_none() && self.record.saved {
            return self.start(vm, task).await;
        }
        match self.try_resume().await {
            Ok(()) => Outcome::Done,
            Err(fault) => fault.into(),
        }
    }

    async fn try_resume(&mut self) -> Result<(), Fault> {
        let machine = self.living().await?;
        self.let_run(&machine).await
    }

    /// Lets the guest's CPUs run, if they do not already.
    pub(crate) async fn let_run(&mut self, machine: &Arc<dyn Machine>) -> Result<(), Fault> {
        if self.sight.state == MachineState::Running {
            return Ok(());
        }
        self.command("letting the guest run", machine.resume()).await?;
        self.sight = Sight::of(MachineState::Starting);
        self.look().await;
        match self.sight.state {
            MachineState::Running | MachineState::Starting => Ok(()),
            _ => Err(self.not_running()),
        }
    }

    /// Off and on again as one task; which run it ends is written down first, so that it ends no second one.
    pub(crate) async fn reboot(&mut self, vm: &Arc<Vm>, task: &Task, timeout: u32) -> Outcome {
        let current = self.record.run.as_ref().map(|run| run.boot);
        let ends = match self.record.reboot {
            Some((operation, boot)) if operation == task.operation => boot,
            _ => {
                self.record.reboot = Some((task.operation, current));
                if let Err(fault) = self.persist(Durable::Agent).await {
                    return fault.into();
                }
                current
            }
        };
        if current.is_some() && current == ends {
            match self.shutdown(task, timeout, true).await {
                Outcome::Done => {}
                other => return other,
            }
        }
        self.start(vm, task).await
    }
}
