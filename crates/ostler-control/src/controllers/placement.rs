//! Places VMs: reads what waits, asks the scheduler, writes the place of the VM and its volumes in one transaction each.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use ostler_api::event::Severity;
use ostler_api::vm::Vm;
use ostler_api::vm_phase::vm_phase;
use ostler_api::volume::{Volume, VolumePhase};
use ostler_api::{ApiError, ByteSize, Fault, Name};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::Term;
use crate::cache::Tables;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::event::target;
use crate::operation::{Step, advance};
use crate::scheduler::{Candidate, Need, NoPlace, place};

/// Decisions before the writes; the writes of one batch share commits.
const BATCH: usize = 128;
/// How often VMs that found no place are looked at again when nothing changes.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

pub(super) async fn run(cloud: Arc<Cloud>, term: Term, stop: CancellationToken) {
    let mut applied = cloud.cache.applied();
    loop {
        applied.borrow_and_update();
        let waiting: Vec<Uuid> = cloud.cache.read().unplaced.iter().copied().collect();
        let mut placed = 0;
        for batch in waiting.chunks(BATCH) {
            if stop.is_cancelled() {
                return;
            }
            placed += round(&cloud, term, batch).await;
        }
        if placed > 0 {
            continue;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = applied.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK_AGAIN) => {}
        }
    }
}

/// Decides for a batch and writes the decisions. Returns how many were placed.
async fn round(cloud: &Cloud, term: Term, batch: &[Uuid]) -> usize {
    let started = Instant::now();
    let decisions = decide(cloud, batch);
    let count = decisions.len() as u64;
    cloud.metrics.placed(count, started.elapsed());
    let mut writes: FuturesUnordered<_> = decisions
        .into_iter()
        .map(|(id, decision)| async move {
            let placed = decision.is_ok();
            let written = match decision {
                Ok(node) => write(cloud, term, id, &node).await,
                Err(why) => refuse(cloud, term, id, &why).await,
            };
            match written {
                Ok(()) => usize::from(placed),
                Err(error) => {
                    tracing::warn!(vm = %id, %error, internal = error.internal, "a placement could not be written");
                    0
                }
            }
        })
        .collect();
    let mut placed = 0;
    while let Some(one) = writes.next().await {
        placed += one;
    }
    placed
}

fn decide(cloud: &Cloud, batch: &[Uuid]) -> Vec<(Uuid, Result<Name, NoPlace>)> {
    let tables = cloud.cache.read();
    let mut candidates: Vec<Candidate> = tables
        .nodes
        .iter()
        .map(|node| {
            let used = tables.on_node.get(&node.metadata.name).map(|on| on.allocation).unwrap_or_default();
            Candidate::new(node, used)
        })
        .collect();
    batch
        .iter()
        .filter(|id| tables.unplaced.contains(id))
        .filter_map(|id| tables.vms.get(*id))
        .map(|vm| {
            let need = need(&tables, vm);
            let decision = place(&need, &candidates, &cloud.config.scheduler).map(|index| {
                candidates[index].take(&need);
                candidates[index].name.clone()
            });
            (vm.metadata.id, decision)
        })
        .collect()
}

fn need(tables: &Tables, vm: &Vm) -> Need {
    let disk = vm.spec.disks.iter().filter_map(|disk| tables.volumes.get(disk.volume.into()));
    // What a node holds already is in its account.
    let disk = disk.filter(|volume| volume.status.node.is_none());
    Need {
        cpus: vm.spec.cpus,
        memory: vm.spec.memory,
        disk: ByteSize(disk.map(|volume| volume.spec.size.0).sum()),
        accelerator: vm.spec.accelerator,
        selector: vm.spec.node_selector.clone(),
        // Disks that are somewhere already decide.
        node: bound(tables, vm).or_else(|| vm.spec.node.clone()),
    }
}

/// The node that holds one of its disks, or what a disk is copied from.
fn bound(tables: &Tables, vm: &Vm) -> Option<Name> {
    vm.spec.disks.iter().filter_map(|disk| tables.volumes.get(disk.volume.into())).find_map(|volume| {
        let from = volume.spec.snapshot.as_ref().and_then(|from| tables.snapshots.get(from.snapshot.into()));
        volume.status.node.clone().or_else(|| from?.status.node.clone())
    })
}

async fn write(cloud: &Cloud, term: Term, id: Uuid, node: &Name) -> Result<(), ApiError> {
    cloud
        .commit(|tables, change| {
            let Some(old) = tables.vms.get(id).filter(|_| tables.unplaced.contains(&id)) else {
                return Ok(());
            };
            term.fence(change);
            let mut new = Vm::clone(old);
            new.status.node = Some(node.clone());
            new.status.reason = None;
            new.status.phase = vm_phase(&new.status);
            change.update(old.as_ref(), &new)?;
            for disk in &old.spec.disks {
                let Some(old) = tables.volumes.get(disk.volume.into()) else { continue };
                if old.status.node.is_none() {
                    let mut new = Volume::clone(old);
                    new.status.node = Some(node.clone());
                    new.status.phase = VolumePhase::Creating;
                    change.update(old.as_ref(), &new)?;
                }
            }
            Ok(())
        })
        .await
}

/// Says why there is no place; gives up at once when waiting cannot help.
async fn refuse(cloud: &Cloud, term: Term, id: Uuid, why: &NoPlace) -> Result<(), ApiError> {
    cloud.metrics.unplaceable();
    cloud.commit(|tables, change| plan_refusal(tables, change, term, id, why)).await
}

fn plan_refusal(
    tables: &Tables,
    change: &mut Change,
    term: Term,
    id: Uuid,
    why: &NoPlace,
) -> Result<(), ApiError> {
    let Some(old) = tables.vms.get(id).filter(|_| tables.unplaced.contains(&id)) else { return Ok(()) };
    let message = why.message();
    let known = old.status.reason.as_ref().is_some_and(|reason| reason.message == message);
    if known && !why.hopeless {
        return Ok(());
    }
    term.fence(change);
    let mut new = Vm::clone(old);
    let fault = Fault::new("no_node_fits", message.clone());
    new.status.reason = Some(fault.clone());
    if why.hopeless {
        if let Some(task) = new.status.task.take() {
            advance(tables, change, task.operation, Step::Failed(fault))?;
        }
        change.event(
            old.metadata.project.clone(),
            Severity::Error,
            "vm.no_place",
            target(old.as_ref()),
            format!("VM {} cannot be placed: {message}", old.metadata.name),
        )?;
    }
    new.status.phase = vm_phase(&new.status);
    change.update(old.as_ref(), &new)
}
