//! What every task of one agent shares: the drivers, the control plane, the registries of VMs and volumes.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ostler_api::{Fault, VmId, VolumeId};
use ostler_qemu::{Hypervisor, Survey};
use ostler_storage::{ImageRef, Pool};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::config::AgentConfig;
use crate::control_plane::ControlPlane;
use crate::fault;
use crate::images::Images;
use crate::report::Outbox;
use crate::snapshot_task::Snapshots;
use crate::stream::STREAMS_MAX;
use crate::tidy::Tidy;
use crate::vm_handle::VmHandle;
use crate::volume_task::Volumes;

#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) config: AgentConfig,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) pool: Arc<dyn Pool>,
    pub(crate) plane: Arc<dyn ControlPlane>,
    /// Identifies this run of the host.
    pub(crate) host_boot: String,
    pub(crate) outbox: Outbox,
    pub(crate) vms: Mutex<HashMap<VmId, Arc<VmHandle>>>,
    pub(crate) volumes: Volumes,
    pub(crate) snapshots: Snapshots,
    pub(crate) tidy: Tidy,
    pub(crate) images: Images,
    /// Rung whenever a machine has let go of its disks.
    pub(crate) disks_released: Notify,
    pub(crate) starts: Semaphore,
    pub(crate) streams: Arc<Semaphore>,
    /// Cancelled when the agent is told to end; what waits gives up, nothing of a VM is undone.
    pub(crate) stopping: CancellationToken,
    tasks: Tasks,
    /// One survey at a time: it asks every machine.
    surveying: tokio::sync::Mutex<()>,
}

impl Host {
    pub(crate) fn new(
        config: AgentConfig,
        host_boot: String,
        hypervisor: Arc<dyn Hypervisor>,
        pool: Arc<dyn Pool>,
        plane: Arc<dyn ControlPlane>,
    ) -> Arc<Self> {
        Arc::new(Self {
            starts: Semaphore::new(config.starts_max.max(1)),
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
            config,
            hypervisor,
            pool,
            plane,
            host_boot,
            outbox: Outbox::default(),
            vms: Mutex::default(),
            volumes: Volumes::default(),
            snapshots: Snapshots::default(),
            tidy: Tidy::default(),
            images: Images::default(),
            disks_released: Notify::new(),
            stopping: CancellationToken::new(),
            tasks: Tasks::default(),
            surveying: tokio::sync::Mutex::new(()),
        })
    }

    pub(crate) fn vm(&self, id: VmId) -> Option<Arc<VmHandle>> {
        self.vms.lock().get(&id).cloned()
    }

    /// Whether a machine of this host has the volume open, or may have.
    pub(crate) fn volume_is_open(&self, volume: VolumeId) -> bool {
        self.vms.lock().values().any(|vm| vm.open.lock().contains(&volume))
    }

    /// Another VM that has the volume open, or may have.
    pub(crate) fn open_elsewhere(&self, volume: VolumeId, than: VmId) -> Option<VmId> {
        let vms = self.vms.lock();
        vms.values().find(|vm| vm.id != than && vm.open.lock().contains(&volume)).map(|vm| vm.id)
    }

    pub(crate) fn vm_dir(&self, vm: VmId) -> PathBuf {
        self.config.data_dir.join("vms").join(vm.to_string())
    }

    /// Where a suspended VM's memory is.
    pub(crate) fn state_file(&self, vm: VmId) -> PathBuf {
        self.vm_dir(vm).join("state")
    }

    /// The last console output of a VM that does not run.
    pub(crate) fn console_file(&self, vm: VmId) -> PathBuf {
        self.vm_dir(vm).join("console.log")
    }

    pub(crate) fn image_path(&self, image: &ImageRef) -> Result<PathBuf, Fault> {
        let name =
            image.file_name().map_err(|error| fault::storage_failed("an image is not usable", &error))?;
        Ok(self.config.pool_images.join(name))
    }

    /// What the hypervisor finds of one machine now.
    pub(crate) async fn survey_one(&self, id: Uuid) -> Result<Option<Survey>, Fault> {
        let _one = self.surveying.lock().await;
        let found =
            within("looking for the machine", self.config.times.end, self.hypervisor.survey()).await?;
        let found = found.map_err(|error| fault::machine_failed("looking for the machine", &error))?;
        Ok(found.into_iter().find(|survey| survey.id() == id))
    }

    /// Runs a task until it ends or the agent does.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// Waits until every task has ended, or the time is over.
    pub(crate) async fn settle(&self, limit: Duration) {
        let mut set = std::mem::take(&mut *self.tasks.0.lock());
        let all = async { while set.join_next().await.is_some() {} };
        if tokio::time::timeout(limit, all).await.is_err() {
            tracing::info!(tasks = set.len(), "ending with work under way; it goes on after the next start");
        }
    }

    /// Ends every task where it stands.
    pub(crate) fn abort(&self) {
        self.tasks.0.lock().abort_all();
    }
}

/// A set that forgets what has ended.
#[derive(Debug, Default)]
struct Tasks(Mutex<JoinSet<()>>);

impl Tasks {
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut set = self.0.lock();
        while set.try_join_next().is_some() {}
        set.spawn(task);
    }
}

/// Runs a call to a driver with a deadline.
pub(crate) async fn within<T>(
    what: &str,
    limit: Duration,
    call: impl Future<Output = T>,
) -> Result<T, Fault> {
    tokio::time::timeout(limit, call).await.map_err(|_| fault::late(what, limit))
}

/// `span` ± 20 %, so that a thousand agents do not act in step.
pub(crate) fn jitter(span: Duration) -> Duration {
    span.mul_f64(rand::random_range(0.8..1.2))
}

/// A pause that doubles with each failure.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new((first, longest): (Duration, Duration)) -> Self {
        Self { first, longest, next: first }
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }

    pub(crate) async fn pause(&mut self) {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        tokio::time::sleep(jitter(pause)).await;
    }
}
