//! What a node says of a snapshot, written down; and what becomes of one whose node says nothing.

use ostler_api::event::Severity;
use ostler_api::snapshot::{Snapshot, SnapshotPhase};
use ostler_api::volume::Volume;
use ostler_api::work::{SnapshotReport, SnapshotState};
use ostler_api::{ApiError, Fault, SnapshotId, Time};

use crate::cache::Tables;
use crate::commit::Change;
use crate::event::target;
use crate::operation::{Step, advance};
use crate::snapshot::{deadline, remove_snapshot};

/// Ends every operation on a snapshot that has not ended.
fn finish(tables: &Tables, change: &mut Change, snapshot: &Snapshot, step: &Step) -> Result<(), ApiError> {
    for operation in tables.open_on(snapshot.metadata.id) {
        advance(tables, change, operation, step.clone())?;
    }
    Ok(())
}

/// Writes a report down; false when it is about nothing that is on this node.
pub(crate) fn snapshot_report(
    tables: &Tables,
    change: &mut Change,
    node: &str,
    report: &SnapshotReport,
) -> Result<bool, ApiError> {
    let Some(old) = tables.snapshots.get(report.snapshot.into()) else { return Ok(false) };
    if old.status.node.as_ref().is_none_or(|placed| placed != node) {
        return Ok(false);
    }
    let deleting = old.metadata.deleted.is_some();
    let mut new = Snapshot::clone(old);
    match &report.state {
        SnapshotState::Gone if deleting => {
            finish(tables, change, old, &Step::Succeeded)?;
            remove_snapshot(tables, change, old)?;
            return Ok(true);
        }
        // It will be told again what is wanted.
        SnapshotState::Gone => return Ok(true),
        SnapshotState::Ready if deleting || old.status.taken.is_some() => return Ok(true),
        SnapshotState::Ready => {
            new.status.phase = SnapshotPhase::Ready;
            new.status.reason = None;
            new.status.taken = Some(Time::now());
            new.status.deadline = None;
            stand_on(tables, change, old, false)?;
            finish(tables, change, old, &Step::Succeeded)?;
        }
        SnapshotState::Failed { fault } if deleting => new.status.reason = Some(fault.clone()),
        SnapshotState::Failed { fault } => fail(tables, change, &mut new, fault)?,
        SnapshotState::Reverted { operation } if is_reverting(old, *operation) => {
            new.status.phase = SnapshotPhase::Ready;
            new.status.deadline = None;
            new.status.revert = None;
            stand_on(tables, change, old, true)?;
            finish(tables, change, old, &Step::Succeeded)?;
            change.event(
                old.metadata.project.clone(),
                Severity::Info,
                "snapshot.reverted",
                target(old.as_ref()),
                format!("the disks are back at snapshot {}", old.metadata.name),
            )?;
        }
        SnapshotState::NotReverted { operation, fault } if is_reverting(old, *operation) => {
            new.status.phase = SnapshotPhase::Ready;
            new.status.deadline = None;
            new.status.revert = None;
            finish(tables, change, old, &Step::Failed(fault.clone()))?;
        }
        SnapshotState::Reverted { .. } | SnapshotState::NotReverted { .. } => return Ok(true),
    }
    if new != **old {
        change.update(old.as_ref(), &new)?;
    }
    Ok(true)
}

fn is_reverting(snapshot: &Snapshot, operation: ostler_api::OperationId) -> bool {
    snapshot.status.revert.as_ref().is_some_and(|revert| revert.operation == operation)
}

/// The disks stand on this snapshot from now on; after a revert they are as large as it again.
fn stand_on(
    tables: &Tables,
    change: &mut Change,
    snapshot: &Snapshot,
    reverted: bool,
) -> Result<(), ApiError> {
    for disk in &snapshot.spec.disks {
        let Some(volume) = tables.volumes.get(disk.volume.into()) else { continue };
        let mut new = Volume::clone(volume);
        new.status.snapshot = Some(SnapshotId::from(snapshot.metadata.id));
        if reverted {
            new.spec.size = disk.size;
            new.status.size = Some(disk.size);
        }
        if new != **volume {
            change.update(volume.as_ref(), &new)?;
        }
    }
    Ok(())
}

fn fail(tables: &Tables, change: &mut Change, new: &mut Snapshot, fault: &Fault) -> Result<(), ApiError> {
    finish(tables, change, new, &Step::Failed(fault.clone()))?;
    change.event(
        new.metadata.project.clone(),
        Severity::Error,
        "snapshot.failed",
        target(new),
        format!("snapshot {} was not taken: {}", new.metadata.name, fault.message),
    )?;
    new.status.phase = SnapshotPhase::Error;
    new.status.reason = Some(fault.clone());
    new.status.deadline = None;
    Ok(())
}

/// The node has said nothing in time. A delete goes on; anything else has failed.
pub(crate) fn expire(tables: &Tables, change: &mut Change, old: &Snapshot) -> Result<(), ApiError> {
    let node = old.status.node.as_ref().map_or("no node", |node| node.as_str());
    let mut new = old.clone();
    new.status.deadline = None;
    let late = |what: &str| {
        Fault::new(
            "deadline_passed",
            format!("it was not {what} by node {node} in time; see ostler node show {node}, then try again"),
        )
    };
    match old.status.phase {
        SnapshotPhase::Creating => fail(tables, change, &mut new, &late("taken"))?,
        SnapshotPhase::Reverting => {
            new.status.phase = SnapshotPhase::Ready;
            new.status.revert = None;
            finish(tables, change, old, &Step::Failed(late("put back")))?;
        }
        SnapshotPhase::Deleting => {
            new.status.deadline = Some(deadline());
            new.status.reason = new.status.reason.or_else(|| {
                Some(Fault::new(
                    "slow_delete",
                    format!("node {node} has not finished deleting it; it goes on trying"),
                ))
            });
        }
        SnapshotPhase::Ready | SnapshotPhase::Error => {}
    }
    change.update(old, &new)
}
