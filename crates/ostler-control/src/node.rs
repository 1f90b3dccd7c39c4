//! Nodes: registration, heartbeats and their leases.
//!
//! A node lives as long as the leased key `live/NODE` exists. Heartbeats renew the lease, which writes nothing; when it
//! runs out the store deletes the key, and the nodes' controller sees that.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use ostler_api::event::Severity;
use ostler_api::metadata::labels_check;
use ostler_api::node::{Allocation, Node, NodePatch, NodePhase, NodeRegister, NodeSpec, NodeStatus};
use ostler_api::work::Heartbeat;
use ostler_api::{ApiError, ErrorCode, Kind, Metadata, Name, Time};
use ostler_store::{LeaseId, StoreError, Txn, TxnOutcome};
use parking_lot::Mutex;

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::{Change, store_error};
use crate::event::target;
use crate::keys;
use crate::permission::{Owner, Verb};
use crate::snapshot::remove_snapshot;
use crate::vm_act::check_match;

/// Volumes of a dead node forgotten in one transaction.
const VOLUMES_AT_ONCE: usize = 32;

/// The leases of the nodes that speak with this server. Only a short cut: the truth is in the store.
#[derive(Debug, Default)]
pub(crate) struct Leases(Mutex<HashMap<Name, LeaseId>>);

fn node_name(text: &str) -> Result<Name, ApiError> {
    Name::new(text)
        .map_err(|error| ApiError::invalid("node", format!("the node's name is not valid: {error}")))
}

impl Cloud {
    /// Called by the agent when it starts and when its facts change.
    pub async fn node_register(
        &self,
        caller: &Caller,
        node: &str,
        request: NodeRegister,
    ) -> Result<Arc<Node>, ApiError> {
        caller.may(Verb::Serve, Kind::Node, Owner::Node(node), node)?;
        let name = node_name(node)?;
        labels_check(&request.labels).map_err(|error| ApiError::invalid("labels", error))?;
        self.node_alive(&name).await?;
        self.commit(|tables, change| {
            let Some(old) = tables.nodes.named(None, &name) else {
                let mut metadata = Metadata::new(request.id.into(), name.clone(), None);
                metadata.labels = request.labels.clone();
                let node = Node {
                    metadata,
                    spec: NodeSpec { schedulable: true },
                    status: NodeStatus {
                        phase: NodePhase::Ready,
                        reason: None,
                        since: Time::now(),
                        facts: Some(request.facts.clone()),
                        allocated: Allocation::default(),
                    },
                };
                change.create(&node)?;
                let message = format!("node {name} joined");
                return change.event(None, Severity::Info, "node.joined", target(&node), message);
            };
            if old.metadata.id != request.id.0 {
                return Err(ApiError::conflict(format!(
                    "there is another node named {name}: it has id {}, this one {}",
                    old.metadata.id, request.id
                ))
                .hint("give this node another name, or delete the old one: ostler node delete"));
            }
            let mut new = Node::clone(old);
            for (key, value) in &request.labels {
                new.metadata.labels.insert(key.clone(), value.clone());
            }
            new.status.facts = Some(request.facts.clone());
            back(&mut new);
            if new != **old {
                change.update(old.as_ref(), &new)?;
            }
            Ok(())
        })
        .await?;
        let tables = self.cache.read();
        tables.nodes.named(None, &name).cloned().ok_or_else(|| ApiError::not_found(Kind::Node, node))
    }

    /// Says that the node's agent lives. Cheap: it renews a lease and writes nothing.
    pub async fn node_heartbeat(&self, caller: &Caller, node: &str) -> Result<Heartbeat, ApiError> {
        caller.may(Verb::Serve, Kind::Node, Owner::Node(node), node)?;
        let name = node_name(node)?;
        let known = self.cache.read().nodes.named(None, &name).map(|node| node.status.phase);
        let Some(phase) = known else { return Err(ApiError::not_found(Kind::Node, node)) };
        self.node_alive(&name).await?;
        if phase == NodePhase::Unreachable {
            self.node_back(&name).await?;
        }
        Ok(Heartbeat {
            lease_secs: u32::try_from(self.config.node_lease.as_secs()).unwrap_or(u32::MAX).max(1),
        })
    }

    /// Renews the node's lease, or makes one.
    pub(crate) async fn node_alive(&self, name: &Name) -> Result<(), ApiError> {
        let known = self.leases.0.lock().get(name).copied();
        if let Some(lease) = known {
            match self.store.lease_keep_alive(lease).await {
                Ok(()) => return Ok(()),
                Err(StoreError::LeaseNotFound { .. }) => {}
                Err(error) => return Err(store_error(error)),
            }
        }
        let key = keys::live(name.as_str());
        loop {
            let found = self.store.get(&key, None).await.map_err(store_error)?;
            if let Some(lease) = found.as_ref().and_then(|kv| kv.lease) {
                match self.store.lease_keep_alive(lease).await {
                    Ok(()) => {
                        self.leases.0.lock().insert(name.clone(), lease);
                        return Ok(());
                    }
                    Err(StoreError::LeaseNotFound { .. }) => {}
                    Err(error) => return Err(store_error(error)),
                }
            }
            let lease = self.store.lease_grant(self.config.node_lease).await.map_err(store_error)?;
            let txn = match &found {
                Some(kv) => Txn::new().modified(key.clone(), kv.modified),
                None => Txn::new().absent(key.clone()),
            };
            match self
                .store
                .txn(txn.put_leased(key.clone(), Bytes::new(), lease))
                .await
                .map_err(store_error)?
            {
                TxnOutcome::Committed { .. } => {
                    self.leases.0.lock().insert(name.clone(), lease);
                    return Ok(());
                }
                TxnOutcome::Conflict { .. } => {
                    // Another server was quicker; its lease serves as well.
                    let _ = self.store.lease_revoke(lease).await;
                }
            }
        }
    }

    async fn node_back(&self, name: &Name) -> Result<(), ApiError> {
        self.commit(|tables, change| {
            let Some(old) = tables.nodes.named(None, name) else { return Ok(()) };
            let mut new = Node::clone(old);
            back(&mut new);
            if new == **old {
                return Ok(());
            }
            change.update(old.as_ref(), &new)?;
            let message = format!("node {name} reports again");
            change.event(None, Severity::Info, "node.ready", target(&new), message)
        })
        .await
    }

    pub async fn node_patch(
        &self,
        caller: &Caller,
        node: &str,
        if_match: Option<u64>,
        patch: NodePatch,
    ) -> Result<Arc<Node>, ApiError> {
        if let Some(labels) = &patch.labels {
            labels_check(labels).map_err(|error| ApiError::invalid("labels", error))?;
        }
        self.commit(|tables, change| {
            let old = self.find::<Node>(tables, caller, Verb::Update, None, node)?;
            check_match(old.metadata.revision, if_match)?;
            let mut new = Node::clone(&old);
            if let Some(labels) = &patch.labels {
                new.metadata.labels.clone_from(labels);
            }
            if let Some(schedulable) = patch.schedulable {
                new.spec.schedulable = schedulable;
            }
            if new != *old {
                change.update(old.as_ref(), &new)?;
            }
            Ok(())
        })
        .await?;
        self.get::<Node>(caller, None, node)
    }

    /// Forgets a node that reports no longer and has nothing placed on it but what is being deleted: that goes with it.
    pub async fn node_delete(
        &self,
        caller: &Caller,
        node: &str,
        if_match: Option<u64>,
    ) -> Result<(), ApiError> {
        while !self
            .commit(|tables, change| self.plan_node_delete(tables, change, caller, node, if_match))
            .await?
        {}
        Ok(())
    }

    /// One step: some of the volumes that wait for their deletion, or at last the node. True when it is done.
    fn plan_node_delete(
        &self,
        tables: &Tables,
        change: &mut Change,
        caller: &Caller,
        node: &str,
        if_match: Option<u64>,
    ) -> Result<bool, ApiError> {
        let old = self.find::<Node>(tables, caller, Verb::Delete, None, node)?;
        check_match(old.metadata.revision, if_match)?;
        if old.status.phase != NodePhase::Unreachable {
            return Err(ApiError::conflict(format!("node {node} is {}", old.status.phase))
                .hint("stop its agent first; a node is deleted once it is unreachable"));
        }
        if let Some(on_node) = tables.on_node.get(&old.metadata.name) {
            let volumes = || on_node.volumes.iter().filter_map(|id| tables.volumes.get(*id));
            let kept = volumes().filter(|volume| volume.metadata.deleted.is_none()).count();
            let snapshots = || on_node.snapshots.iter().filter_map(|id| tables.snapshots.get(*id));
            let held = snapshots().filter(|snapshot| snapshot.metadata.deleted.is_none()).count();
            if !on_node.vms.is_empty() || kept > 0 || held > 0 {
                return Err(ApiError::new(
                    ErrorCode::InUse,
                    format!(
                        "{} VMs, {kept} volumes and {held} snapshots are placed on node {node}",
                        on_node.vms.len()
                    ),
                )
                .hint(format!("see which: ostler vm list --node {node}; delete them with --force")));
            }
            // One at a time: each touches its neighbours in the tree.
            if let Some(snapshot) = snapshots().next() {
                change.guard(old.as_ref());
                remove_snapshot(tables, change, snapshot)?;
                return Ok(false);
            }
            let doomed: Vec<_> = volumes().take(VOLUMES_AT_ONCE).collect();
            if !doomed.is_empty() {
                change.guard(old.as_ref());
                for volume in doomed {
                    change.delete(volume.as_ref());
                }
                return Ok(false);
            }
        }
        change.delete(old.as_ref());
        let message = format!("node {node} was deleted");
        change.event(None, Severity::Info, "node.deleted", target(old.as_ref()), message)?;
        Ok(true)
    }
}

/// A node that speaks is ready.
fn back(node: &mut Node) {
    if node.status.phase != NodePhase::Ready {
        node.status.phase = NodePhase::Ready;
        node.status.reason = None;
        node.status.since = Time::now();
    }
}
