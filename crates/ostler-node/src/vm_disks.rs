//! Disks of a VM that come and go while it runs.
//!
//! What always holds: the record names a volume before the machine opens it and until it has closed it, so that no volume is
//! deleted or changed under a machine, whenever the agent ends. Whoever changes what a VM's disks are made of holds the
//! handle's `disks` lock: a start, an attach, a detach, a snapshot, a resize.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::vm::Vm;
use ostler_api::vm_action::VmTask as Task;
use ostler_api::{Fault, VmId, VolumeId};
use ostler_qemu::Machine;

use crate::fault;
use crate::host::{Host, within};
use crate::keep::Durable;
use crate::machine_spec::{disk_id, disk_spec};
use crate::vm_task::{Outcome, VmTask};

/// How long a guest may take to let a disk go.
const GUEST_PATIENCE: Duration = Duration::from_secs(15);

impl Host {
    /// Refuses a volume that another machine has open: two writers would destroy it.
    pub(crate) fn check_elsewhere(&self, volume: VolumeId, vm: VmId) -> Result<(), Fault> {
        match self.open_elsewhere(volume, vm) {
            None => Ok(()),
            Some(other) => Err(fault::fault(
                "volume_in_use",
                format!("volume {volume} is still open in the machine of VM {other}; stop that one first"),
            )),
        }
    }
}

impl VmTask {
    /// Plugs in a disk that the VM's list has. Without a machine there is nothing to do: the next start takes it along.
    pub(crate) async fn attach(&mut self, vm: &Arc<Vm>, task: &Task, volume: VolumeId) -> Outcome {
        let (host, handle) = (Arc::clone(&self.host), Arc::clone(&self.handle));
        let Some(machine) = self.machine() else { return self.without_machine() };
        let _asking = host.volumes.ask([volume]);
        let _disks = tokio::select! {
            biased;
            () = Self::called_off(&host, &handle, task) => return Outcome::Superseded,
            disks = handle.lock_disks() => disks,
        };
        let Some(listed) = vm.spec.disks.iter().find(|disk| disk.volume == volume) else {
            return fault::fault("volume_missing", format!("volume {volume} is not a disk of this VM"))
                .into();
        };
        if let Err(fault) = self.note_open(volume).await {
            self.note_closed(volume).await;
            return fault.into();
        }
        let plug = async {
            host.check_elsewhere(volume, handle.id)?;
            // By an earlier agent, which was not there any more to say so. Its files are in use.
            if host.has_disk(&machine, volume).await? {
                return Ok(());
            }
            let layers = host.volume_ready(volume).await?;
            let spec = disk_spec(listed, &layers, None)
                .map_err(|error| fault::fault("machine_invalid", error.to_string()))?;
            let what = "plugging in a disk";
            let plugged = within(what, host.config.times.ask, machine.disk_attach(spec)).await?;
            plugged.map_err(|error| fault::machine_failed(what, &error))
        };
        let plugged = tokio::select! {
            biased;
            () = Self::called_off(&host, &handle, task) => return Outcome::Superseded,
            plugged = plug => plugged,
        };
        match plugged {
            Ok(()) => Outcome::Done,
            Err(fault) => {
                // Only what QEMU says it does not have is closed.
                if matches!(host.has_disk(&machine, volume).await, Ok(false)) {
                    self.note_closed(volume).await;
                }
                fault.into()
            }
        }
    }

    /// Asks the guest to let a disk go and closes it.
    pub(crate) async fn detach(&mut self, task: &Task, volume: VolumeId) -> Outcome {
        let (host, handle) = (Arc::clone(&self.host), Arc::clone(&self.handle));
        let Some(machine) = self.machine() else { return self.without_machine() };
        let id = disk_id(volume);
        let what = "pulling out a disk";
        let limit = host.config.times.ask + GUEST_PATIENCE;
        let pull = async {
            let _disks = handle.lock_disks().await;
            let _hold = host.hold(&[volume]).await?;
            let pulled = within(what, limit, machine.disk_detach(&id, GUEST_PATIENCE)).await?;
            pulled.map_err(|error| fault::machine_failed(what, &error))
        };
        let pulled = tokio::select! {
            biased;
            () = Self::called_off(&host, &handle, task) => return Outcome::Superseded,
            pulled = pull => pulled,
        };
        match pulled {
            Ok(()) => {
                self.note_closed(volume).await;
                Outcome::Done
            }
            Err(fault) => fault.into(),
        }
    }

    /// There is nothing to plug in or out, unless a process exists that does not answer.
    fn without_machine(&self) -> Outcome {
        if self.stray { self.not_running().into() } else { Outcome::Done }
    }

    fn machine(&self) -> Option<Arc<dyn Machine>> {
        self.live.as_ref().map(|live| Arc::clone(&live.machine))
    }

    async fn note_open(&mut self, volume: VolumeId) -> Result<(), Fault> {
        let Some(run) = &mut self.record.run else { return Ok(()) };
        if !run.volumes.contains(&volume) {
            run.volumes.push(volume);
        }
        self.open_recorded();
        self.persist(Durable::Agent).await
    }

    async fn note_closed(&mut self, volume: VolumeId) {
        if let Some(run) = &mut self.record.run {
            run.volumes.retain(|open| *open != volume);
        }
        self.persist_or_warn(Durable::Agent).await;
        self.open_recorded();
        self.host.disks_released.notify_waiters();
        self.host.tidy.wake_postponed(&[volume]);
    }
}
