//! Deadlines: no VM and no snapshot stays in an `-ing` phase for ever.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::event::Severity;
use ostler_api::vm::Vm;
use ostler_api::vm_action::VmAction;
use ostler_api::vm_phase::vm_phase;
use ostler_api::{ApiError, Fault, Time};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{RETRY, Term, pause};
use crate::cache::Tables;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::event::target;
use crate::operation::{Step, advance};
use crate::snapshot_report;
use crate::vm_act::{drop_rebuild_volume, remove};

/// Longest sleep: a clock that was set must not make deadlines pass unseen.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

pub(super) async fn run(cloud: Arc<Cloud>, term: Term, stop: CancellationToken) {
    let mut applied = cloud.cache.applied();
    while !stop.is_cancelled() {
        applied.borrow_and_update();
        let first = cloud.cache.read().deadlines.first().copied();
        let now = Time::now();
        match first {
            Some((deadline, id)) if deadline <= now => {
                cloud.metrics.deadline_passed();
                if let Err(error) = cloud.commit(|tables, change| expire(tables, change, term, id)).await {
                    tracing::warn!(%id, %error, internal = error.internal, "a deadline could not be written");
                    pause(&stop, RETRY).await;
                }
            }
            next => {
                let sleep = next.map_or(LOOK_AGAIN, |(deadline, _)| deadline.since(now).min(LOOK_AGAIN));
                // A new task cannot be due before its own deadline, which is longer than this sleep can be wrong.
                pause(&stop, sleep.max(Duration::from_millis(20))).await;
            }
        }
    }
}

fn expire(tables: &Tables, change: &mut Change, term: Term, id: Uuid) -> Result<(), ApiError> {
    if let Some(snapshot) = tables.snapshots.get(id) {
        if snapshot.status.deadline.is_some_and(|deadline| deadline <= Time::now()) {
            term.fence(change);
            return snapshot_report::expire(tables, change, snapshot);
        }
        return Ok(());
    }
    let Some(old) = tables.vms.get(id) else { return Ok(()) };
    let Some(task) = old.status.task.as_ref().filter(|task| task.deadline <= Time::now()) else {
        return Ok(());
    };
    term.fence(change);
    let node = old.status.node.as_ref().map_or("no node", |node| node.as_str());
    let name = task.action.name();
    let mut new = Vm::clone(old);
    if task.action == VmAction::Delete {
        if old.status.node_silent {
            // Deleting works also when the host is gone; its volumes stay listed until it is back or deleted.
            advance(tables, change, task.operation, Step::Succeeded)?;
            return remove(tables, change, old);
        }
        let again = crate::vm_create::task(task.operation, VmAction::Delete, Time::now());
        new.status.reason = new.status.reason.or_else(|| {
            Some(Fault::new(
                "slow_delete",
                format!("node {node} has not finished deleting it; it goes on trying"),
            ))
        });
        new.status.task = Some(again);
        return change.update(old.as_ref(), &new);
    }
    let fault = match (&old.status.node, &old.status.reason) {
        // It never got a place: the reason for that is the better one.
        (None, Some(reason)) => reason.clone(),
        _ => Fault::new(
            "deadline_passed",
            format!(
                "{name} was not finished by node {node} in time; see ostler node show {node}, then try again"
            ),
        ),
    };
    drop_rebuild_volume(tables, change, old)?;
    advance(tables, change, task.operation, Step::Failed(fault.clone()))?;
    change.event(
        old.metadata.project.clone(),
        Severity::Error,
        "vm.deadline_passed",
        target(old.as_ref()),
        format!("{name} of VM {} failed: {}", old.metadata.name, fault.message),
    )?;
    new.status.task = None;
    new.status.reason = Some(fault);
    new.status.phase = vm_phase(&new.status);
    change.update(old.as_ref(), &new)
}
