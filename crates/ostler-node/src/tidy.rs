//! Chains of layers are kept short: a layer that only one other layer still needs is merged into it, or with it.
//!
//! One task per host, one merge at a time, behind everything else. Level-triggered: the pool says what could be merged, the
//! machines say what they have open, and nothing is remembered but when to try again what failed.
//!
//! What always holds: a layer is merged by the pool only while no machine has it open, and by QEMU only in the machine that
//! alone has it open. Whoever opens or changes a volume *holds* it first, which cancels a merge that concerns it and waits
//! for no more than that; a merge first *claims* its layer and then looks at what is held and open. So one sees the other.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ostler_api::{Fault, VolumeId};
use ostler_qemu::{Commit, Machine, Progress, Stream, StreamBase};
use ostler_storage::{Layer, Merge, Work};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::fault;
use crate::host::{Host, jitter, within};
use crate::machine_spec::{disk_id, disk_layer, layer_name, node_name};

/// After what made work, so that a row of deletes is one round.
const SETTLE: Duration = Duration::from_secs(2);
/// Between attempts at a merge that fails.
const RETRY: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));
/// A merge that has not moved for so long is given up.
const STALLED: Duration = Duration::from_secs(600);
/// What a merge may take from a running guest's disk, in bytes a second.
const LIVE_RATE: u64 = 64 << 20;

#[derive(Debug, Default)]
pub(crate) struct Tidy {
    state: Mutex<State>,
    bell: Notify,
    /// Rung when a claim ends.
    ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    holds: HashMap<VolumeId, usize>,
    claim: Option<Claim>,
    /// Volumes that stand on what was left because somebody had it open or held it.
    postponed: HashSet<VolumeId>,
}

#[derive(Debug, Clone)]
struct Claim {
    child: Uuid,
    cancel: CancellationToken,
}

/// While it exists, nothing of the volumes is merged.
#[derive(Debug)]
pub(crate) struct Hold<'a> {
    tidy: &'a Tidy,
    volumes: Vec<VolumeId>,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut state = self.tidy.state.lock();
        for volume in &self.volumes {
            if let Some(count) = state.holds.get_mut(volume) {
                *count -= 1;
                if *count == 0 {
                    state.holds.remove(volume);
                }
            }
        }
        drop(state);
        self.tidy.wake_postponed(&self.volumes);
    }
}

/// The right to merge into one layer, given back when dropped.
struct Claimed<'a>(&'a Tidy, CancellationToken);

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        self.0.state.lock().claim = None;
        self.0.ended.notify_waiters();
    }
}

impl Tidy {
    /// There may be something to merge.
    pub(crate) fn wake(&self) {
        self.bell.notify_one();
    }

    /// What was in the way of these volumes may be gone.
    pub(crate) fn wake_postponed(&self, volumes: &[VolumeId]) {
        let left = {
            let state = self.state.lock();
            volumes.iter().any(|volume| state.postponed.contains(volume))
        };
        if left {
            self.bell.notify_one();
        }
    }

    fn claim(&self, child: Uuid) -> Claimed<'_> {
        let cancel = CancellationToken::new();
        self.state.lock().claim = Some(Claim { child, cancel: cancel.clone() });
        Claimed(self, cancel)
    }

    fn is_held(&self, volumes: &[VolumeId]) -> bool {
        let state = self.state.lock();
        volumes.iter().any(|volume| state.holds.contains_key(volume))
    }

    async fn unclaimed(&self, child: Uuid) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.state.lock().claim.as_ref().is_none_or(|claim| claim.child != child) {
                return;
            }
            ended.await;
        }
    }
}

/// When a merge that failed is tried again.
#[derive(Debug)]
struct Failure {
    at: Instant,
    pause: Duration,
}

/// One merge that can be done now.
#[derive(Debug)]
enum Plan {
    /// By the pool.
    Closed { layer: Uuid },
    /// By QEMU, into the layer that the guest writes to.
    Stream { machine: Arc<dyn Machine>, volume: VolumeId, base: Option<Layer> },
    /// By QEMU, further down: `layer` and those below it into `into`.
    Commit { machine: Arc<dyn Machine>, volume: VolumeId, top: Uuid, above: Layer, layer: Uuid, into: Layer },
}

type Chains = HashMap<VolumeId, Vec<Layer>>;

impl Host {
    /// Keeps merges away from volumes that are about to be opened or changed.
    pub(crate) async fn hold(&self, volumes: &[VolumeId]) -> Result<Hold<'_>, Fault> {
        for volume in volumes {
            *self.tidy.state.lock().holds.entry(*volume).or_default() += 1;
        }
        let hold = Hold { tidy: &self.tidy, volumes: volumes.to_vec() };
        loop {
            let Some(claim) = self.tidy.state.lock().claim.clone() else { return Ok(hold) };
            if !self.concerns(volumes, claim.child).await {
                return Ok(hold);
            }
            claim.cancel.cancel();
            let limit = self.config.times.ask * 2;
            within("cancelling a merge of the volume's layers", limit, self.tidy.unclaimed(claim.child))
                .await?;
        }
    }

    /// Whether one of the volumes stands on a layer; true also when that is not known.
    async fn concerns(&self, volumes: &[VolumeId], child: Uuid) -> bool {
        for volume in volumes {
            let layers = within("reading a chain", self.config.times.pool, self.pool.volume_layers(volume.0));
            match layers.await {
                Ok(Ok(layers)) if !stands_on(&layers, child) => {}
                Ok(Err(ostler_storage::StorageError::NotFound { .. })) => {}
                Ok(Ok(_) | Err(_)) | Err(_) => return true,
            }
        }
        false
    }

    /// The task: runs until the agent ends.
    pub(crate) async fn tidy_up(&self) {
        let mut failures: HashMap<Uuid, Failure> = HashMap::new();
        loop {
            let again = failures.values().map(|failure| failure.at).min();
            let retry = async {
                match again {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.tidy.bell.notified() => {}
                () = retry => {}
            }
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = tokio::time::sleep(SETTLE) => {}
            }
            while !self.stopping.is_cancelled() && self.tidy_once(&mut failures).await {}
        }
    }

    /// One merge. False when there is none that can be done now.
    async fn tidy_once(&self, failures: &mut HashMap<Uuid, Failure>) -> bool {
        self.tidy.state.lock().postponed.clear();
        let (candidates, chains) = match self.tidy_look().await {
            Ok(look) => look,
            Err(fault) => {
                failed(failures, Uuid::nil(), &fault);
                return false;
            }
        };
        failures.retain(|child, _| candidates.iter().any(|merge| merge.into_child == *child));
        let layers: HashSet<Uuid> = candidates.iter().map(|merge| merge.layer).collect();
        // From the uppermost of a row, so that no block is copied twice.
        for merge in candidates.iter().filter(|merge| !layers.contains(&merge.into_child)) {
            let child = merge.into_child;
            if failures.get(&child).is_some_and(|failure| failure.at > Instant::now()) {
                continue;
            }
            // Before it is looked at, so that nobody lets it go unheard.
            self.tidy.state.lock().postponed.extend(standing(child, &chains));
            if self.tidy_plan(child, &candidates, &chains).is_none() {
                continue;
            }
            match self.tidy_merge(child).await {
                Ok(true) => {
                    failures.remove(&child);
                    return true;
                }
                Ok(false) => {}
                Err(fault) => failed(failures, child, &fault),
            }
        }
        false
    }

    /// What could be merged, and what stands on what.
    async fn tidy_look(&self) -> Result<(Vec<Merge>, Chains), Fault> {
        let limit = self.config.times.pool;
        let pool_failed = |error| fault::storage_failed("looking for layers to merge", &error);
        let what = "looking for layers to merge";
        let candidates = within(what, limit, self.pool.merge_candidates()).await?.map_err(pool_failed)?;
        let mut chains = Chains::new();
        if candidates.is_empty() {
            return Ok((candidates, chains));
        }
        for volume in within(what, limit, self.pool.volume_list()).await?.map_err(pool_failed)? {
            match within(what, limit, self.pool.volume_layers(volume)).await? {
                Ok(layers) => drop(chains.insert(VolumeId(volume), layers)),
                // What cannot be read cannot be opened; one that is open may stand on anything.
                Err(error) if self.volume_is_open(VolumeId(volume)) => return Err(pool_failed(error)),
                Err(_) => {}
            }
        }
        Ok((candidates, chains))
    }

    /// How to make shorter what stands below a layer, as things are.
    fn tidy_plan(&self, child: Uuid, candidates: &[Merge], chains: &Chains) -> Option<Plan> {
        let row = row(child, candidates);
        let first = *row.first()?;
        let standing: Vec<VolumeId> =
            chains.iter().filter(|(_, layers)| stands_on(layers, child)).map(|(volume, _)| *volume).collect();
        if self.tidy.is_held(&standing) {
            return None;
        }
        let handles: Vec<_> = self.vms.lock().values().cloned().collect();
        let mut opened = handles.iter().flat_map(|handle| {
            let open = handle.open.lock();
            let both: Vec<_> = standing.iter().filter(|volume| open.contains(volume)).copied().collect();
            both.into_iter().map(move |volume| (handle, volume))
        });
        let Some((handle, volume)) = opened.next() else { return Some(Plan::Closed { layer: first }) };
        if opened.next().is_some() {
            return None;
        }
        let machine = handle.machine.lock().clone()?;
        let chain = chains.get(&volume)?;
        let at = chain.iter().position(|layer| layer.id() == Some(child))?;
        if at == 0 {
            let base = chain.get(1 + row.len()).cloned();
            return Some(Plan::Stream { machine, volume, base });
        }
        // Here a layer goes that the child stands on, so it takes two; and nobody else may open the lower one.
        let into = chain.get(at + row.len())?.clone();
        let top = chain.first()?.id()?;
        (row.len() > 1 && standing.len() == 1).then_some(Plan::Commit {
            machine,
            volume,
            top,
            above: chain.get(at)?.clone(),
            layer: first,
            into,
        })
    }

    /// Merges what stands below a layer. False when somebody else has it now.
    async fn tidy_merge(&self, child: Uuid) -> Result<bool, Fault> {
        let claimed = self.tidy.claim(child);
        // Anew: what was held or opened before the claim is seen now, and what comes after it sees the claim.
        let cancel = &claimed.1;
        let look = tokio::select! {
            biased;
            () = cancel.cancelled() => return Ok(false),
            look = self.tidy_look() => look,
        };
        let (candidates, chains) = look?;
        let Some(plan) = self.tidy_plan(child, &candidates, &chains) else { return Ok(false) };
        let done = match &plan {
            Plan::Closed { layer } => self.merge_closed(*layer, child, cancel).await,
            Plan::Stream { machine, volume, base } => {
                self.merge_stream(machine, *volume, child, base.as_ref(), cancel).await
            }
            Plan::Commit { machine, volume, top, above, layer, into } => {
                self.merge_commit(machine, *volume, *top, above, (*layer, into), cancel).await
            }
        }?;
        if !done {
            return Ok(false);
        }
        tracing::info!(into = %child, live = !matches!(plan, Plan::Closed { .. }), "layers are merged");
        drop(claimed);
        let what = "collecting layers";
        let collected = within(what, self.config.times.pool, self.pool.collect(&HashSet::new())).await?;
        collected.map_err(|error| fault::storage_failed(what, &error))?;
        let (left, _) = self.tidy_look().await?;
        let before = row(child, &candidates).len();
        if row(child, &left).len() < before {
            return Ok(true);
        }
        let message =
            format!("the layers below {child} were merged, and the pool still has them in its chain");
        Err(fault::fault("not_merged", message))
    }

    async fn merge_closed(
        &self,
        layer: Uuid,
        child: Uuid,
        cancel: &CancellationToken,
    ) -> Result<bool, Fault> {
        let work = Work::default();
        let merge = self.pool.merge(layer, child, &work);
        let merged = self.follow(merge, cancel, || work.cancel.cancel(), || work.progress()).await;
        self.judge(merged, cancel, |error| fault::storage_failed("merging layers", &error))
    }

    async fn merge_stream(
        &self,
        machine: &Arc<dyn Machine>,
        volume: VolumeId,
        child: Uuid,
        base: Option<&Layer>,
        cancel: &CancellationToken,
    ) -> Result<bool, Fault> {
        let base = match base {
            None => None,
            Some(layer) => match node_name(layer).zip(layer.backing_name()) {
                Some((layer, backing_file)) => Some(StreamBase { layer, backing_file }),
                None => return Err(unnamed(layer)),
            },
        };
        if !self.writes_to(machine, volume, child, cancel).await? {
            return Ok(false);
        }
        let stream = Stream { base, bytes_per_second: LIVE_RATE };
        let (progress, seen) = watch::channel(Progress::default());
        let (stop, stopped) = watch::channel(false);
        let disk = disk_id(volume);
        let job = machine.disk_stream(&disk, stream, progress, stopped);
        self.merge_live(job, &stop, &seen, cancel).await
    }

    async fn merge_commit(
        &self,
        machine: &Arc<dyn Machine>,
        volume: VolumeId,
        top: Uuid,
        above: &Layer,
        (layer, into): (Uuid, &Layer),
        cancel: &CancellationToken,
    ) -> Result<bool, Fault> {
        if !self.writes_to(machine, volume, top, cancel).await? {
            return Ok(false);
        }
        let file =
            |layer| disk_layer(layer).map_err(|error| fault::fault("machine_invalid", error.to_string()));
        let commit = Commit {
            layer: layer_name(layer),
            into: file(into)?,
            above: Some(file(above)?),
            backing_file: into.backing_name().ok_or_else(|| unnamed(into))?,
            bytes_per_second: LIVE_RATE,
        };
        let (progress, seen) = watch::channel(Progress::default());
        let (stop, stopped) = watch::channel(false);
        let disk = disk_id(volume);
        let job = machine.disk_commit(&disk, commit, progress, stopped);
        self.merge_live(job, &stop, &seen, cancel).await
    }

    async fn merge_live(
        &self,
        job: impl Future<Output = Result<(), ostler_qemu::Error>>,
        stop: &watch::Sender<bool>,
        seen: &watch::Receiver<Progress>,
        cancel: &CancellationToken,
    ) -> Result<bool, Fault> {
        let end = || {
            stop.send_replace(true);
        };
        let merged = self.follow(job, cancel, end, || seen.borrow().done_bytes).await;
        self.judge(merged, cancel, |error| fault::machine_failed("merging layers", &error))
    }

    /// True when it is merged, false when it was called off.
    fn judge<E>(
        &self,
        merged: Followed<Result<(), E>>,
        cancel: &CancellationToken,
        why: impl Fn(E) -> Fault,
    ) -> Result<bool, Fault> {
        match merged {
            Followed::Done(Ok(())) => Ok(true),
            Followed::Done(Err(_)) | Followed::Left
                if cancel.is_cancelled() || self.stopping.is_cancelled() =>
            {
                Ok(false)
            }
            Followed::Done(Err(error)) => Err(why(error)),
            Followed::Left => Err(fault::late("merging layers", STALLED)),
        }
    }

    /// Whether QEMU's disk and the pool agree on the layer that takes the writes.
    async fn writes_to(
        &self,
        machine: &Arc<dyn Machine>,
        volume: VolumeId,
        top: Uuid,
        cancel: &CancellationToken,
    ) -> Result<bool, Fault> {
        let (id, top) = (disk_id(volume), layer_name(top));
        let disks = tokio::select! {
            biased;
            () = cancel.cancelled() => return Ok(false),
            disks = self.disks_of(machine) => disks?,
        };
        Ok(disks.into_iter().any(|disk| disk.id == id && disk.top.as_ref() == Some(&top)))
    }

    /// Sees a merge through until it ends, is cancelled or stands still.
    async fn follow<T>(
        &self,
        merge: impl Future<Output = T>,
        cancel: &CancellationToken,
        stop: impl Fn(),
        progress: impl Fn() -> u64,
    ) -> Followed<T> {
        tokio::pin!(merge);
        let mut seen = progress();
        loop {
            tokio::select! {
                biased;
                done = &mut merge => return Followed::Done(done),
                () = cancel.cancelled() => break,
                // What QEMU does goes on; the next agent takes it up.
                () = self.stopping.cancelled() => return Followed::Left,
                () = tokio::time::sleep(STALLED) => {
                    let now = progress();
                    if now == seen {
                        break;
                    }
                    seen = now;
                }
            }
        }
        stop();
        match tokio::time::timeout(self.config.times.ask, &mut merge).await {
            Ok(done) => Followed::Done(done),
            Err(_) => Followed::Left,
        }
    }
}

/// How a merge was left.
enum Followed<T> {
    Done(T),
    /// It did not end in time, or the agent ends.
    Left,
}

/// The layers below one that can be merged into it, the uppermost first.
fn row(child: Uuid, candidates: &[Merge]) -> Vec<Uuid> {
    let mut row = Vec::new();
    let mut above = child;
    while let Some(merge) = candidates.iter().find(|merge| merge.into_child == above) {
        row.push(merge.layer);
        above = merge.layer;
    }
    row
}

/// The volumes that stand on a layer.
fn standing(child: Uuid, chains: &Chains) -> impl Iterator<Item = VolumeId> {
    chains.iter().filter(move |(_, layers)| stands_on(layers, child)).map(|(volume, _)| *volume)
}

fn stands_on(layers: &[Layer], child: Uuid) -> bool {
    layers.iter().any(|layer| layer.id() == Some(child))
}

fn unnamed(layer: &Layer) -> Fault {
    fault::fault(
        "machine_invalid",
        format!("{} has no name that QEMU could know it by", layer.path.display()),
    )
}

/// Said once; after that it is only tried again.
fn failed(failures: &mut HashMap<Uuid, Failure>, child: Uuid, fault: &Fault) {
    let pause = match failures.get(&child) {
        None => {
            tracing::warn!(into = %child, code = fault.code, reason = fault.message, "layers are not merged");
            RETRY.0
        }
        Some(failure) => {
            tracing::debug!(into = %child, reason = fault.message, "layers are still not merged");
            (failure.pause * 2).min(RETRY.1)
        }
    };
    failures.insert(child, Failure { at: Instant::now() + jitter(pause), pause });
}
