//! A simulated host: what its machines are, whatever becomes of the agent.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};
use uuid::Uuid;

use super::disks::SimDisks;
use super::faults::{Faults, SimOperation};
use super::guest::SimGuest;
use crate::disk::DiskIo;
use crate::error::{Error, QmpError, Result};
use crate::machine::{ExitReason, ExitReport, MachineEvent, RunState};
use crate::spec::{Accelerator, MachineType};

/// An agent that watches all machines subscribes to each, so few are kept; who lags looks at the state.
const EVENTS_KEPT: usize = 4;

/// What the host pretends to have.
#[derive(Debug, Clone)]
pub struct SimCapacity {
    pub cpus: u32,
    pub memory_bytes: u64,
    /// Whether KVM works.
    pub kvm: bool,
    pub problems: Vec<String>,
}

impl Default for SimCapacity {
    fn default() -> Self {
        Self { cpus: 64, memory_bytes: 512 << 30, kvm: true, problems: Vec::new() }
    }
}

/// Cloning gives another handle to the same host.
#[derive(Debug, Clone)]
pub struct SimHost {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) capacity: SimCapacity,
    pub(super) run_dir: PathBuf,
    pub(super) faults: Faults,
    machines: Mutex<HashMap<Uuid, SimMachineState>>,
    guests: Mutex<(SimGuest, HashMap<Uuid, SimGuest>)>,
    next_pid: AtomicU32,
    /// How large the disks are that are in these files.
    sizes: Mutex<HashMap<PathBuf, u64>>,
}

/// All there is of one machine.
#[derive(Debug)]
pub(super) struct SimMachineState {
    pub(super) run: RunState,
    /// Distinguishes this process from earlier ones of the same machine.
    pub(super) pid: u32,
    /// Counts starts of the virtual CPUs, so that a timer of an earlier one knows that it is late.
    pub(super) boots: u32,
    pub(super) machine: MachineType,
    pub(super) accelerator: Accelerator,
    pub(super) vnc: bool,
    pub(super) half_started: bool,
    pub(super) exit: Option<ExitReason>,
    pub(super) started_at: SystemTime,
    pub(super) memory_bytes: u64,
    pub(super) balloon_bytes: u64,
    /// The disk that the guest waits for.
    pub(super) io_error: Option<Box<(String, DiskIo)>>,
    /// None for the type's newest.
    pub(super) machine_version: Option<Box<str>>,
    pub(super) cpu_model: Option<Box<str>>,
    pub(super) disks: SimDisks,
    /// Only of machines that somebody watches.
    watchers: Option<Box<Watchers>>,
}

#[derive(Debug)]
struct Watchers {
    events: broadcast::Sender<MachineEvent>,
    exit: watch::Sender<Option<ExitReason>>,
}

impl SimMachineState {
    pub(super) fn new(pid: u32, machine: MachineType, accelerator: Accelerator) -> Self {
        Self {
            run: RunState::Prelaunch,
            pid,
            boots: 0,
            machine,
            accelerator,
            vnc: false,
            half_started: false,
            exit: None,
            started_at: SystemTime::now(),
            memory_bytes: 0,
            balloon_bytes: 0,
            io_error: None,
            machine_version: None,
            cpu_model: None,
            disks: SimDisks::default(),
            watchers: None,
        }
    }

    fn watchers(&mut self) -> &Watchers {
        let exit = self.exit;
        self.watchers.get_or_insert_with(|| {
            Box::new(Watchers { events: broadcast::channel(EVENTS_KEPT).0, exit: watch::channel(exit).0 })
        })
    }

    pub(super) fn subscribe(&mut self) -> broadcast::Receiver<MachineEvent> {
        self.watchers().events.subscribe()
    }

    pub(super) fn exit_watch(&mut self) -> watch::Receiver<Option<ExitReason>> {
        self.watchers().exit.subscribe()
    }

    pub(super) fn tell(&self, event: MachineEvent) {
        if let Some(watchers) = &self.watchers {
            // Nobody may be listening any more.
            let _ = watchers.events.send(event);
        }
    }

    pub(super) fn end(&mut self, reason: ExitReason) {
        if self.exit.is_none() {
            self.exit = Some(reason);
            self.tell(MachineEvent::Exited);
            if let Some(watchers) = self.watchers.take() {
                watchers.exit.send_replace(Some(reason));
            }
        }
    }

    pub(super) fn last_words(&self) -> String {
        match self.exit {
            Some(ExitReason::Signal(signal)) => format!("simulated: killed by signal {signal}"),
            Some(_) | None => "simulated: QEMU said nothing".into(),
        }
    }
}

impl Default for SimHost {
    fn default() -> Self {
        Self::new(SimCapacity::default())
    }
}

impl SimHost {
    pub fn new(capacity: SimCapacity) -> Self {
        let run_dir = PathBuf::from("/run/ostler-simulated");
        Self { inner: Arc::new(Inner { capacity, run_dir, ..Inner::default() }) }
    }

    /// Every operation of this kind takes this long.
    pub fn set_delay(&self, operation: SimOperation, delay: Duration) {
        self.inner.faults.set_delay(operation, delay);
    }

    /// The next `times` operations of this kind fail; with an id only those on that machine.
    pub fn fail(&self, operation: SimOperation, id: Option<Uuid>, times: u32, message: impl Into<String>) {
        self.inner.faults.fail(operation, id, times, message.into());
    }

    /// Operations of this kind never end, as with a QEMU that hangs. Those that hang already stay so.
    pub fn set_hanging(&self, operation: SimOperation, id: Option<Uuid>, hanging: bool) {
        self.inner.faults.set_hanging(operation, id, hanging);
    }

    pub fn clear_faults(&self) {
        self.inner.faults.clear();
    }

    /// How guests behave that have no habits of their own.
    pub fn set_default_guest(&self, guest: SimGuest) {
        self.inner.guests.lock().0 = guest;
    }

    /// How one machine's guest behaves, from its next start or power button on.
    pub fn set_guest(&self, id: Uuid, guest: SimGuest) {
        self.inner.guests.lock().1.insert(id, guest);
    }

    /// The guest powers itself off.
    pub fn guest_power_off(&self, id: Uuid) {
        self.inner.alive(id, |machine| power_off(machine, true));
    }

    pub fn guest_panic(&self, id: Uuid) {
        self.inner.alive(id, |machine| {
            machine.run = RunState::Panicked;
            machine.tell(MachineEvent::Panicked);
        });
    }

    pub fn guest_reset(&self, id: Uuid) {
        self.inner.alive(id, |machine| machine.tell(MachineEvent::Reset { guest: true }));
    }

    /// A disk fails and stops the guest.
    pub fn io_error(&self, id: Uuid, disk: &str, nospace: bool) {
        self.inner.alive(id, |machine| {
            machine.run = RunState::IoError;
            let io = if nospace { DiskIo::NoSpace } else { DiskIo::Failed };
            machine.io_error = Some(Box::new((disk.to_owned(), io)));
            let reason = if nospace { "No space left on device" } else { "Input/output error" }.to_owned();
            machine.tell(MachineEvent::IoError { disk: disk.to_owned(), reason, nospace });
            machine.tell(MachineEvent::Paused);
        });
    }

    /// How large the disk in this file is when it is attached next. Files that nobody spoke of have 1 GiB, and new layers
    /// the size of their disk.
    pub fn set_file_size(&self, path: impl Into<PathBuf>, bytes: u64) {
        self.inner.sizes.lock().insert(path.into(), bytes);
    }

    /// The machine's QEMU ends by this signal, without the agent having a hand in it.
    pub fn crash(&self, id: Uuid, signal: i32) {
        self.inner.alive(id, |machine| machine.end(ExitReason::Signal(signal)));
    }

    /// The host loses power: every machine ends, and nothing tells how.
    pub fn power_cut(&self) {
        for machine in self.inner.machines.lock().values_mut() {
            machine.end(ExitReason::Unknown);
        }
    }

    /// Leaves behind what an agent leaves that is killed in the middle of a start.
    pub fn leave_half_started(&self, id: Uuid) {
        let mut machine = SimMachineState::new(self.inner.fresh_pid(), MachineType::Q35, Accelerator::Tcg);
        machine.half_started = true;
        self.inner.machines.lock().insert(id, machine);
    }

    /// How many machines have a process.
    pub fn living(&self) -> usize {
        self.inner.machines.lock().values().filter(|machine| machine.exit.is_none()).count()
    }

    /// How many machines have left anything at all.
    pub fn known(&self) -> usize {
        self.inner.machines.lock().len()
    }
}

pub(super) fn power_off(machine: &mut SimMachineState, by_guest: bool) {
    machine.run = RunState::Shutdown;
    machine.boots += 1;
    machine.tell(MachineEvent::Shutdown { guest: by_guest });
    machine.tell(MachineEvent::Paused);
}

impl Inner {
    pub(super) fn file_size(&self, path: &Path) -> Option<u64> {
        self.sizes.lock().get(path).copied()
    }

    pub(super) fn fresh_pid(&self) -> u32 {
        self.next_pid.fetch_add(1, Ordering::Relaxed) + 1_000_000
    }

    pub(super) fn guest(&self, id: Uuid) -> SimGuest {
        let guests = self.guests.lock();
        guests.1.get(&id).copied().unwrap_or(guests.0)
    }

    pub(super) fn with_machines<T>(&self, work: impl FnOnce(&mut HashMap<Uuid, SimMachineState>) -> T) -> T {
        work(&mut self.machines.lock())
    }

    /// Does something to a machine that lives; nothing otherwise.
    fn alive(&self, id: Uuid, work: impl FnOnce(&mut SimMachineState)) {
        if let Some(machine) = self.machines.lock().get_mut(&id).filter(|machine| machine.exit.is_none()) {
            work(machine);
        }
    }

    /// One process of a machine, alive or not.
    pub(super) fn process<T>(
        &self,
        id: Uuid,
        pid: u32,
        work: impl FnOnce(&mut SimMachineState) -> T,
    ) -> Option<T> {
        self.machines.lock().get_mut(&id).filter(|machine| machine.pid == pid).map(work)
    }

    /// Like QEMU's monitor: no answer from one that has ended.
    pub(super) fn monitor<T>(
        &self,
        id: Uuid,
        pid: u32,
        work: impl FnOnce(&mut SimMachineState) -> Result<T, QmpError>,
    ) -> Result<T> {
        let done = self.process(id, pid, |machine| machine.exit.is_none().then(|| work(machine)));
        done.flatten().ok_or(Error::Ended { id })?.map_err(Error::Qmp)
    }

    pub(super) fn exit_report(&self, id: Uuid, pid: u32, reason: ExitReason) -> ExitReport {
        let last_words = self.process(id, pid, |machine| machine.last_words()).unwrap_or_default();
        ExitReport { reason, last_words }
    }
}
