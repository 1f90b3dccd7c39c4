//! Nodes that fall silent: their lease runs out, they become unreachable, and what is on them unknown.

use std::collections::HashSet;
use std::sync::Arc;

use futures::StreamExt;
use ostler_api::event::Severity;
use ostler_api::node::{Node, NodePhase};
use ostler_api::vm::Vm;
use ostler_api::vm_phase::vm_phase;
use ostler_api::{ApiError, Fault, Name, Time};
use ostler_store::{ListQuery, Watch, WatchEvent};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{RETRY, Term, pause};
use crate::cloud::Cloud;
use crate::commit::store_error;
use crate::event::target;
use crate::keys;

/// VMs changed in one transaction.
const CHUNK: usize = 64;

pub(super) async fn run(cloud: Arc<Cloud>, term: Term, stop: CancellationToken) {
    while !stop.is_cancelled() {
        match begin(&cloud, term).await {
            Ok(watch) => follow(&cloud, term, watch, &stop).await,
            Err(error) => {
                tracing::warn!(%error, internal = error.internal, "cannot look after the nodes; trying again");
                pause(&stop, RETRY).await;
            }
        }
    }
}

/// Compares all nodes with the leases that exist. A node that was ready when nobody looked gets a lease's time to speak.
async fn begin(cloud: &Cloud, term: Term) -> Result<Watch, ApiError> {
    let page = cloud.store.list(ListQuery::prefix(keys::LIVE)).await.map_err(store_error)?;
    let watch = cloud.store.watch(keys::LIVE, page.revision.next()).await.map_err(store_error)?;
    let alive: HashSet<&str> = page.items.iter().filter_map(|kv| kv.key.strip_prefix(keys::LIVE)).collect();
    let nodes: Vec<Arc<Node>> = cloud.cache.read().nodes.iter().cloned().collect();
    for node in nodes {
        let name = &node.metadata.name;
        match (node.status.phase, alive.contains(name.as_str())) {
            (NodePhase::Ready | NodePhase::Joining, false) => cloud.node_alive(name).await?,
            (NodePhase::Unreachable, _) => mark_vms(cloud, term, name, true).await?,
            (NodePhase::Ready | NodePhase::Joining, true) => mark_vms(cloud, term, name, false).await?,
        }
    }
    Ok(watch)
}

async fn follow(cloud: &Cloud, term: Term, mut watch: Watch, stop: &CancellationToken) {
    let mut nodes = cloud.cache.read().nodes.subscribe();
    loop {
        let step = tokio::select! {
            () = stop.cancelled() => return,
            batch = watch.next() => match batch {
                None | Some(Err(_)) => return,
                Some(Ok(batch)) => lost(cloud, term, &batch.events).await,
            },
            change = nodes.recv() => match change {
                Err(_) => return,
                Ok(change) => match change.new {
                    Some(node) if node.status.phase == NodePhase::Ready
                        && change.old.is_some_and(|old| old.status.phase != NodePhase::Ready) =>
                    {
                        mark_vms(cloud, term, &node.metadata.name, false).await
                    }
                    Some(_) | None => Ok(()),
                },
            },
        };
        if let Err(error) = step {
            tracing::warn!(%error, internal = error.internal, "a node's state could not be written; looking again");
            pause(stop, RETRY).await;
            return;
        }
    }
}

async fn lost(cloud: &Cloud, term: Term, events: &[WatchEvent]) -> Result<(), ApiError> {
    for event in events {
        let WatchEvent::Delete { key, .. } = event else { continue };
        let Some(name) = key.strip_prefix(keys::LIVE).and_then(|name| Name::new(name).ok()) else { continue };
        cloud
            .commit(|tables, change| {
                let Some(old) = tables.nodes.named(None, &name) else { return Ok(()) };
                if old.status.phase == NodePhase::Unreachable {
                    return Ok(());
                }
                term.fence(change);
                let mut new = Node::clone(old);
                let message = format!(
                    "no heartbeat for {} s; look at the host, its network and its ostler process",
                    cloud.config.node_lease.as_secs()
                );
                new.status.phase = NodePhase::Unreachable;
                new.status.since = Time::now();
                new.status.reason = Some(Fault::new("no_heartbeat", message.clone()));
                change.update(old.as_ref(), &new)?;
                let message = format!("node {name} is unreachable: {message}");
                change.event(None, Severity::Error, "node.unreachable", target(old.as_ref()), message)
            })
            .await?;
        mark_vms(cloud, term, &name, true).await?;
    }
    Ok(())
}

/// Marks what is placed on a node as unknown, or as known again.
async fn mark_vms(cloud: &Cloud, term: Term, node: &Name, silent: bool) -> Result<(), ApiError> {
    let wrong = |vm: &Vm| vm.status.node_silent != silent;
    let ids: Vec<Uuid> = {
        let tables = cloud.cache.read();
        let placed = tables.on_node.get(node).map(|on_node| on_node.vms.clone()).unwrap_or_default();
        placed.into_iter().filter(|id| tables.vms.get(*id).is_some_and(|vm| wrong(vm))).collect()
    };
    for chunk in ids.chunks(CHUNK) {
        cloud
            .commit(|tables, change| {
                let stale = chunk.iter().filter_map(|id| tables.vms.get(*id)).filter(|vm| wrong(vm));
                for (index, old) in stale.enumerate() {
                    if index == 0 {
                        term.fence(change);
                    }
                    let mut new = Vm::clone(old);
                    new.status.node_silent = silent;
                    new.status.phase = vm_phase(&new.status);
                    change.update(old.as_ref(), &new)?;
                }
                Ok(())
            })
            .await?;
    }
    Ok(())
}
