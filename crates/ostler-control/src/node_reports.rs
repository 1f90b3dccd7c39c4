//! What a node's agent says, written down: one transaction for many reports.

use std::collections::HashSet;

use ostler_api::operation::OperationPhase;
use ostler_api::volume::{Volume, VolumePhase};
use ostler_api::work::{Report, Reports, ReportsTaken, VmReport, VolumeReport, VolumeState};
use ostler_api::{ApiError, Kind, Time, VolumeId};

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::event::target;
use crate::operation::{Step, advance, begin};
use crate::permission::{Owner, Verb};
use crate::snapshot_report::snapshot_report;
use crate::vm_act::{drop_volume, end_delete, swap_root};
use crate::vm_disk::{release, unplug};
use crate::vm_report;
use crate::volume_flatten::{Word, heard};

/// Reports in one transaction: a store has limits on operations in one (etcd: 128).
const CHUNK: usize = 24;
/// Reports in one request.
const REPORTS_MAX: usize = 1024;

impl Cloud {
    /// Takes reports about what is placed on this node; what is not, is dropped and counted.
    pub async fn node_reports(
        &self,
        caller: &Caller,
        node: &str,
        reports: Reports,
    ) -> Result<ReportsTaken, ApiError> {
        caller.may(Verb::Serve, Kind::Node, Owner::Node(node), node)?;
        if reports.reports.len() > REPORTS_MAX {
            return Err(ApiError::invalid("reports", format!("at most {REPORTS_MAX} reports at once")));
        }
        let mut taken = ReportsTaken { taken: 0, dropped: 0 };
        let (mut vms, mut volumes, mut snapshots) = (Vec::new(), Vec::new(), Vec::new());
        for report in reports.reports {
            match report {
                Report::Vm(report) => vms.push(*report),
                Report::Volume(report) => volumes.push(report),
                Report::Snapshot(report) => snapshots.push(report),
            }
        }
        let gone: HashSet<VolumeId> = volumes
            .iter()
            .filter(|report| report.state == VolumeState::Gone)
            .map(|report| report.volume)
            .collect();
        let owners = self.deleted_owners(&gone);
        // A volume's file has to be known before the VM that runs on it; and no key may be written twice in one
        // transaction, which a VM's end and a report on its volume would do.
        for chunk in distinct(volumes, |report| report.volume.0) {
            self.take(&mut taken, node, &chunk, volume_report).await?;
        }
        for vm in owners {
            self.commit(|tables, change| match tables.vms.get(vm) {
                Some(vm) if vm.metadata.deleted.is_some() => end_delete(tables, change, vm, vm),
                Some(_) | None => Ok(()),
            })
            .await?;
        }
        // Each touches the volumes it is of and its neighbours in the tree: one transaction each.
        for report in snapshots {
            self.take(&mut taken, node, &[report], snapshot_report).await?;
        }
        for chunk in distinct(vms, |report| report.vm.0) {
            self.take(&mut taken, node, &chunk, vm_reported).await?;
        }
        Ok(taken)
    }

    /// The VMs that are being deleted and wait for these volumes.
    fn deleted_owners(&self, volumes: &HashSet<VolumeId>) -> HashSet<uuid::Uuid> {
        let tables = self.cache.read();
        let owners = volumes.iter().filter_map(|id| tables.volumes.get((*id).into())?.spec.vm);
        owners
            .map(uuid::Uuid::from)
            .filter(|vm| tables.vms.get(*vm).is_some_and(|vm| vm.metadata.deleted.is_some()))
            .collect()
    }

    async fn take<R>(
        &self,
        taken: &mut ReportsTaken,
        node: &str,
        reports: &[R],
        plan: fn(&Tables, &mut Change, &str, &R) -> Result<bool, ApiError>,
    ) -> Result<(), ApiError> {
        let (good, bad) = self
            .commit(|tables, change| {
                let mut counts = (0, 0);
                for report in reports {
                    if plan(tables, change, node, report)? {
                        counts.0 += 1;
                    } else {
                        counts.1 += 1;
                    }
                }
                Ok(counts)
            })
            .await?;
        taken.taken += good;
        taken.dropped += bad;
        Ok(())
    }
}

/// Chunks in which no resource comes twice, in order.
fn distinct<R>(reports: Vec<R>, id: fn(&R) -> uuid::Uuid) -> Vec<Vec<R>> {
    let mut chunks: Vec<Vec<R>> = Vec::new();
    let mut seen = HashSet::new();
    for report in reports {
        let fits = chunks.last().is_some_and(|chunk| chunk.len() < CHUNK) && !seen.contains(&id(&report));
        if !fits {
            chunks.push(Vec::new());
            seen.clear();
        }
        seen.insert(id(&report));
        if let Some(chunk) = chunks.last_mut() {
            chunk.push(report);
        }
    }
    chunks
}

fn vm_reported(
    tables: &Tables,
    change: &mut Change,
    node: &str,
    report: &VmReport,
) -> Result<bool, ApiError> {
    let Some(old) = tables.vms.get(report.vm.into()) else { return Ok(false) };
    if old.status.node.as_ref().is_none_or(|placed| placed != node) {
        return Ok(false);
    }
    let outcome = vm_report::apply(old, report, Time::now());
    if let Some((operation, step)) = outcome.operation {
        advance(tables, change, operation, step)?;
    }
    if let Some(volume) = outcome.dropped {
        drop_volume(tables, change, volume)?;
    }
    let project = old.metadata.project.clone();
    if let Some((severity, code, message)) = outcome.event {
        change.event(project.clone(), severity, code, target(old.as_ref()), message)?;
    }
    if let Some(id) = outcome.restart {
        change.create(&begin(id, project, "vm.start", target(old.as_ref()), OperationPhase::Pending)?)?;
    }
    let mut new = outcome.vm;
    if outcome.ended {
        end_delete(tables, change, old, &new)?;
        return Ok(true);
    }
    if let Some(volume) = outcome.rebuilt {
        swap_root(tables, change, &mut new, volume)?;
    }
    if let Some(volume) = outcome.released {
        unplug(&mut new, volume);
        release(tables, change, volume)?;
    }
    if new != **old {
        change.update(old.as_ref(), &new)?;
    }
    Ok(true)
}

fn volume_report(
    tables: &Tables,
    change: &mut Change,
    node: &str,
    report: &VolumeReport,
) -> Result<bool, ApiError> {
    let Some(old) = tables.volumes.get(report.volume.into()) else { return Ok(false) };
    if old.status.node.as_ref().is_none_or(|placed| placed != node) {
        return Ok(false);
    }
    let mut new = Volume::clone(old);
    match &report.state {
        VolumeState::Gone if old.metadata.deleted.is_some() => {
            change.delete(old.as_ref());
            finish(tables, change, old, &Step::Succeeded)?;
            return Ok(true);
        }
        // It should be there: the next look makes it again or says why not.
        VolumeState::Gone => return Ok(true),
        VolumeState::Ready { used, size } => {
            new.status.used = Some(*used);
            new.status.size = Some(*size);
            if old.metadata.deleted.is_none() {
                new.status.phase = VolumePhase::Ready;
                new.status.reason = None;
                if *size >= old.spec.size {
                    finish(tables, change, old, &Step::Succeeded)?;
                }
            }
        }
        VolumeState::Failed { fault } => {
            new.status.reason = Some(fault.clone());
            if old.metadata.deleted.is_none() {
                new.status.phase = VolumePhase::Error;
                finish(tables, change, old, &Step::Failed(fault.clone()))?;
            }
        }
        VolumeState::Flattening { operation, done } => {
            heard(tables, change, &mut new, *operation, &Word::Progress(*done))?;
        }
        VolumeState::Flattened { operation, used } => {
            heard(tables, change, &mut new, *operation, &Word::Done(*used))?;
        }
        VolumeState::NotFlattened { operation, fault } => {
            heard(tables, change, &mut new, *operation, &Word::Failed(fault))?;
        }
        // What was asked for is taken back: it stays as large as it is.
        VolumeState::NotGrown { size, fault } => {
            new.status.size = Some(*size);
            if old.metadata.deleted.is_none() && *size < old.spec.size {
                new.spec.size = *size;
                finish(tables, change, old, &Step::Failed(fault.clone()))?;
            }
        }
    }
    if new != **old {
        change.update(old.as_ref(), &new)?;
    }
    Ok(true)
}

/// Ends the operations on a volume. A flatten has words of its own.
fn finish(tables: &Tables, change: &mut Change, volume: &Volume, step: &Step) -> Result<(), ApiError> {
    let flatten = volume.status.flatten.filter(|_| volume.metadata.deleted.is_none());
    for operation in tables.open_on(volume.metadata.id).filter(|operation| Some(*operation) != flatten) {
        advance(tables, change, operation, step.clone())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_resource_twice_in_one_chunk_and_order_kept() {
        let ids: Vec<uuid::Uuid> = (0..3).map(|_| uuid::Uuid::now_v7()).collect();
        let given = vec![(ids[0], 1), (ids[1], 1), (ids[0], 2), (ids[2], 1), (ids[0], 3)];
        let chunks = distinct(given.clone(), |report| report.0);
        for chunk in &chunks {
            let unique: HashSet<_> = chunk.iter().map(|report| report.0).collect();
            assert_eq!(unique.len(), chunk.len());
        }
        assert_eq!(chunks.concat(), given);
    }
}
