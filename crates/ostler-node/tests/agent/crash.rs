//! Drivers and control plane that count the agent's calls and, at a chosen one, are its last: from then on nothing
//! answers, and the test kills the agent. Before the call it had no effect, after it it had.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ostler_api::node::NodeRegister;
use ostler_api::work::{Heartbeat, Reports, ReportsTaken};
use ostler_api::{Name, StreamId};
use ostler_node::{ControlPlane, PlaneError, Wire, WorkStream};
use ostler_qemu::*;
use ostler_storage::{
    Audit, CheckReport, ImageRef, ImageSource, Layer, Merge, NewVolume, Pool, PoolKind, PoolUsage, SimPool,
    SnapshotInfo, SnapshotPlan, StorageError, VolumeInfo, Work,
};
use parking_lot::Mutex;
use tokio::io::AsyncRead;
use tokio::net::UnixStream;
use tokio::sync::{Notify, broadcast, watch};
use uuid::Uuid;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Before,
    After,
}

/// One life of an agent.
#[derive(Debug)]
pub(crate) struct Life {
    calls: AtomicUsize,
    last: Option<(usize, When)>,
    over: AtomicBool,
    pub(crate) ended: Notify,
    pub(crate) counts: Arc<Counts>,
}

/// Over all lives.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) starts: AtomicUsize,
    pub(crate) resets: AtomicUsize,
    pub(crate) presses: AtomicUsize,
    pub(crate) merges: AtomicUsize,
    pub(crate) live_merges: AtomicUsize,
    /// How long the pool takes over a merge, in milliseconds.
    merge_millis: AtomicU64,
    /// The layers that the pool merges into now.
    merging: Mutex<Vec<Uuid>>,
    /// How often a machine was given a file that the pool was writing to.
    pub(crate) torn: AtomicUsize,
}

/// The pool writes to a layer.
struct Writing<'a>(&'a Counts, Uuid);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.merging.lock().retain(|layer| *layer != self.1);
    }
}

impl Counts {
    pub(crate) fn merge_takes(&self, span: Duration) {
        self.merge_millis.store(span.as_millis() as u64, Ordering::Relaxed);
    }

    fn open(&self, disk: &DiskSpec) {
        let merging = self.merging.lock();
        let named = |layer: &DiskLayer| merging.iter().any(|one| layer.name.as_ref() == Some(&tail(*one)));
        if disk.layers.iter().any(named) {
            self.torn.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Life {
    pub(crate) fn new(last: Option<(usize, When)>, counts: &Arc<Counts>) -> Arc<Self> {
        Arc::new(Self {
            calls: AtomicUsize::new(0),
            last,
            over: AtomicBool::new(false),
            ended: Notify::new(),
            counts: Arc::clone(counts),
        })
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    async fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
        self.ended.notify_one();
        std::future::pending().await
    }

    async fn call<T>(&self, call: impl Future<Output = T>) -> T {
        if self.over.load(Ordering::Relaxed) {
            return std::future::pending().await;
        }
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        if self.last == Some((number, When::Before)) {
            self.end().await;
        }
        let done = call.await;
        if self.last == Some((number, When::After)) {
            self.end().await;
        }
        done
    }
}

#[derive(Debug)]
pub(crate) struct Mortal<T> {
    pub(crate) inner: T,
    pub(crate) life: Arc<Life>,
}

/// The machines of a host and the pool that their disks are in. A simulated machine knows nothing of the pool; a real one
/// writes into its files what it has merged.
#[derive(Debug)]
pub(crate) struct Metal {
    pub(crate) machines: SimHypervisor,
    pub(crate) pool: SimPool,
}

#[derive(Debug)]
struct Wired {
    machine: Arc<dyn Machine>,
    pool: SimPool,
}

impl Wired {
    /// The layer of this name, and those that the pool could merge.
    async fn merges(&self) -> Vec<Merge> {
        self.pool.merge_candidates().await.unwrap()
    }

    /// All that lies between a layer and one further down goes into the upper one.
    async fn merge_down(&self, child: &str, base: Option<&str>) {
        while let Some(merge) = self.merges().await.into_iter().find(|merge| tail(merge.into_child) == child)
            && base != Some(&tail(merge.layer))
        {
            self.pool.merge(merge.layer, merge.into_child, &Work::default()).await.unwrap();
        }
    }
}

/// As the agent names layers.
pub(crate) fn tail(layer: Uuid) -> String {
    layer.simple().to_string().split_off(20)
}

impl Mortal<Metal> {
    fn wrap(&self, machine: Arc<dyn Machine>) -> Arc<dyn Machine> {
        let inner = Wired { machine, pool: self.inner.pool.clone() };
        Arc::new(Mortal { inner, life: Arc::clone(&self.life) })
    }
}

#[async_trait]
impl Hypervisor for Mortal<Metal> {
    async fn probe(&self) -> HostProbe {
        self.inner.machines.probe().await
    }
    async fn start(&self, spec: MachineSpec, opts: StartOptions) -> Result<Arc<dyn Machine>, StartError> {
        spec.disks.iter().for_each(|disk| self.life.counts.open(disk));
        let start = async {
            let started = self.inner.machines.start(spec, opts).await;
            if started.is_ok() {
                self.life.counts.starts.fetch_add(1, Ordering::Relaxed);
            }
            started
        };
        self.life.call(start).await.map(|machine| self.wrap(machine))
    }
    async fn survey(&self) -> Result<Vec<Survey>> {
        let found = self.life.call(self.inner.machines.survey()).await?;
        let wrap = |found| match found {
            Survey::Running(machine) => Survey::Running(self.wrap(machine)),
            other => other,
        };
        Ok(found.into_iter().map(wrap).collect())
    }
    async fn forget(&self, id: Uuid) -> Result<()> {
        self.life.call(self.inner.machines.forget(id)).await
    }
    async fn kill(&self, id: Uuid) -> Result<()> {
        self.life.call(self.inner.machines.kill(id)).await
    }
}

#[async_trait]
impl Machine for Mortal<Wired> {
    fn id(&self) -> Uuid {
        self.inner.machine.id()
    }
    fn facts(&self) -> MachineFacts {
        self.inner.machine.facts()
    }
    async fn state(&self) -> Result<RunState, QmpError> {
        self.life.call(self.inner.machine.state()).await
    }
    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.inner.machine.events()
    }
    async fn pause(&self) -> Result<()> {
        self.life.call(self.inner.machine.pause()).await
    }
    async fn resume(&self) -> Result<()> {
        self.life.call(self.inner.machine.resume()).await
    }
    async fn reset(&self) -> Result<()> {
        let reset = async {
            self.life.counts.resets.fetch_add(1, Ordering::Relaxed);
            self.inner.machine.reset().await
        };
        self.life.call(reset).await
    }
    async fn powerdown(&self) -> Result<()> {
        self.life.counts.presses.fetch_add(1, Ordering::Relaxed);
        self.life.call(self.inner.machine.powerdown()).await
    }
    async fn save(&self, to: &Path, progress: watch::Sender<Progress>) -> Result<()> {
        self.life.call(self.inner.machine.save(to, progress)).await
    }
    async fn quit(&self) -> Result<()> {
        self.life.call(self.inner.machine.quit()).await
    }
    async fn exited(&self) -> ExitReport {
        self.inner.machine.exited().await
    }
    async fn console(&self) -> Result<UnixStream> {
        self.inner.machine.console().await
    }
    async fn vnc(&self) -> Result<UnixStream> {
        self.inner.machine.vnc().await
    }
    fn console_log(&self) -> PathBuf {
        self.inner.machine.console_log()
    }
    async fn rotate_console_log(&self, limit: u64) -> Result<()> {
        self.inner.machine.rotate_console_log(limit).await
    }
    async fn set_balloon(&self, bytes: u64) -> Result<()> {
        self.inner.machine.set_balloon(bytes).await
    }
    async fn balloon(&self) -> Result<u64> {
        self.inner.machine.balloon().await
    }
    async fn disks(&self) -> Result<Vec<DiskState>> {
        self.life.call(self.inner.machine.disks()).await
    }
    async fn disk_attach(&self, disk: DiskSpec) -> Result<()> {
        self.life.counts.open(&disk);
        self.life.call(self.inner.machine.disk_attach(disk)).await
    }
    async fn disk_detach(&self, id: &str, patience: Duration) -> Result<()> {
        self.life.call(self.inner.machine.disk_detach(id, patience)).await
    }
    async fn disk_resize(&self, id: &str, bytes: u64) -> Result<()> {
        let resized = async {
            self.inner.machine.disk_resize(id, bytes).await?;
            for volume in self.inner.pool.volume_list().await.unwrap() {
                if id == format!("v{}", tail(volume)) {
                    self.inner.pool.volume_grow(volume, bytes).await.unwrap();
                }
            }
            Ok(())
        };
        self.life.call(resized).await
    }
    async fn disk_limits(&self, id: &str, limits: DiskLimits) -> Result<()> {
        self.life.call(self.inner.machine.disk_limits(id, limits)).await
    }
    async fn disks_snapshot(&self, disks: Vec<SnapshotDisk>) -> Result<Duration> {
        self.life.call(self.inner.machine.disks_snapshot(disks)).await
    }
    async fn disk_stream(
        &self,
        id: &str,
        stream: Stream,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()> {
        let streamed = async {
            let base = stream.base.as_ref().map(|base| base.layer.clone());
            self.inner.machine.disk_stream(id, stream, progress, cancel).await?;
            self.life.counts.live_merges.fetch_add(1, Ordering::Relaxed);
            let disks = self.inner.machine.disks().await?;
            let top = disks.into_iter().find(|disk| disk.id == id).and_then(|disk| disk.top).unwrap();
            self.inner.merge_down(&top, base.as_deref()).await;
            Ok(())
        };
        self.life.call(streamed).await
    }
    async fn disk_commit(
        &self,
        id: &str,
        commit: Commit,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()> {
        let committed = async {
            let into = commit.into.name.clone();
            let layer = commit.layer.clone();
            self.inner.machine.disk_commit(id, commit, progress, cancel).await?;
            self.life.counts.live_merges.fetch_add(1, Ordering::Relaxed);
            let merges = self.inner.merges().await;
            let above = merges.into_iter().find(|merge| tail(merge.layer) == layer).unwrap();
            // The layer that goes is the upper one; to the tree it comes to the same with the ids the other way round.
            self.inner.merge_down(&tail(above.into_child), into.as_deref()).await;
            Ok(())
        };
        self.life.call(committed).await
    }
}

#[async_trait]
impl<P: Pool> Pool for Mortal<P> {
    fn kind(&self) -> PoolKind {
        self.inner.kind()
    }
    async fn usage(&self) -> Result<PoolUsage, StorageError> {
        self.inner.usage().await
    }
    async fn image_present(&self, image: &ImageRef) -> Result<bool, StorageError> {
        self.life.call(self.inner.image_present(image)).await
    }
    async fn image_add(&self, image: &ImageRef, from: ImageSource) -> Result<(), StorageError> {
        self.life.call(self.inner.image_add(image, from)).await
    }
    async fn image_remove(&self, image: &ImageRef) -> Result<(), StorageError> {
        self.life.call(self.inner.image_remove(image)).await
    }
    async fn image_list(&self) -> Result<Vec<ImageRef>, StorageError> {
        self.inner.image_list().await
    }
    async fn volume_create(&self, volume: &NewVolume) -> Result<VolumeInfo, StorageError> {
        self.life.call(self.inner.volume_create(volume)).await
    }
    async fn volume_layers(&self, id: Uuid) -> Result<Vec<Layer>, StorageError> {
        self.life.call(self.inner.volume_layers(id)).await
    }
    async fn volume_info(&self, id: Uuid) -> Result<Option<VolumeInfo>, StorageError> {
        self.life.call(self.inner.volume_info(id)).await
    }
    async fn volume_delete(&self, id: Uuid) -> Result<(), StorageError> {
        self.life.call(self.inner.volume_delete(id)).await
    }
    async fn volume_list(&self) -> Result<Vec<Uuid>, StorageError> {
        self.inner.volume_list().await
    }
    async fn volume_grow(&self, id: Uuid, size: u64) -> Result<VolumeInfo, StorageError> {
        self.life.call(self.inner.volume_grow(id, size)).await
    }
    async fn volume_check(&self, id: Uuid, repair: bool, work: &Work) -> Result<CheckReport, StorageError> {
        self.life.call(self.inner.volume_check(id, repair, work)).await
    }
    async fn flatten(&self, volume: Uuid, work: &Work) -> Result<(), StorageError> {
        let span = Duration::from_millis(self.life.counts.merge_millis.load(Ordering::Relaxed));
        let flatten = async {
            tokio::select! {
                () = tokio::time::sleep(span) => {}
                () = work.cancel.cancelled() => {}
            }
            self.inner.flatten(volume, work).await
        };
        self.life.call(flatten).await
    }
    async fn snapshot_prepare(
        &self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<SnapshotPlan, StorageError> {
        self.life.call(self.inner.snapshot_prepare(volume, snapshot, new_layer)).await
    }
    async fn snapshot_commit(&self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError> {
        self.life.call(self.inner.snapshot_commit(volume, snapshot)).await
    }
    async fn snapshot_abort(&self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError> {
        self.life.call(self.inner.snapshot_abort(volume, snapshot)).await
    }
    async fn recover(&self, volume: Uuid) -> Result<Vec<Uuid>, StorageError> {
        self.life.call(self.inner.recover(volume)).await
    }
    async fn snapshot_revert(
        &self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<VolumeInfo, StorageError> {
        self.life.call(self.inner.snapshot_revert(volume, snapshot, new_layer)).await
    }
    async fn snapshot_delete(&self, snapshot: Uuid) -> Result<(), StorageError> {
        self.life.call(self.inner.snapshot_delete(snapshot)).await
    }
    async fn snapshot_list(&self) -> Result<Vec<SnapshotInfo>, StorageError> {
        self.life.call(self.inner.snapshot_list()).await
    }
    async fn collect(&self, in_use: &HashSet<Uuid>) -> Result<Vec<Uuid>, StorageError> {
        self.life.call(self.inner.collect(in_use)).await
    }
    async fn merge_candidates(&self) -> Result<Vec<Merge>, StorageError> {
        self.life.call(self.inner.merge_candidates()).await
    }
    async fn merge(&self, layer: Uuid, child: Uuid, work: &Work) -> Result<(), StorageError> {
        self.life.counts.merges.fetch_add(1, Ordering::Relaxed);
        let span = Duration::from_millis(self.life.counts.merge_millis.load(Ordering::Relaxed));
        let merge = async {
            self.life.counts.merging.lock().push(child);
            let _writing = Writing(&self.life.counts, child);
            tokio::select! {
                () = tokio::time::sleep(span) => {}
                () = work.cancel.cancelled() => {}
            }
            self.inner.merge(layer, child, work).await
        };
        self.life.call(merge).await
    }
    async fn audit(&self) -> Result<Audit, StorageError> {
        self.life.call(self.inner.audit()).await
    }
}

#[async_trait]
impl ControlPlane for Mortal<Arc<crate::plane::Plane>> {
    async fn register(&self, node: &Name, register: NodeRegister) -> Result<(), PlaneError> {
        self.life.call(self.inner.register(node, register)).await
    }
    async fn heartbeat(&self, node: &Name) -> Result<Heartbeat, PlaneError> {
        self.inner.heartbeat(node).await
    }
    async fn work(&self, node: &Name) -> Result<WorkStream, PlaneError> {
        self.life.call(self.inner.work(node)).await
    }
    async fn report(&self, node: &Name, reports: Reports) -> Result<ReportsTaken, PlaneError> {
        self.life.call(self.inner.report(node, reports)).await
    }
    async fn image(
        &self,
        node: &Name,
        sha256: &str,
    ) -> Result<Box<dyn AsyncRead + Send + Unpin>, PlaneError> {
        self.life.call(self.inner.image(node, sha256)).await
    }
    async fn stream(&self, node: &Name, stream: StreamId) -> Result<Wire, PlaneError> {
        self.inner.stream(node, stream).await
    }
}
