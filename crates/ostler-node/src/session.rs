//! One connection to the control plane: register, heartbeat, and take in the work, until any of them breaks.
//!
//! Called by the agent, again and again. Nothing here waits for a VM: wishes go into inboxes.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use ostler_api::node::{NodeFacts, NodeRegister};
use ostler_api::work::{Reports, WorkLine};
use ostler_api::{NodeId, VmId, VolumeId};
use tokio::time::Instant;
use uuid::Uuid;

use crate::control_plane::{PlaneError, WorkStream};
use crate::facts::is_news;
use crate::host::{Backoff, Host, jitter, within};
use crate::record::Seen;
use crate::report::describe;
use crate::stream;
use crate::vm_handle::{Trust, VmHandle, Wanted};
use crate::vm_task;

/// Until the control plane has said how long a lease is.
const LEASE_FIRST: Duration = Duration::from_secs(3);

async fn call<T>(
    host: &Host,
    what: &str,
    call: impl Future<Output = Result<T, PlaneError>>,
) -> Result<T, PlaneError> {
    let late = |fault: ostler_api::Fault| PlaneError::Unreachable(fault.message);
    within(what, host.config.times.request, call).await.map_err(late)?
}

/// Runs one session; returns why it ended, and whether the control plane had been reached.
pub(crate) async fn run(host: &Arc<Host>, id: NodeId) -> (bool, PlaneError) {
    let mut facts = None;
    if let Err(error) = register(host, id, &mut facts).await {
        return (false, error);
    }
    let work = match call(host, "asking for work", host.plane.work(&host.config.node_name)).await {
        Ok(work) => work,
        Err(error) => return (false, error),
    };
    tracing::info!("connected to the control plane");
    let error = tokio::select! {
        error = Box::pin(take_in(host, work)) => error,
        error = heartbeats(host) => error,
        error = news(host, id, &mut facts) => error,
    };
    (true, error)
}

async fn register(host: &Host, id: NodeId, told: &mut Option<NodeFacts>) -> Result<(), PlaneError> {
    let facts = host.facts().await.map_err(|fault| PlaneError::Unreachable(fault.message))?;
    if told.as_ref().is_some_and(|told| !is_news(told, &facts)) {
        return Ok(());
    }
    let register = NodeRegister { id, labels: host.config.labels.clone(), facts: facts.clone() };
    call(host, "registering", host.plane.register(&host.config.node_name, register)).await?;
    *told = Some(facts);
    Ok(())
}

/// Registers again when the host has changed.
async fn news(host: &Host, id: NodeId, told: &mut Option<NodeFacts>) -> PlaneError {
    loop {
        tokio::time::sleep(jitter(host.config.times.facts)).await;
        match register(host, id, told).await {
            Ok(()) => {}
            Err(PlaneError::Unreachable(error)) => tracing::debug!(error, "the host's facts were not taken"),
            Err(error @ (PlaneError::UnknownNode(_) | PlaneError::Refused(_))) => return error,
        }
    }
}

async fn heartbeats(host: &Host) -> PlaneError {
    let mut lease = LEASE_FIRST;
    let mut missed = 0u32;
    loop {
        match call(host, "a heartbeat", host.plane.heartbeat(&host.config.node_name)).await {
            Ok(answer) => {
                missed = 0;
                lease = Duration::from_secs(u64::from(answer.lease_secs.max(1)));
            }
            Err(PlaneError::Unreachable(error)) => {
                missed += 1;
                tracing::debug!(error, missed, "a heartbeat was not taken");
            }
            Err(error @ (PlaneError::UnknownNode(_) | PlaneError::Refused(_))) => return error,
        }
        // After a miss sooner, so that one lost request does not cost the lease.
        let pause = if missed == 0 { lease / 3 } else { lease / 10 };
        tokio::time::sleep(jitter(pause.max(Duration::from_millis(100)))).await;
    }
}

/// What the session knows of the store behind it.
struct View {
    cloud: Uuid,
    revision: u64,
    trust: Trust,
    /// Set until everything that is placed here was listed.
    listing: Option<(HashSet<VmId>, HashSet<VolumeId>)>,
    /// Listed or announced in this session.
    placed: HashSet<VmId>,
    seen_written: Instant,
}

async fn take_in(host: &Arc<Host>, mut work: WorkStream) -> PlaneError {
    let mut view: Option<View> = None;
    loop {
        let line = match tokio::time::timeout(host.config.times.silence, work.next()).await {
            Ok(Some(Ok(line))) => line,
            Ok(Some(Err(error))) => return error,
            Ok(None) => return PlaneError::Unreachable("the work stream ended".to_owned()),
            Err(_) => return PlaneError::Unreachable("the work stream is silent".to_owned()),
        };
        if let WorkLine::Hello { cloud, revision } = line {
            view = Some(View::open(host, cloud, revision).await);
            continue;
        }
        match &mut view {
            Some(view) => view.take(host, line).await,
            None => return PlaneError::Refused("the work stream does not begin with a hello".to_owned()),
        }
    }
}

impl View {
    async fn open(host: &Host, cloud: Uuid, revision: u64) -> Self {
        let seen = host.config.keep.seen().await.unwrap_or_default();
        let mut trust = Trust::Listed;
        if seen.cloud == Some(cloud) && revision < seen.revision {
            trust = Trust::OlderStore;
            tracing::warn!(
                %cloud, revision, seen = seen.revision,
                "the control plane's store is older than one this node has seen: VMs it does not list are left alone",
            );
        }
        Self {
            cloud,
            revision,
            trust,
            listing: Some(Default::default()),
            placed: HashSet::new(),
            seen_written: Instant::now(),
        }
    }

    async fn take(&mut self, host: &Arc<Host>, line: WorkLine) {
        match line {
            WorkLine::Hello { .. } => {}
            WorkLine::Vm { vm } => {
                let id = VmId(vm.metadata.id);
                self.revision = self.revision.max(vm.metadata.revision);
                self.placed.insert(id);
                let compare = match &mut self.listing {
                    Some((vms, _)) => vms.insert(id),
                    None => false,
                };
                let wanted = Wanted::Placed { vm: Arc::from(vm), cloud: self.cloud };
                want(host, id, wanted, compare);
            }
            WorkLine::VmGone { vm } => {
                let trust = if self.placed.remove(&vm) { Trust::Explicit } else { self.trust };
                if let Some(handle) = host.vm(vm) {
                    let wanted = Wanted::Missing { cloud: self.cloud, revision: self.revision, trust };
                    handle.want(wanted, false);
                }
            }
            WorkLine::Volume { volume } => {
                self.revision = self.revision.max(volume.metadata.revision);
                if let Some((_, volumes)) = &mut self.listing {
                    volumes.insert(volume.metadata.id.into());
                }
                host.volume_want(Arc::from(volume), self.cloud);
            }
            WorkLine::VolumeGone { volume } => {
                host.volume_unwant(volume, self.cloud, self.revision, Trust::Explicit);
            }
            WorkLine::Snapshot { snapshot } => {
                self.revision = self.revision.max(snapshot.metadata.revision);
                host.snapshot_want(Arc::from(snapshot));
            }
            WorkLine::SnapshotGone { snapshot } => host.snapshot_unwant(snapshot),
            WorkLine::ImageGone { sha256 } => {
                let host_task = Arc::clone(host);
                host.spawn(async move { host_task.image_drop(&sha256).await });
            }
            WorkLine::Images { sha256 } => {
                // Only the word of a store that may be believed; the cache is what is lost otherwise.
                if matches!(self.trust, Trust::Listed) {
                    // Looked at now: what later lines bring here is none of this list's business.
                    let unknown = host.images_besides(&sha256).await;
                    let host_task = Arc::clone(host);
                    host.spawn(async move {
                        for image in unknown {
                            host_task.image_drop(&image.sha256).await;
                        }
                    });
                }
            }
            WorkLine::Synced { revision } => self.synced(host, revision).await,
            WorkLine::Stream { stream } => stream::open(host, stream),
            WorkLine::Bookmark { revision } => {
                self.revision = self.revision.max(revision);
                if self.seen_written.elapsed() > host.config.times.facts {
                    self.remember(host).await;
                }
            }
        }
    }

    /// What was not listed is not wanted, if this store may be believed.
    async fn synced(&mut self, host: &Arc<Host>, revision: u64) {
        self.revision = self.revision.max(revision);
        let Some((vms, volumes)) = self.listing.take() else { return };
        let (cloud, revision, trust) = (self.cloud, self.revision, self.trust);
        let unlisted: Vec<_> =
            host.vms.lock().values().filter(|handle| !vms.contains(&handle.id)).cloned().collect();
        for handle in unlisted {
            handle.want(Wanted::Missing { cloud, revision, trust }, true);
        }
        for volume in host.volumes.known() {
            if !volumes.contains(&volume) {
                host.volume_unwant(volume, cloud, revision, trust);
            }
        }
        tracing::debug!(vms = vms.len(), volumes = volumes.len(), "synced");
        host.tidy.wake();
        self.remember(host).await;
    }

    async fn remember(&mut self, host: &Host) {
        self.seen_written = Instant::now();
        let seen = Seen { cloud: Some(self.cloud), revision: self.revision };
        if let Err(error) = host.config.keep.seen_put(seen).await {
            tracing::warn!(%error, "the newest revision is not kept");
        }
    }
}

/// Puts a wish into a VM's inbox; a VM that is new here gets its task.
fn want(host: &Arc<Host>, id: VmId, wanted: Wanted, compare: bool) {
    let mut vms = host.vms.lock();
    if let Some(handle) = vms.get(&id) {
        handle.want(wanted, compare);
        return;
    }
    let handle = VmHandle::new(id);
    handle.want(wanted, compare);
    vms.insert(id, Arc::clone(&handle));
    drop(vms);
    vm_task::spawn(host, handle, None, None);
}

/// Sends what waits in the outbox, for as long as the agent lives.
pub(crate) async fn send_reports(host: &Host) {
    let mut backoff = Backoff::new(host.config.times.backoff);
    loop {
        let Some(batch) = host.outbox.take() else {
            host.outbox.filled().await;
            continue;
        };
        match send(host, &batch).await {
            Ok(()) => backoff.reset(),
            Err(PlaneError::Refused(error)) if batch.reports.len() == 1 => {
                let report = batch.reports.first().map(describe);
                tracing::error!(error, report, "a report was refused and is dropped");
            }
            Err(PlaneError::Refused(error)) => {
                tracing::warn!(error, "a batch of reports was refused; sending them one by one");
                send_singly(host, batch).await;
            }
            Err(error @ (PlaneError::Unreachable(_) | PlaneError::UnknownNode(_))) => {
                tracing::debug!(%error, "reports wait");
                host.outbox.put_back(batch);
                backoff.pause().await;
            }
        }
    }
}

async fn send(host: &Host, batch: &Reports) -> Result<(), PlaneError> {
    let report = host.plane.report(&host.config.node_name, batch.clone());
    let taken = call(host, "reporting", report).await?;
    if taken.dropped > 0 {
        tracing::debug!(dropped = taken.dropped, "reports on what is no longer placed here");
    }
    Ok(())
}

async fn send_singly(host: &Host, batch: Reports) {
    for report in batch.reports {
        let single = Reports { reports: vec![report] };
        match send(host, &single).await {
            Ok(()) => {}
            Err(PlaneError::Refused(error)) => {
                let report = single.reports.first().map(describe);
                tracing::error!(error, report, "a report was refused and is dropped");
            }
            Err(PlaneError::Unreachable(_) | PlaneError::UnknownNode(_)) => host.outbox.put_back(single),
        }
    }
}
