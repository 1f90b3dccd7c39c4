//! The agent: adopts what runs on this host, then follows the control plane until it is told to end. VMs stay.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use ostler_api::{NodeId, VmId};
use ostler_qemu::{Hypervisor, Survey};
use ostler_storage::Pool;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::config::AgentConfig;
use crate::control_plane::ControlPlane;
use crate::facts::host_boot;
use crate::fault;
use crate::host::{Backoff, Host, within};
use crate::session;
use crate::vm_handle::VmHandle;
use crate::vm_task;

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("{what} in {path} failed")]
    Data { what: &'static str, path: String, source: io::Error },
    #[error("the host's boot id cannot be read")]
    Boot(#[source] io::Error),
}

/// One node's agent.
#[derive(Debug)]
pub struct Agent {
    config: AgentConfig,
    hypervisor: Arc<dyn Hypervisor>,
    pool: Arc<dyn Pool>,
    plane: Arc<dyn ControlPlane>,
}

impl Agent {
    pub fn new(
        config: AgentConfig,
        hypervisor: Arc<dyn Hypervisor>,
        pool: Arc<dyn Pool>,
        plane: Arc<dyn ControlPlane>,
    ) -> Self {
        Self { config, hypervisor, pool, plane }
    }

    /// Runs until `shutdown`. VMs run on; what is under way is finished if it is short, else taken up by the next
    /// agent on this host. Dropping the future is like killing the agent.
    ///
    /// # Errors
    /// The data directory cannot be used. Everything else is retried.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), AgentError> {
        let span = tracing::info_span!("agent", node = %self.config.node_name);
        Box::pin(self.run_inner(shutdown)).instrument(span).await
    }

    async fn run_inner(self, shutdown: CancellationToken) -> Result<(), AgentError> {
        let path = self.config.data_dir.display().to_string();
        let failed = |what| {
            let path = path.clone();
            move |source| AgentError::Data { what, path, source }
        };
        self.config.keep.sweep().await.map_err(failed("cleaning up"))?;
        let id = self.config.keep.node_id().await.map_err(failed("reading the node's id"))?;
        let records = self.config.keep.vms().await.map_err(failed("reading the records of VMs"))?;
        let volumes = self.config.keep.volumes().await.map_err(failed("reading the records of volumes"))?;
        let boot = match self.config.host_boot.clone() {
            Some(boot) => boot,
            None => host_boot().await.map_err(AgentError::Boot)?,
        };
        let host = Host::new(self.config, boot, self.hypervisor, self.pool, self.plane);
        // However this ends, no task of the agent outlives it.
        let _abort = Abort(Arc::clone(&host));
        host.volumes.load(volumes);
        let follow = async {
            let found = survey(&host).await;
            adopt(&host, records, found);
            let tidying = Arc::clone(&host);
            host.spawn(async move { Box::pin(tidying.tidy_up()).await });
            tokio::join!(connect(&host, id), session::send_reports(&host));
        };
        tokio::select! {
            () = follow => {}
            () = shutdown.cancelled() => {}
        }
        host.stopping.cancel();
        let grace = host.config.times.grace;
        // What is finished within the grace is also told, if somebody listens.
        let finish = async {
            host.settle(grace).await;
            while !host.outbox.is_empty() {
                tokio::time::sleep(grace / 100).await;
            }
        };
        tokio::select! {
            () = finish => {}
            () = session::send_reports(&host) => {}
            () = tokio::time::sleep(grace * 2) => {}
        }
        tracing::info!("the agent has ended; VMs run on");
        Ok(())
    }
}

struct Abort(Arc<Host>);

impl Drop for Abort {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What runs here. Without knowing that, nothing may be started, so it is asked until it is known.
async fn survey(host: &Host) -> Vec<Survey> {
    let mut backoff = Backoff::new(host.config.times.backoff);
    loop {
        let found = within("looking for machines", host.config.times.state, host.hypervisor.survey()).await;
        let reason = match found {
            Ok(Ok(found)) => return found,
            Ok(Err(error)) => fault::chain(&error),
            Err(late) => late.message,
        };
        tracing::error!(reason, "what runs on this host is not known; trying again");
        backoff.pause().await;
    }
}

/// A task for each VM that is recorded or runs.
fn adopt(host: &Arc<Host>, mut records: HashMap<VmId, crate::record::Record>, found: Vec<Survey>) {
    let mut found: HashMap<VmId, Survey> =
        found.into_iter().map(|survey| (VmId(survey.id()), survey)).collect();
    let ids: Vec<VmId> = found.keys().chain(records.keys()).copied().collect();
    for id in ids {
        if host.vm(id).is_some() {
            continue;
        }
        let handle = VmHandle::new(id);
        let record = records.remove(&id).map(Box::new);
        // Before anything is asked of this agent: what a machine may have open is not touched.
        let open = record.iter().filter_map(|record| record.run.as_ref()).flat_map(|run| &run.volumes);
        handle.open.lock().extend(open.copied());
        host.vms.lock().insert(id, Arc::clone(&handle));
        vm_task::spawn(host, handle, record, found.remove(&id));
    }
}

async fn connect(host: &Arc<Host>, id: NodeId) {
    let mut backoff = Backoff::new(host.config.times.backoff);
    let mut warned = false;
    loop {
        let (connected, error) = session::run(host, id).await;
        if connected {
            backoff.reset();
            warned = false;
        }
        if std::mem::replace(&mut warned, true) {
            tracing::debug!(%error, "still not connected");
        } else {
            tracing::warn!(%error, "not connected to the control plane; VMs run on, trying again");
        }
        backoff.pause().await;
    }
}
