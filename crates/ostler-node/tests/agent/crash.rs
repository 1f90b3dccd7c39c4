//! Drivers and control plane that count the agent's calls and, at a chosen one, are its last: from then on nothing
//! answers, and the test kills the agent. Before the call it had no effect, after it it had.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_trait::async_trait;
use ostler_api::node::NodeRegister;
use ostler_api::work::{Heartbeat, Reports, ReportsTaken};
use ostler_api::{Name, StreamId};
use ostler_node::{ControlPlane, PlaneError, Wire, WorkStream};
use ostler_qemu::*;
use ostler_storage::{
    ImageRef, ImageSource, Layer, NewVolume, Pool, PoolKind, PoolUsage, StorageError, VolumeInfo,
};
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

impl Mortal<SimHypervisor> {
    fn wrap(&self, machine: Arc<dyn Machine>) -> Arc<dyn Machine> {
        Arc::new(Mortal { inner: machine, life: Arc::clone(&self.life) })
    }
}

#[async_trait]
impl Hypervisor for Mortal<SimHypervisor> {
    async fn probe(&self) -> HostProbe {
        self.inner.probe().await
    }
    async fn start(&self, spec: MachineSpec, opts: StartOptions) -> Result<Arc<dyn Machine>, StartError> {
        let start = async {
            let started = self.inner.start(spec, opts).await;
            if started.is_ok() {
                self.life.counts.starts.fetch_add(1, Ordering::Relaxed);
            }
            started
        };
        self.life.call(start).await.map(|machine| self.wrap(machine))
    }
    async fn survey(&self) -> Result<Vec<Survey>> {
        let found = self.life.call(self.inner.survey()).await?;
        let wrap = |found| match found {
            Survey::Running(machine) => Survey::Running(self.wrap(machine)),
            other => other,
        };
        Ok(found.into_iter().map(wrap).collect())
    }
    async fn forget(&self, id: Uuid) -> Result<()> {
        self.life.call(self.inner.forget(id)).await
    }
    async fn kill(&self, id: Uuid) -> Result<()> {
        self.life.call(self.inner.kill(id)).await
    }
}

#[async_trait]
impl Machine for Mortal<Arc<dyn Machine>> {
    fn id(&self) -> Uuid {
        self.inner.id()
    }
    fn facts(&self) -> MachineFacts {
        self.inner.facts()
    }
    async fn state(&self) -> Result<RunState, QmpError> {
        self.life.call(self.inner.state()).await
    }
    fn events(&self) -> broadcast::Receiver<MachineEvent> {
        self.inner.events()
    }
    async fn pause(&self) -> Result<()> {
        self.life.call(self.inner.pause()).await
    }
    async fn resume(&self) -> Result<()> {
        self.life.call(self.inner.resume()).await
    }
    async fn reset(&self) -> Result<()> {
        let reset = async {
            self.life.counts.resets.fetch_add(1, Ordering::Relaxed);
            self.inner.reset().await
        };
        self.life.call(reset).await
    }
    async fn powerdown(&self) -> Result<()> {
        self.life.counts.presses.fetch_add(1, Ordering::Relaxed);
        self.life.call(self.inner.powerdown()).await
    }
    async fn save(&self, to: &Path, progress: watch::Sender<Progress>) -> Result<()> {
        self.life.call(self.inner.save(to, progress)).await
    }
    async fn quit(&self) -> Result<()> {
        self.life.call(self.inner.quit()).await
    }
    async fn exited(&self) -> ExitReport {
        self.inner.exited().await
    }
    async fn console(&self) -> Result<UnixStream> {
        self.inner.console().await
    }
    async fn vnc(&self) -> Result<UnixStream> {
        self.inner.vnc().await
    }
    fn console_log(&self) -> PathBuf {
        self.inner.console_log()
    }
    async fn rotate_console_log(&self, limit: u64) -> Result<()> {
        self.inner.rotate_console_log(limit).await
    }
    async fn set_balloon(&self, bytes: u64) -> Result<()> {
        self.inner.set_balloon(bytes).await
    }
    async fn balloon(&self) -> Result<u64> {
        self.inner.balloon().await
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
