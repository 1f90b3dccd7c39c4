//! A control plane in memory: keeps VMs and volumes, hands out work, takes reports. Follows the server's rules as far as
//! an agent can tell.

// The path, since another test takes this file in by path too.
#[path = "plane/snapshots.rs"]
mod snapshots;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use ostler_api::image::{ImageFormat, ImageUse};
use ostler_api::metadata::Metadata;
use ostler_api::node::NodeRegister;
use ostler_api::snapshot::Snapshot;
use ostler_api::vm::*;
use ostler_api::vm_action::{VmAction, VmTask};
use ostler_api::vm_phase::{VmPhase, vm_phase};
use ostler_api::volume::{SnapshotUse, Volume, VolumePhase, VolumeSpec, VolumeStatus};
use ostler_api::work::*;
use ostler_api::{
    AcceleratorWish, ByteSize, Fault, ImageId, Name, OperationId, SnapshotId, StreamId, Time, VmId, VolumeId,
};
use ostler_node::{ControlPlane, PlaneError, Wire, WorkStream};
use parking_lot::Mutex;
use tokio::io::AsyncRead;
use tokio::sync::{Notify, mpsc};
use uuid::Uuid;

/// How long a test waits for anything, in the runtime's time.
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) type Answer = (OperationId, String, TaskOutcome);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) cloud: Uuid,
    pub(crate) revision: u64,
    pub(crate) vms: BTreeMap<VmId, Vm>,
    pub(crate) volumes: BTreeMap<VolumeId, Volume>,
    pub(crate) snapshots: BTreeMap<SnapshotId, Snapshot>,
    /// How reverts ended; none when well.
    pub(crate) reverts: BTreeMap<OperationId, Option<Fault>>,
    /// How often a volume could not be grown.
    pub(crate) not_grown: usize,
    /// How often a snapshot was not taken.
    pub(crate) not_taken: usize,
    pub(crate) answers: Vec<Answer>,
    pub(crate) registers: Vec<NodeRegister>,
    pub(crate) heartbeats: usize,
    pub(crate) images_sent: usize,
    /// What every image that is asked for has in it.
    pub(crate) image_bytes: Option<&'static [u8]>,
    /// Requests with reports that came.
    pub(crate) requests: usize,
    /// The next requests with reports never arrive.
    pub(crate) reports_lost: u32,
    /// The next requests with reports are taken, but the agent does not learn it.
    pub(crate) replies_lost: u32,
    /// Nothing works.
    pub(crate) down: bool,
    work: Vec<mpsc::UnboundedSender<WorkLine>>,
    streams: HashMap<StreamId, Wire>,
}

#[derive(Debug)]
pub(crate) struct Plane {
    inner: Mutex<Inner>,
    changed: Notify,
}

/// A user's side of a stream.
pub(crate) struct Ends {
    pub(crate) tx: mpsc::UnboundedSender<Bytes>,
    pub(crate) rx: mpsc::UnboundedReceiver<Bytes>,
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

pub(crate) fn image() -> ImageUse {
    ImageUse {
        image: ImageId::new(),
        sha256: "7".repeat(64),
        format: ImageFormat::Qcow2,
        virtual_size: ByteSize::mib(64),
    }
}

impl Plane {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                cloud: Uuid::now_v7(),
                revision: 100,
                vms: BTreeMap::new(),
                volumes: BTreeMap::new(),
                snapshots: BTreeMap::new(),
                reverts: BTreeMap::new(),
                not_grown: 0,
                not_taken: 0,
                answers: Vec::new(),
                registers: Vec::new(),
                heartbeats: 0,
                images_sent: 0,
                image_bytes: None,
                requests: 0,
                reports_lost: 0,
                replies_lost: 0,
                down: false,
                work: Vec::new(),
                streams: HashMap::new(),
            }),
            changed: Notify::new(),
        })
    }

    pub(crate) fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        let done = work(&mut self.inner.lock());
        self.changed.notify_waiters();
        done
    }

    /// Waits until `look` finds what it looks for.
    pub(crate) async fn wait<T>(&self, what: &str, mut look: impl FnMut(&Inner) -> Option<T>) -> T {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if let Some(found) = look(&self.inner.lock()) {
                    return found;
                }
                changed.await;
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(found) => found,
            Err(_) => panic!("waited in vain for {what}: {:#?}", self.inner.lock()),
        }
    }

    /// A stopped VM with one volume to be made.
    pub(crate) fn vm_create(&self) -> VmId {
        let (vm, volume) = (VmId::new(), self.volume_create(None));
        self.with(|inner| {
            let mut metadata = Metadata::new(vm.0, name("web"), Some(name("default")));
            metadata.revision = inner.bump();
            let status = VmStatus {
                phase: VmPhase::Stopped,
                reason: None,
                node: Some(name("n1")),
                task: None,
                observed: None,
                node_silent: false,
            };
            inner.vms.insert(vm, Vm { metadata, spec: vm_spec(volume), status });
            inner.send_vm(vm);
        });
        vm
    }

    pub(crate) fn volume_create(&self, image: Option<ImageUse>) -> VolumeId {
        self.volume_from(image, None)
    }

    /// A linked copy of what a snapshot holds of its only disk.
    pub(crate) fn volume_clone(&self, snapshot: SnapshotId) -> VolumeId {
        let part = self.with(|inner| inner.snapshots[&snapshot].spec.disks[0].part);
        self.volume_from(None, Some(SnapshotUse { snapshot, part }))
    }

    fn volume_from(&self, image: Option<ImageUse>, snapshot: Option<SnapshotUse>) -> VolumeId {
        self.with(|inner| {
            let id = VolumeId::new();
            let mut metadata = Metadata::new(id.0, name("web-root"), Some(name("default")));
            metadata.revision = inner.bump();
            let spec = VolumeSpec { image, snapshot, ..VolumeSpec::blank(ByteSize::mib(64)) };
            let status = VolumeStatus {
                phase: VolumePhase::Creating,
                node: Some(name("n1")),
                ..VolumeStatus::pending()
            };
            inner.volumes.insert(id, Volume { metadata, spec, status });
            inner.send_volume(id);
            id
        })
    }

    pub(crate) fn volume_change(&self, id: VolumeId, change: impl FnOnce(&mut Volume)) {
        self.with(|inner| {
            change(inner.volumes.get_mut(&id).unwrap());
            inner.send_volume(id);
        });
    }

    pub(crate) fn vm_change(&self, id: VmId, change: impl FnOnce(&mut Vm)) {
        self.with(|inner| {
            change(inner.vms.get_mut(&id).unwrap());
            inner.send_vm(id);
        });
    }

    /// Puts a further disk into a VM's list; the agent is told with the next change of the VM.
    pub(crate) fn disk_add(&self, vm: VmId, volume: VolumeId) {
        self.with(|inner| {
            let disk = VmDisk { volume, bus: DiskBus::Virtio, owned: false };
            inner.vms.get_mut(&vm).unwrap().spec.disks.push(disk);
        });
    }

    /// Adds a disk to a VM and has it plugged in.
    pub(crate) fn attach(&self, vm: VmId, volume: VolumeId) -> OperationId {
        self.disk_add(vm, volume);
        self.act(vm, VmAction::Attach { volume })
    }

    /// Gives a VM a task; the one it had is superseded.
    pub(crate) fn act(&self, vm: VmId, action: VmAction) -> OperationId {
        let operation = OperationId::new();
        self.vm_change(vm, |vm| {
            vm.status.task =
                Some(VmTask { operation, action, requested: Time::now(), deadline: Time::now() });
        });
        operation
    }

    /// The final answer to an operation, and that it is not worked on any more.
    pub(crate) async fn outcome(&self, operation: OperationId) -> TaskOutcome {
        self.wait(&format!("the answer to {operation}"), |inner| {
            let busy = inner
                .vms
                .values()
                .any(|vm| vm.status.task.as_ref().is_some_and(|t| t.operation == operation));
            let last = inner.answers.iter().rev().find(|(answered, _, outcome)| {
                *answered == operation && !matches!(outcome, TaskOutcome::Progress { .. })
            })?;
            (!busy).then(|| last.2.clone())
        })
        .await
    }

    /// Has something done, which must work.
    pub(crate) async fn done(&self, vm: VmId, action: VmAction) {
        let operation = self.act(vm, action);
        let outcome = self.outcome(operation).await;
        assert_eq!(outcome, TaskOutcome::Done, "{:#?}", self.inner.lock());
    }

    pub(crate) async fn failed(&self, vm: VmId, action: VmAction) -> Fault {
        let operation = self.act(vm, action);
        match self.outcome(operation).await {
            TaskOutcome::Failed { fault } => fault,
            other => panic!("a failure was expected: {other:?}"),
        }
    }

    pub(crate) async fn state(&self, vm: VmId, state: MachineState) -> VmObserved {
        self.wait(&format!("state {state}"), |inner| {
            let seen = inner.vms.get(&vm)?.status.observed.clone()?;
            (seen.state == state).then_some(seen)
        })
        .await
    }

    pub(crate) fn observed(&self, vm: VmId) -> Option<VmObserved> {
        self.inner.lock().vms.get(&vm)?.status.observed.clone()
    }

    pub(crate) async fn volume_phase(&self, volume: VolumeId, phase: VolumePhase) -> Volume {
        self.wait(&format!("phase {phase}"), |inner| {
            inner.volumes.get(&volume).filter(|volume| volume.status.phase == phase).cloned()
        })
        .await
    }

    /// Cuts every work stream.
    pub(crate) fn cut(&self) {
        self.with(|inner| inner.work.clear());
    }

    /// Takes a VM and its line away, as a store that never had it.
    pub(crate) fn vm_lose(&self, vm: VmId) {
        self.with(|inner| inner.vms.remove(&vm));
    }

    pub(crate) async fn connected(&self) {
        self.wait("a work stream", |inner| inner.work.iter().any(|work| !work.is_closed()).then_some(()))
            .await;
    }

    pub(crate) fn open(&self, vm: VmId, what: StreamKind) -> Ends {
        let (tx, from_user) = mpsc::unbounded_channel::<Bytes>();
        let (to_user, rx) = mpsc::unbounded_channel::<Bytes>();
        let sink = futures::sink::unfold(to_user, |to_user, bytes: Bytes| async move {
            to_user.send(bytes).map_err(|_| std::io::Error::from(std::io::ErrorKind::BrokenPipe))?;
            Ok::<_, std::io::Error>(to_user)
        });
        let stream = futures::stream::unfold(from_user, |mut from_user| async move {
            from_user.recv().await.map(|bytes| (Ok(bytes), from_user))
        });
        let wire = Wire { tx: Box::pin(sink), rx: Box::pin(stream) };
        let id = StreamId::new();
        self.with(|inner| {
            inner.streams.insert(id, wire);
            inner.tell(WorkLine::Stream { stream: StreamRequest { id, vm, what } });
        });
        Ends { tx, rx }
    }

    fn is_up(&self) -> Result<(), PlaneError> {
        if self.inner.lock().down { Err(PlaneError::Unreachable("down".into())) } else { Ok(()) }
    }
}

pub(crate) fn vm_spec(volume: VolumeId) -> VmSpec {
    VmSpec {
        cpus: 1,
        memory: ByteSize::mib(64),
        machine: MachineType::Q35,
        firmware: Firmware::Bios,
        accelerator: AcceleratorWish::Auto,
        kernel: None,
        disks: vec![VmDisk { volume, bus: DiskBus::Virtio, owned: true }],
        cdrom: None,
        nics: vec![VmNic { mac: "52:54:00:00:00:01".into(), model: NicModel::Virtio, publish: Vec::new() }],
        node_selector: BTreeMap::new(),
        node: None,
        power: Power::Stopped,
    }
}

impl Inner {
    fn bump(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    pub(crate) fn tell(&mut self, line: WorkLine) {
        self.work.retain(|work| work.send(line.clone()).is_ok());
    }

    fn send_vm(&mut self, id: VmId) {
        let revision = self.bump();
        let vm = self.vms.get_mut(&id).unwrap();
        vm.metadata.revision = revision;
        vm.status.phase = vm_phase(&vm.status);
        let line = WorkLine::Vm { vm: Box::new(vm.clone()) };
        self.tell(line);
    }

    fn send_volume(&mut self, id: VolumeId) {
        let revision = self.bump();
        let volume = self.volumes.get_mut(&id).unwrap();
        volume.metadata.revision = revision;
        let line = WorkLine::Volume { volume: Box::new(volume.clone()) };
        self.tell(line);
    }

    fn send_snapshot(&mut self, id: SnapshotId) {
        let revision = self.bump();
        let snapshot = self.snapshots.get_mut(&id).unwrap();
        snapshot.metadata.revision = revision;
        let line = WorkLine::Snapshot { snapshot: Box::new(snapshot.clone()) };
        self.tell(line);
    }

    fn volume_drop(&mut self, id: VolumeId) {
        if let Some(volume) = self.volumes.get_mut(&id) {
            volume.metadata.deleted = Some(Time::now());
            volume.status.phase = VolumePhase::Deleting;
            self.send_volume(id);
        }
    }

    fn take(&mut self, report: Report) -> bool {
        match report {
            Report::Vm(report) => self.take_vm(*report),
            Report::Volume(report) => self.take_volume(report),
            Report::Snapshot(report) => self.take_snapshot(report),
        }
    }

    fn take_vm(&mut self, report: VmReport) -> bool {
        let Some(vm) = self.vms.get_mut(&report.vm) else { return false };
        if vm.status.observed.as_ref().is_some_and(|seen| seen.generation > report.observed.generation) {
            return true;
        }
        vm.status.observed = Some(report.observed);
        if let Some(answer) = report.answer
            && let Some(task) = vm.status.task.clone()
            && (task.operation, task.action.name()) == (answer.operation, answer.action.as_str())
        {
            self.answers.push((answer.operation, answer.action, answer.outcome.clone()));
            match (&task.action, &answer.outcome) {
                (_, TaskOutcome::Progress { .. }) | (VmAction::Delete, TaskOutcome::Failed { .. }) => {}
                (VmAction::Delete, TaskOutcome::Done) => {
                    let vm = self.vms.remove(&report.vm).unwrap();
                    vm.spec.disks.iter().for_each(|disk| self.volume_drop(disk.volume));
                    self.tell(WorkLine::VmGone { vm: report.vm });
                    return true;
                }
                (VmAction::Rebuild { volume }, TaskOutcome::Done) => {
                    let old = std::mem::replace(&mut vm.spec.disks[0].volume, *volume);
                    vm.status.task = Some(VmTask { action: VmAction::Start, ..task });
                    self.volume_drop(old);
                }
                (VmAction::Attach { volume }, TaskOutcome::Failed { .. })
                | (VmAction::Detach { volume }, TaskOutcome::Done) => {
                    vm.spec.disks.retain(|disk| disk.volume != *volume);
                    vm.status.task = None;
                }
                (_, TaskOutcome::Done | TaskOutcome::Failed { .. }) => vm.status.task = None,
            }
        }
        self.send_vm(report.vm);
        true
    }

    fn take_volume(&mut self, report: VolumeReport) -> bool {
        let Some(volume) = self.volumes.get_mut(&report.volume) else { return false };
        let deleted = volume.metadata.deleted.is_some();
        match report.state {
            VolumeState::Gone if deleted => {
                self.volumes.remove(&report.volume);
                self.tell(WorkLine::VolumeGone { volume: report.volume });
                return true;
            }
            VolumeState::Gone => return true,
            VolumeState::Ready { .. } if deleted => return true,
            VolumeState::Ready { used, size } => {
                volume.status.used = Some(used);
                volume.status.size = Some(size);
                volume.status.phase = VolumePhase::Ready;
                volume.status.reason = None;
            }
            VolumeState::Flattening { .. } => {}
            VolumeState::Flattened { operation, .. } | VolumeState::NotFlattened { operation, .. } => {
                volume.status.flatten.take_if(|wanted| *wanted == operation);
            }
            VolumeState::NotGrown { size, .. } => {
                self.not_grown += 1;
                volume.status.size = Some(size);
                volume.spec.size = size;
            }
            VolumeState::Failed { fault } => {
                volume.status.reason = Some(fault);
                if !deleted {
                    volume.status.phase = VolumePhase::Error;
                }
            }
        }
        self.send_volume(report.volume);
        true
    }
}

#[async_trait]
impl ControlPlane for Plane {
    async fn register(&self, _node: &Name, register: NodeRegister) -> Result<(), PlaneError> {
        self.is_up()?;
        self.with(|inner| inner.registers.push(register));
        Ok(())
    }

    async fn heartbeat(&self, _node: &Name) -> Result<Heartbeat, PlaneError> {
        self.is_up()?;
        self.with(|inner| inner.heartbeats += 1);
        Ok(Heartbeat { lease_secs: 30 })
    }

    async fn work(&self, _node: &Name) -> Result<WorkStream, PlaneError> {
        self.is_up()?;
        let (tx, rx) = mpsc::unbounded_channel();
        self.with(|inner| {
            let revision = inner.revision;
            let hello = WorkLine::Hello { cloud: inner.cloud, revision };
            let volumes = inner.volumes.values().cloned().map(|v| WorkLine::Volume { volume: Box::new(v) });
            let snapshots = inner.snapshots.values().cloned();
            let snapshots = snapshots.map(|one| WorkLine::Snapshot { snapshot: Box::new(one) });
            let vms = inner.vms.values().cloned().map(|vm| WorkLine::Vm { vm: Box::new(vm) });
            let synced = WorkLine::Synced { revision };
            for line in std::iter::once(hello).chain(volumes).chain(snapshots).chain(vms).chain([synced]) {
                tx.send(line).unwrap();
            }
            inner.work.push(tx.clone());
        });
        let weak = tx.downgrade();
        drop(tx);
        let revision = self.with(|inner| inner.revision);
        // A bookmark every 5 s, as the server sends it.
        let lines = futures::stream::unfold((rx, weak), move |(mut rx, weak)| async move {
            match tokio::time::timeout(Duration::from_secs(5), rx.recv()).await {
                Ok(line) => line.map(|line| (Ok(line), (rx, weak))),
                Err(_) => Some((Ok(WorkLine::Bookmark { revision }), (rx, weak))),
            }
        });
        Ok(lines.boxed())
    }

    async fn report(&self, _node: &Name, reports: Reports) -> Result<ReportsTaken, PlaneError> {
        self.is_up()?;
        self.with(|inner| {
            inner.requests += 1;
            if inner.reports_lost > 0 {
                inner.reports_lost -= 1;
                return Err(PlaneError::Unreachable("lost on its way".into()));
            }
            let mut taken = ReportsTaken { taken: 0, dropped: 0 };
            for report in reports.reports {
                if inner.take(report) { taken.taken += 1 } else { taken.dropped += 1 }
            }
            if inner.replies_lost > 0 {
                inner.replies_lost -= 1;
                return Err(PlaneError::Unreachable("the reply was lost".into()));
            }
            Ok(taken)
        })
    }

    async fn image(
        &self,
        _node: &Name,
        _sha256: &str,
    ) -> Result<Box<dyn AsyncRead + Send + Unpin>, PlaneError> {
        self.is_up()?;
        let bytes = self.with(|inner| {
            inner.images_sent += 1;
            inner.image_bytes
        });
        let bytes =
            bytes.ok_or_else(|| PlaneError::Unreachable("this control plane has no images".into()))?;
        Ok(Box::new(bytes))
    }

    async fn stream(&self, _node: &Name, stream: StreamId) -> Result<Wire, PlaneError> {
        let wire = self.with(|inner| inner.streams.remove(&stream));
        wire.ok_or_else(|| PlaneError::Refused("no such stream".into()))
    }
}
