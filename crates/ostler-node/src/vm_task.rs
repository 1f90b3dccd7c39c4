//! The one task that owns a VM: takes the newest wish from its inbox, does one action at a time, watches the machine
//! and tells the control plane what it sees.
//!
//! ```text
//!   session ──want──► inbox ──► [ act | watch ] ──report──► outbox ──► control plane
//!                                  │       ▲
//!                                  ▼       │ events, exit, looks
//!                               hypervisor, pool
//! ```
//!
//! What always holds: an action is answered once it is done or has failed, and is not done again after that. A newer
//! task takes the place of a running one. Nothing of one VM waits for another. The machine's state is read from the
//! machine; the record only explains why there is none.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use ostler_api::vm::{EndCause, MachineState, Vm, VmObserved};
use ostler_api::vm_action::{VmAction, VmTask as Task};
use ostler_api::work::{Report, TaskAnswer, TaskOutcome, VmReport};
use ostler_api::{Fault, Time, VmId};
use ostler_qemu::{Machine, MachineEvent, Survey};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;
use tracing::Instrument;
use uuid::Uuid;

use crate::fault;
use crate::host::{Host, jitter, within};
use crate::keep::Durable;
use crate::record::{Answered, Record};
use crate::vm_handle::{Trust, VmHandle, Wanted};

/// Between two attempts at what must succeed in the end, and between looks where none are configured.
pub(crate) const RETRY: Duration = Duration::from_secs(2);
/// Pauses after a panic of the task.
const PANIC_PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How an action ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done,
    Failed(Fault),
    /// Something else is wanted now, or the agent ends.
    Superseded,
}

impl From<Fault> for Outcome {
    fn from(fault: Fault) -> Self {
        Self::Failed(fault)
    }
}

/// What is known of the machine.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sight {
    pub(crate) state: MachineState,
    pub(crate) end: Option<EndCause>,
    pub(crate) fault: Option<Fault>,
}

impl Sight {
    pub(crate) const fn of(state: MachineState) -> Self {
        Self { state, end: None, fault: None }
    }

    pub(crate) const fn absent(end: Option<EndCause>, fault: Option<Fault>) -> Self {
        Self { state: MachineState::Absent, end, fault }
    }
}

#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) machine: Arc<dyn Machine>,
    /// None once the driver has closed it.
    pub(crate) events: Option<Receiver<MachineEvent>>,
}

impl Live {
    pub(crate) async fn event(&mut self) -> Result<MachineEvent, RecvError> {
        match &mut self.events {
            None => std::future::pending().await,
            Some(events) => {
                let event = events.recv().await;
                if event == Err(RecvError::Closed) {
                    self.events = None;
                }
                event
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct VmTask {
    pub(crate) host: Arc<Host>,
    pub(crate) handle: Arc<VmHandle>,
    pub(crate) record: Box<Record>,
    /// Whether a record is kept, as it is now or as it was.
    pub(crate) recorded: bool,
    /// What is wanted, once the control plane has said so.
    pub(crate) vm: Option<Arc<Vm>>,
    pub(crate) live: Option<Live>,
    /// A process exists that could not be adopted.
    pub(crate) stray: bool,
    pub(crate) sight: Sight,
    /// What was reported last.
    told: Option<Sight>,
    pub(crate) look_at: Option<Instant>,
    pub(crate) looks: u32,
    pub(crate) repeat_at: Option<Instant>,
    pub(crate) retry_at: Option<Instant>,
}

/// Starts the task of a VM.
pub(crate) fn spawn(
    host: &Arc<Host>,
    handle: Arc<VmHandle>,
    record: Option<Box<Record>>,
    found: Option<Survey>,
) {
    let span = tracing::info_span!(parent: None, "vm", vm = %handle.id, node = %host.config.node_name);
    host.spawn(supervise(Arc::clone(host), handle, record, found).instrument(span));
}

/// Runs the task; a fault of ours in it costs this VM a pause and nobody else anything.
async fn supervise(
    host: Arc<Host>,
    handle: Arc<VmHandle>,
    mut record: Option<Box<Record>>,
    mut found: Option<Survey>,
) {
    let mut pause = PANIC_PAUSE.0;
    loop {
        let task = VmTask::new(Arc::clone(&host), Arc::clone(&handle), record);
        // Boxed: tens of thousands of these wait in one process.
        if AssertUnwindSafe(Box::pin(task.run(found))).catch_unwind().await.is_ok() {
            return;
        }
        tracing::error!("the task of this VM panicked; it begins again");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PANIC_PAUSE.1);
        record = host.config.keep.vms().await.ok().and_then(|mut all| all.remove(&handle.id)).map(Box::new);
        found = host.survey_one(handle.id.0).await.ok().flatten();
    }
}

impl VmTask {
    fn new(host: Arc<Host>, handle: Arc<VmHandle>, record: Option<Box<Record>>) -> Self {
        Self {
            host,
            handle,
            recorded: record.is_some(),
            record: record.unwrap_or_default(),
            vm: None,
            live: None,
            stray: false,
            sight: Sight::absent(None, None),
            told: None,
            look_at: None,
            looks: 0,
            repeat_at: None,
            retry_at: None,
        }
    }

    pub(crate) fn id(&self) -> VmId {
        self.handle.id
    }

    async fn run(mut self, found: Option<Survey>) {
        Box::pin(self.adopt(found)).await;
        self.handle.adopted.cancel();
        while !self.host.stopping.is_cancelled() {
            let (wanted, compare) = self.handle.take();
            match wanted {
                Wanted::Unknown => {}
                Wanted::Missing { cloud, revision, trust } => {
                    if Box::pin(self.leave(cloud, revision, trust)).await && self.close() {
                        return;
                    }
                }
                Wanted::Placed { vm, cloud } => {
                    self.belongs(&vm, cloud);
                    if let Some(task) = &vm.status.task
                        && !self.has_answered(task)
                        && !self.rests(task)
                    {
                        let task = task.clone();
                        Box::pin(self.execute(&vm, &task)).await;
                        continue;
                    }
                    self.tell(&vm, compare);
                }
            }
            self.wait().await;
        }
    }

    /// Takes note of whose VM this is. Written down with the next change that matters.
    fn belongs(&mut self, vm: &Arc<Vm>, cloud: Uuid) {
        self.record.cloud = Some(cloud);
        self.record.revision = vm.metadata.revision;
        self.record.estranged = false;
        self.handle.estrange(false);
        if self.vm.is_none() && self.sight.state == MachineState::Absent {
            // It ended while the agent was away. Was that known before, it is no news.
            let known = vm.status.observed.as_ref().filter(|seen| seen.state == MachineState::Absent);
            if let Some(known) = known.filter(|_| vm.status.task.is_none()) {
                self.sight = Sight::absent(known.end, known.fault.clone());
            }
        }
        if let Some(observed) = &vm.status.observed {
            self.record.generation = self.record.generation.max(observed.generation);
        }
        self.vm = Some(Arc::clone(vm));
    }

    /// A delete that failed is tried again, but not at once.
    fn rests(&self, task: &Task) -> bool {
        matches!(task.action, VmAction::Delete) && self.retry_at.is_some()
    }

    fn has_answered(&self, task: &Task) -> bool {
        self.record
            .answered
            .as_ref()
            .is_some_and(|last| last.operation == task.operation && last.action == task.action.name())
    }

    async fn execute(&mut self, vm: &Arc<Vm>, task: &Task) {
        let span = tracing::info_span!("task", action = task.action.name(), operation = %task.operation);
        let outcome = self.act(vm, task).instrument(span.clone()).await;
        match outcome {
            Outcome::Done => {
                span.in_scope(|| tracing::info!(state = %self.sight.state, "done"));
                self.answer(task, TaskOutcome::Done).await;
            }
            Outcome::Failed(fault) => {
                span.in_scope(|| tracing::warn!(code = fault.code, reason = fault.message, "failed"));
                self.answer(task, TaskOutcome::Failed { fault }).await;
            }
            Outcome::Superseded => span.in_scope(|| tracing::info!("something else is wanted now")),
        }
    }

    async fn act(&mut self, vm: &Arc<Vm>, task: &Task) -> Outcome {
        match &task.action {
            VmAction::Start => self.start(vm, task).await,
            VmAction::Shutdown { timeout, force } => self.shutdown(task, *timeout, *force).await,
            VmAction::Stop => self.stop().await,
            VmAction::Reset => self.reset().await,
            VmAction::Reboot { timeout } => self.reboot(vm, task, *timeout).await,
            VmAction::Pause => self.pause().await,
            VmAction::Resume => self.resume(vm, task).await,
            VmAction::Suspend => self.suspend(task).await,
            VmAction::Rebuild { volume } => self.rebuild(task, *volume).await,
            VmAction::Attach { volume } => self.attach(vm, task, *volume).await,
            VmAction::Detach { volume } => self.detach(task, *volume).await,
            VmAction::Delete => self.delete().await,
        }
    }

    /// Resolves when `task` is to be given up.
    pub(crate) async fn called_off(host: &Host, handle: &VmHandle, task: &Task) {
        tokio::select! {
            () = handle.superseded(task) => {}
            () = host.stopping.cancelled() => {}
        }
    }

    async fn answer(&mut self, task: &Task, outcome: TaskOutcome) {
        let action = task.action.name().to_owned();
        if matches!((&task.action, &outcome), (VmAction::Delete, TaskOutcome::Failed { .. })) {
            self.retry_at = Some(Instant::now() + jitter(RETRY));
            return self.report(Some(TaskAnswer { operation: task.operation, action, outcome }));
        }
        self.record.answered = Some(Answered { operation: task.operation, action, outcome });
        self.record.reboot = None;
        // A reset is the one action whose second time would be seen by the guest.
        if matches!(task.action, VmAction::Reset) {
            self.persist_or_warn(Durable::Agent).await;
        }
        self.repeat_answer();
        if !matches!(task.action, VmAction::Delete) {
            self.persist_or_warn(Durable::Host).await;
        }
    }

    /// Reports what is seen together with the last answer.
    pub(crate) fn repeat_answer(&mut self) {
        let answer = self.record.answered.clone().map(|last| TaskAnswer {
            operation: last.operation,
            action: last.action,
            outcome: last.outcome,
        });
        self.report(answer);
    }

    /// Says how far an action is.
    pub(crate) fn progress(&mut self, task: &Task, stage: &str, done: u64, total: Option<u64>) {
        self.report(Some(TaskAnswer {
            operation: task.operation,
            action: task.action.name().to_owned(),
            outcome: TaskOutcome::Progress { stage: stage.to_owned(), done, total },
        }));
    }

    /// Reports what is seen if it is news. With `compare`, news is what the control plane does not have.
    fn tell(&mut self, vm: &Vm, compare: bool) {
        let waits_for_answer = vm.status.task.is_some();
        if compare || self.told.is_none() {
            let known = vm.status.observed.as_ref();
            let same = known.map_or(MachineState::Absent, |seen| seen.state) == self.sight.state
                && known.and_then(|seen| seen.facts.as_ref()) == self.facts().as_ref()
                && known.and_then(|seen| seen.fault.as_ref()).map(|fault| &fault.code)
                    == self.sight.fault.as_ref().map(|fault| &fault.code);
            if waits_for_answer && self.record.answered.is_some() {
                self.repeat_answer();
            } else if !same {
                self.report(None);
            }
            self.told = Some(self.sight.clone());
        } else if self.told.as_ref() != Some(&self.sight) {
            self.report(None);
        }
        self.repeat_at = waits_for_answer.then(|| Instant::now() + jitter(self.host.config.times.repeat));
    }

    fn facts(&self) -> Option<ostler_api::vm::MachineFacts> {
        self.live.as_ref()?;
        self.record.run.as_ref()?.facts.clone()
    }

    fn report(&mut self, answer: Option<TaskAnswer>) {
        let now = Time::now();
        let millis = u64::try_from(now.0.as_millisecond()).unwrap_or(0);
        self.record.generation = millis.max(self.record.generation + 1);
        let observed = VmObserved {
            generation: self.record.generation,
            state: self.sight.state,
            at: now,
            end: self.sight.end,
            fault: self.sight.fault.clone(),
            facts: self.facts(),
        };
        self.told = Some(self.sight.clone());
        self.host.outbox.put(Report::Vm(Box::new(VmReport { vm: self.id(), observed, answer })));
    }

    /// Writes the record.
    pub(crate) async fn persist(&mut self, durable: Durable) -> Result<(), Fault> {
        self.recorded = true;
        let keep = &self.host.config.keep;
        let put = keep.vm_put(self.handle.id, &self.record, durable);
        let failed = |error: std::io::Error| {
            let code =
                if error.kind() == std::io::ErrorKind::StorageFull { "no_space" } else { "record_failed" };
            let path = self.host.vm_dir(self.handle.id);
            fault::fault(code, format!("the VM's record in {} cannot be written: {error}", path.display()))
        };
        within("writing the VM's record", self.host.config.times.pool, put).await?.map_err(failed)
    }

    pub(crate) async fn persist_or_warn(&mut self, durable: Durable) {
        if let Err(fault) = self.persist(durable).await {
            tracing::warn!(reason = fault.message, "going on without a record");
        }
    }

    /// It is not wanted here. True once nothing of it is left.
    async fn leave(&mut self, cloud: Uuid, revision: u64, trust: Trust) -> bool {
        if !self.recorded && self.live.is_none() && !self.stray {
            return true;
        }
        let ours = self.record.cloud == Some(cloud) && !self.record.estranged;
        let believed = match trust {
            Trust::Explicit => true,
            Trust::Listed => revision >= self.record.revision,
            Trust::OlderStore => false,
        };
        if !ours || !believed {
            if !self.handle.is_estranged() {
                let recorded = self.record.cloud.map(|cloud| cloud.to_string());
                tracing::warn!(
                    cloud = recorded, revision = self.record.revision,
                    present_cloud = %cloud, present_revision = revision,
                    "this VM belongs to another cloud or to a newer store: it is left alone",
                );
                self.handle.estrange(true);
                // Sticks: a store that was set back grows past the recorded revision one day.
                if self.record.cloud == Some(cloud) && !self.record.estranged {
                    self.record.estranged = true;
                    self.persist_or_warn(Durable::Host).await;
                }
            }
            return false;
        }
        tracing::info!("no longer placed here: ending it");
        match self.remove().await {
            Ok(()) => true,
            Err(fault) => {
                tracing::warn!(reason = fault.message, "cannot be ended yet; tried again");
                self.retry_at = Some(Instant::now() + jitter(RETRY));
                false
            }
        }
    }

    /// Leaves the registry, unless it is wanted again.
    fn close(&mut self) -> bool {
        let mut vms = self.host.vms.lock();
        if matches!(self.handle.wanted(), Wanted::Missing { .. }) {
            vms.remove(&self.handle.id);
            return true;
        }
        drop(vms);
        let generation = self.record.generation;
        *self.record = Record { generation, ..Record::default() };
        self.vm = None;
        self.told = None;
        self.sight = Sight::absent(None, None);
        false
    }
}
