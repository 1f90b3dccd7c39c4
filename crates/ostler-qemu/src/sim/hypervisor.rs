//! One agent's view of a simulated host.

use std::sync::Arc;

use async_trait::async_trait;
use uuid::Uuid;

use super::disks::SimDisks;
use super::faults::SimOperation;
use super::host::{Inner, SimHost, SimMachineState};
use super::machine::{SimMachine, let_run, state_file_content};
use crate::args::validate;
use crate::error::{Error, Result, StartError};
use crate::host::{AcceleratorProbe, HostProbe};
use crate::machine::{ExitReason, Hypervisor, Machine, RunState, Survey};
use crate::spec::{Accelerator, MachineSpec, MachineType, StartOptions};

#[derive(Debug, Clone)]
pub struct SimHypervisor {
    host: SimHost,
}

impl SimHypervisor {
    pub fn new(host: SimHost) -> Self {
        Self { host }
    }

    fn machine(&self, id: Uuid, pid: u32) -> Arc<SimMachine> {
        Arc::new(SimMachine { host: Arc::clone(&self.host.inner), id, pid })
    }
}

pub(super) fn newest_version(machine: MachineType) -> &'static str {
    match machine {
        MachineType::Q35 => "pc-q35-7.2",
        MachineType::I440fx => "pc-i440fx-7.2",
        MachineType::Microvm => "microvm",
    }
}

fn prepare(host: &Inner, spec: &MachineSpec, pid: u32) -> SimMachineState {
    let mut machine = SimMachineState::new(pid, spec.machine, spec.accelerator);
    machine.vnc = spec.vnc;
    machine.disks = SimDisks::of(host, spec);
    machine.memory_bytes = spec.memory_bytes;
    machine.balloon_bytes = spec.memory_bytes;
    let version = spec.machine_version.as_deref().filter(|version| *version != newest_version(spec.machine));
    machine.machine_version = version.map(Box::from);
    machine.cpu_model = spec.cpu_model.as_deref().filter(|model| *model != "simulated").map(Box::from);
    machine
}

#[async_trait]
impl Hypervisor for SimHypervisor {
    async fn probe(&self) -> HostProbe {
        let host = &self.host.inner;
        let failed = host.faults.meet(SimOperation::Probe, None).await.err();
        let capacity = &host.capacity;
        let accelerator =
            |accelerator, usable| AcceleratorProbe { accelerator, usable, reason: "simulated".into() };
        HostProbe {
            qemu_version: failed.is_none().then(|| "7.2.0-simulated".into()),
            qemu_binary: None,
            machine_types: [MachineType::Q35, MachineType::I440fx, MachineType::Microvm]
                .map(|machine| newest_version(machine).to_owned())
                .to_vec(),
            accelerators: vec![
                accelerator(Accelerator::Kvm, capacity.kvm),
                accelerator(Accelerator::Tcg, true),
            ],
            cpu_model: "simulated".into(),
            cpu_flags: Vec::new(),
            cpus: capacity.cpus,
            memory_bytes: capacity.memory_bytes,
            problems: capacity.problems.iter().cloned().chain(failed).collect(),
        }
    }

    async fn start(&self, spec: MachineSpec, opts: StartOptions) -> Result<Arc<dyn Machine>, StartError> {
        validate(&spec)?;
        let host = &self.host.inner;
        host.faults.meet(SimOperation::Start, Some(spec.id)).await.map_err(StartError::Simulated)?;
        if let Some(state) = &opts.restore_from {
            let content = std::fs::read_to_string(state).map_err(|source| StartError::File {
                what: "the saved state".into(),
                path: state.clone(),
                source,
            })?;
            if content != state_file_content(spec.id) {
                return Err(StartError::BadState {
                    last_words: "simulated: load of migration failed".into(),
                });
            }
        }
        let pid = host.fresh_pid();
        host.with_machines(|machines| {
            if let Some(living) = machines.get(&spec.id).filter(|machine| machine.exit.is_none()) {
                return Err(StartError::AlreadyRunning { id: spec.id, pid: living.pid });
            }
            let mut machine = prepare(host, &spec, pid);
            if opts.paused {
                machine.run =
                    if opts.restore_from.is_some() { RunState::Paused } else { RunState::Prelaunch };
            } else {
                let_run(host, spec.id, &mut machine);
            }
            machines.insert(spec.id, machine);
            Ok(())
        })?;
        Ok(self.machine(spec.id, pid))
    }

    async fn survey(&self) -> Result<Vec<Survey>> {
        let host = &self.host.inner;
        host.faults.meet(SimOperation::Survey, None).await.map_err(Error::Simulated)?;
        let mut found: Vec<Survey> = host.with_machines(|machines| {
            let tell = |(id, machine): (&Uuid, &SimMachineState)| match machine.exit {
                Some(_) => Survey::Dead { id: *id, last_words: machine.last_words() },
                None if machine.half_started => Survey::HalfStarted { id: *id, pid: machine.pid },
                None => Survey::Running(self.machine(*id, machine.pid)),
            };
            machines.iter().map(tell).collect()
        });
        found.sort_by_key(Survey::id);
        Ok(found)
    }

    async fn forget(&self, id: Uuid) -> Result<()> {
        let host = &self.host.inner;
        host.faults.meet(SimOperation::Forget, Some(id)).await.map_err(Error::Simulated)?;
        host.with_machines(|machines| match machines.get(&id) {
            Some(machine) if machine.exit.is_none() => Err(Error::StillRunning { id, pid: machine.pid }),
            Some(_) | None => {
                machines.remove(&id);
                Ok(())
            }
        })
    }

    async fn kill(&self, id: Uuid) -> Result<()> {
        let host = &self.host.inner;
        host.faults.meet(SimOperation::Kill, Some(id)).await.map_err(Error::Simulated)?;
        host.with_machines(|machines| {
            if let Some(machine) = machines.get_mut(&id) {
                machine.end(ExitReason::Signal(libc::SIGKILL));
            }
        });
        Ok(())
    }
}
