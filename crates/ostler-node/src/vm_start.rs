//! Start: disks and images are here, the ports are free, then QEMU; from saved memory when there is some.
//!
//! What always holds: the record of the run is written before the process exists, so that no machine is ever found that
//! nobody knows of. Saved memory is dropped before the guest's CPUs run again, and only then.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ostler_api::vm::{EndCause, MachineState, Vm};
use ostler_api::vm_action::VmTask as Task;
use ostler_api::{Accelerator, Fault};
use ostler_qemu::{Machine, MachineSpec, StartError, StartOptions};

use crate::fault;
use crate::host::{Host, within};
use crate::images::image_ref;
use crate::keep::Durable;
use crate::machine_spec::{Parts, accelerator_back, machine_spec};
use crate::ports::ports_check;
use crate::record::{Hardware, SavedDisks};
use crate::vm_suspend::PROGRESS_EVERY;
use crate::vm_task::{Outcome, Sight, VmTask};

impl VmTask {
    pub(crate) async fn start(&mut self, vm: &Arc<Vm>, task: &Task) -> Outcome {
        match self.make_way().await {
            Ok(false) => {}
            Ok(true) => return Outcome::Done,
            Err(fault) => return fault.into(),
        }
        self.vm = Some(Arc::clone(vm));
        let (host, handle) = (Arc::clone(&self.host), Arc::clone(&self.handle));
        let _asking = host.volumes.ask(vm.spec.disks.iter().map(|disk| disk.volume));
        let _disks = tokio::select! {
            biased;
            () = Self::called_off(&host, &handle, task) => return Outcome::Superseded,
            disks = handle.lock_disks() => disks,
        };
        let run = self.new_run();
        // From here on no volume is deleted under the start.
        self.handle.open.lock().clone_from(&run.volumes);
        self.record.run = Some(run);
        self.record.ended = None;
        let outcome = match self.prepare(vm, task).await {
            Ok(spec) => self.launch(spec, task).await,
            Err(outcome) => outcome,
        };
        if self.live.is_none() && !self.stray {
            self.give_up(&outcome).await;
        }
        outcome
    }

    /// True when the guest runs already. A machine that can no longer run is ended first: there is never a second one.
    async fn make_way(&mut self) -> Result<bool, Fault> {
        self.look().await;
        match &self.live {
            None if self.stray => self.end(EndCause::Asked).await.map(|()| false),
            None => Ok(false),
            Some(live) => {
                let machine = Arc::clone(&live.machine);
                match self.sight.state {
                    MachineState::Running => Ok(true),
                    MachineState::Paused | MachineState::Starting | MachineState::IoError => {
                        self.let_run(&machine).await.map(|()| true)
                    }
                    MachineState::Panicked
                    | MachineState::Unresponsive
                    | MachineState::Absent
                    | MachineState::Saved => self.end(EndCause::Asked).await.map(|()| false),
                }
            }
        }
    }

    /// Everything before QEMU. May take long when an image has to come first, so it says how far it is.
    async fn prepare(&mut self, vm: &Arc<Vm>, task: &Task) -> Result<MachineSpec, Outcome> {
        let (host, handle) = (Arc::clone(&self.host), Arc::clone(&self.handle));
        let arrived = Arc::new(AtomicU64::new(0));
        let saved = self.record.saved_disks.clone().filter(|_| self.record.saved);
        let ready = machine_for(&host, vm, self.record.hardware.clone(), self.record.saved, saved, &arrived);
        let called_off = Self::called_off(&host, &handle, task);
        tokio::pin!(ready, called_off);
        let mut told = 0;
        loop {
            tokio::select! {
                biased;
                () = &mut called_off => return Err(Outcome::Superseded),
                spec = &mut ready => return spec.map_err(Outcome::Failed),
                () = tokio::time::sleep(PROGRESS_EVERY) => {
                    let now = arrived.load(Ordering::Relaxed);
                    if now != told {
                        told = now;
                        self.progress(task, "downloading", now, None);
                    }
                }
            }
        }
    }

    async fn launch(&mut self, spec: MachineSpec, task: &Task) -> Outcome {
        let (host, handle) = (Arc::clone(&self.host), Arc::clone(&self.handle));
        let _slot = tokio::select! {
            biased;
            () = Self::called_off(&host, &handle, task) => return Outcome::Superseded,
            slot = host.starts.acquire() => slot,
        };
        if let Err(fault) = self.persist(Durable::Agent).await {
            return fault.into();
        }
        let restoring = self.record.saved;
        let options = StartOptions {
            restore_from: restoring.then(|| host.state_file(handle.id)),
            // The saved memory is dropped from the record before the guest goes on.
            paused: restoring,
        };
        let times = &host.config.times;
        let limit = if restoring { times.start + times.state } else { times.start };
        let start = within("starting QEMU", limit, host.hypervisor.start(spec, options));
        tokio::pin!(start);
        let result = tokio::select! {
            biased;
            result = &mut start => result,
            () = handle.superseded(task) => {
                // The start is not dropped half way: its process is ended, and with it the start.
                let kill = host.hypervisor.kill(handle.id.0);
                let (_, result) = tokio::join!(within("ending QEMU by force", times.end, kill), start);
                if let Ok(Ok(machine)) = result {
                    self.take_machine(machine);
                    match self.end(EndCause::Asked).await {
                        Ok(()) => self.sight = self.rest(),
                        Err(fault) => self.see_unresponsive(&fault.message),
                    }
                }
                return Outcome::Superseded;
            }
        };
        match result {
            Ok(Ok(machine)) => self.started(machine, restoring).await,
            Ok(Err(StartError::AlreadyRunning { pid, .. })) => self.start_found(pid).await,
            Ok(Err(error)) => fault::start_failed(&error).into(),
            Err(_) => {
                let kill = within("ending QEMU by force", times.end, host.hypervisor.kill(handle.id.0)).await;
                if !matches!(kill, Ok(Ok(()))) {
                    self.stray = true;
                    self.open_recorded();
                }
                let message = format!("QEMU was not ready within {} s; start the VM again", limit.as_secs());
                fault::fault("start_timeout", message).into()
            }
        }
    }

    async fn started(&mut self, machine: Arc<dyn Machine>, restored: bool) -> Outcome {
        self.take_machine(Arc::clone(&machine));
        if !restored {
            self.sight = Sight::of(MachineState::Running);
            return Outcome::Done;
        }
        self.sight = Sight::of(MachineState::Paused);
        self.record.saved = false;
        if let Err(fault) = self.persist(Durable::Host).await {
            // It has not run, so that its saved memory still fits to its disks.
            self.record.saved = true;
            if let Err(fault) = self.end(EndCause::Asked).await {
                self.see_unresponsive(&fault.message);
            }
            return fault.into();
        }
        let running = self.let_run(&machine).await;
        self.remove_state_files().await;
        match running {
            Ok(()) => Outcome::Done,
            Err(fault) => fault.into(),
        }
    }

    /// The driver knows of a living machine that this task does not.
    async fn start_found(&mut self, pid: u32) -> Outcome {
        tracing::warn!(pid, "the machine runs already: adopting it");
        match self.host.survey_one(self.id().0).await {
            Ok(found) => Box::pin(self.adopt(found)).await,
            Err(fault) => return fault.into(),
        }
        match self.make_way().await {
            Ok(true) => Outcome::Done,
            Ok(false) => {
                fault::fault("already_running", "a machine was in the way and has ended; start again").into()
            }
            Err(fault) => fault.into(),
        }
    }

    /// There is no machine after all: nothing of the attempt stays.
    async fn give_up(&mut self, outcome: &Outcome) {
        // A machine that ran and died has said so; this attempt left only what retiring removes.
        let why = match outcome {
            Outcome::Failed(fault) => Some(fault.clone()),
            Outcome::Done | Outcome::Superseded => None,
        };
        if let Err(fault) = self.retire().await {
            tracing::warn!(reason = fault.message, "what is left of the start stays");
            self.record.run = None;
            self.let_go();
        }
        self.persist_or_warn(Durable::Agent).await;
        self.sight = Sight { fault: why, ..self.rest() };
    }
}

/// Brings together what a machine is made of.
async fn machine_for(
    host: &Host,
    vm: &Vm,
    hardware: Option<Hardware>,
    restoring: bool,
    saved_disks: Option<SavedDisks>,
    arrived: &Arc<AtomicU64>,
) -> Result<MachineSpec, Fault> {
    if host.config.check_ports {
        ports_check(vm)?;
    }
    let accelerator = accelerator_for(host, vm, hardware.as_ref().filter(|_| restoring)).await?;
    let mut disks = Vec::with_capacity(vm.spec.disks.len());
    for disk in &vm.spec.disks {
        host.check_elsewhere(disk.volume, vm.metadata.id.into())?;
        disks.push(host.volume_ready(disk.volume).await?);
    }
    let mut files = [None, None, None];
    let boot = vm.spec.kernel.as_ref();
    let wanted =
        [boot.map(|boot| &boot.kernel), boot.and_then(|boot| boot.initrd.as_ref()), vm.spec.cdrom.as_ref()];
    for (file, image) in files.iter_mut().zip(wanted) {
        if let Some(image) = image.map(image_ref) {
            host.image_ensure(&image, arrived).await?;
            *file = Some(ostler_storage::Layer { path: host.image_path(&image)?, format: image.format });
        }
    }
    let [kernel, initrd, cdrom] = files;
    let parts = Parts {
        disks,
        kernel: kernel.map(|layer| layer.path),
        initrd: initrd.map(|layer| layer.path),
        cdrom,
        uefi_vars: host.vm_dir(vm.metadata.id.into()).join("uefi-vars.fd"),
        accelerator,
        hardware,
        saved_disks,
    };
    machine_spec(vm, &parts).map_err(|error| fault::fault("machine_invalid", error.to_string()))
}

/// What the guest's instructions are run by. Saved memory is bound to what it was saved under.
async fn accelerator_for(host: &Host, vm: &Vm, bound: Option<&Hardware>) -> Result<Accelerator, Fault> {
    let probe = within("looking at the host", host.config.times.ask, host.hypervisor.probe()).await?;
    let usable = probe.accelerators.iter().filter(|probe| probe.usable);
    let offered: Vec<_> = usable.map(|probe| accelerator_back(probe.accelerator)).collect();
    let picked = match bound {
        Some(hardware) => Some(hardware.accelerator).filter(|wanted| offered.contains(wanted)),
        None => vm.spec.accelerator.pick(&offered),
    };
    picked.ok_or_else(|| {
        let wanted = bound.map_or(vm.spec.accelerator.as_str(), |hardware| hardware.accelerator.as_str());
        let reasons = probe.accelerators.iter().filter(|probe| !probe.usable);
        let reasons = reasons.map(|probe| format!("{}: {}", probe.accelerator, probe.reason));
        let reasons = reasons.chain(probe.problems.iter().cloned()).collect::<Vec<_>>().join("; ");
        let message = format!("this node cannot run the VM with accelerator {wanted} ({reasons})");
        fault::fault("accelerator_unavailable", message)
    })
}
