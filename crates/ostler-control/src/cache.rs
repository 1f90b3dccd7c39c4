//! The state of the cloud in memory: typed, indexed, following the store's watch.
//!
//! One task applies batches in the order of their revisions; everybody else reads under a lock held for microseconds.
//! Whoever subscribes while it reads sees exactly what comes after what it read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use ostler_api::event::Event;
use ostler_api::image::Image;
use ostler_api::node::{Allocation, Node};
use ostler_api::operation::Operation;
use ostler_api::project::Project;
use ostler_api::snapshot::Snapshot;
use ostler_api::token::Token;
use ostler_api::vm::Vm;
use ostler_api::vm_action::VmAction;
use ostler_api::volume::Volume;
use ostler_api::{Kind, Name, OperationId, Resource, Time};
use ostler_store::{KeyValue, Revision, WatchBatch, WatchEvent};
use parking_lot::{RwLock, RwLockReadGuard};
use serde::Deserialize;
use tokio::sync::{broadcast, mpsc, watch};
use uuid::Uuid;

use crate::keys;

/// Changes that a watcher may lag behind before it has to list again.
const WATCH_BUFFER: usize = 4096;
/// The same for a node's work.
const NODE_BUFFER: usize = 4096;

/// One change of one resource.
#[derive(Debug, Clone)]
pub(crate) struct Change<T> {
    pub(crate) old: Option<Arc<T>>,
    pub(crate) new: Option<Arc<T>>,
}

/// The resources of one kind.
#[derive(Debug)]
pub struct Table<T> {
    by_id: BTreeMap<Uuid, Arc<T>>,
    by_name: HashMap<(Option<Name>, Name), Uuid>,
    changes: broadcast::Sender<Change<T>>,
}

impl<T: Resource> Default for Table<T> {
    fn default() -> Self {
        Self { by_id: BTreeMap::new(), by_name: HashMap::new(), changes: broadcast::channel(WATCH_BUFFER).0 }
    }
}

/// Whether a kind is found by name; operations and events are named by their ids.
const fn is_named(kind: Kind) -> bool {
    !matches!(kind, Kind::Operation | Kind::Event)
}

impl<T: Resource> Table<T> {
    pub(crate) fn get(&self, id: Uuid) -> Option<&Arc<T>> {
        self.by_id.get(&id)
    }

    pub(crate) fn named(&self, project: Option<&Name>, name: &Name) -> Option<&Arc<T>> {
        let id = self.by_name.get(&(project.cloned(), name.clone()))?;
        self.by_id.get(id)
    }

    /// In the order of their ids, which is the order of their making.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &Arc<T>> {
        self.by_id.values()
    }

    pub(crate) fn after(&self, id: Uuid) -> impl Iterator<Item = &Arc<T>> {
        use std::ops::Bound;
        self.by_id.range((Bound::Excluded(id), Bound::Unbounded)).map(|(_, object)| object)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Change<T>> {
        self.changes.subscribe()
    }

    fn name_of(object: &T) -> (Option<Name>, Name) {
        (object.metadata().project.clone(), object.metadata().name.clone())
    }

    fn set(&mut self, id: Uuid, new: Option<Arc<T>>) -> Option<Arc<T>> {
        let old = match &new {
            Some(new) => self.by_id.insert(id, Arc::clone(new)),
            None => self.by_id.remove(&id),
        };
        if is_named(T::KIND) {
            if let Some(old) = &old {
                let name = Self::name_of(old);
                if self.by_name.get(&name) == Some(&id) {
                    self.by_name.remove(&name);
                }
            }
            if let Some(new) = &new {
                self.by_name.insert(Self::name_of(new), id);
            }
        }
        old
    }
}

/// What is placed on a node.
#[derive(Debug, Default)]
pub(crate) struct OnNode {
    pub(crate) vms: BTreeSet<Uuid>,
    pub(crate) volumes: BTreeSet<Uuid>,
    pub(crate) snapshots: BTreeSet<Uuid>,
    pub(crate) allocation: Allocation,
}

/// What a node's work stream is told.
#[derive(Debug, Clone)]
pub(crate) enum NodeChange {
    Vm(Arc<Vm>),
    VmGone(Uuid),
    Volume(Arc<Volume>),
    VolumeGone(Uuid),
    Snapshot(Arc<Snapshot>),
    SnapshotGone(Uuid),
    ImageGone(String),
    Stream(ostler_api::work::StreamRequest),
}

/// All tables and indexes; seen through [`Cache::read`].
#[derive(Debug, Default)]
pub struct Tables {
    pub(crate) projects: Table<Project>,
    pub(crate) nodes: Table<Node>,
    pub(crate) images: Table<Image>,
    pub(crate) volumes: Table<Volume>,
    pub(crate) snapshots: Table<Snapshot>,
    pub(crate) vms: Table<Vm>,
    pub(crate) operations: Table<Operation>,
    pub(crate) events: Table<Event>,
    pub(crate) tokens: Table<Token>,
    pub(crate) token_hashes: HashMap<Uuid, String>,
    pub(crate) on_node: HashMap<Name, OnNode>,
    /// VMs that wait for a place.
    pub(crate) unplaced: BTreeSet<Uuid>,
    /// When the tasks of VMs and what is done with snapshots run out.
    pub(crate) deadlines: BTreeSet<(Time, Uuid)>,
    /// Operations that have not ended, by what they are about.
    open_operations: BTreeSet<(Uuid, Uuid)>,
    pub(crate) revision: Revision,
    node_watchers: HashMap<Name, mpsc::Sender<NodeChange>>,
}

/// A resource that the cache holds.
pub trait Cached: Resource {
    #[doc(hidden)]
    fn table(tables: &Tables) -> &Table<Self>;
    #[doc(hidden)]
    fn table_mut(tables: &mut Tables) -> &mut Table<Self>;
    /// Keeps the indexes over this kind.
    #[doc(hidden)]
    fn index(_tables: &mut Tables, _id: Uuid, _old: Option<&Arc<Self>>, _new: Option<&Arc<Self>>) {}
    /// What is worked out when it is read.
    #[doc(hidden)]
    fn present(_tables: &Tables, object: &Arc<Self>) -> Arc<Self> {
        Arc::clone(object)
    }
    /// Whether nothing is being done with it.
    #[doc(hidden)]
    fn is_settled(&self) -> bool {
        true
    }
}

macro_rules! cached {
    ($type:ty, $field:ident) => {
        fn table(tables: &Tables) -> &Table<Self> {
            &tables.$field
        }
        fn table_mut(tables: &mut Tables) -> &mut Table<Self> {
            &mut tables.$field
        }
    };
}

impl Cached for Project {
    cached!(Project, projects);
}

impl Cached for Node {
    cached!(Node, nodes);

    fn present(tables: &Tables, object: &Arc<Self>) -> Arc<Self> {
        let allocated =
            tables.on_node.get(&object.metadata.name).map(|on_node| on_node.allocation).unwrap_or_default();
        let mut node = Self::clone(object);
        node.status.allocated = allocated;
        Arc::new(node)
    }
}

impl Cached for Image {
    cached!(Image, images);

    fn index(tables: &mut Tables, _id: Uuid, old: Option<&Arc<Self>>, new: Option<&Arc<Self>>) {
        let (Some(data), None) = (old.and_then(|image| image.status.data.as_ref()), new) else { return };
        let shared = tables
            .images
            .iter()
            .any(|image| image.status.data.as_ref().is_some_and(|other| other.sha256 == data.sha256));
        if !shared {
            let nodes: Vec<Name> = tables.node_watchers.keys().cloned().collect();
            for node in nodes {
                tables.tell_node(&node, NodeChange::ImageGone(data.sha256.clone()));
            }
        }
    }

    fn is_settled(&self) -> bool {
        use ostler_api::image::ImagePhase;
        matches!(self.status.phase, ImagePhase::Active | ImagePhase::Error)
    }
}

impl Cached for Volume {
    cached!(Volume, volumes);

    fn index(tables: &mut Tables, id: Uuid, old: Option<&Arc<Self>>, new: Option<&Arc<Self>>) {
        if let Some(volume) = old
            && let Some(node) = &volume.status.node
            && let Some(on_node) = tables.on_node.get_mut(node)
        {
            on_node.volumes.remove(&id);
            on_node.allocation.disk.0 -= volume.spec.size.0;
        }
        if let Some(volume) = new
            && let Some(node) = &volume.status.node
        {
            let on_node = tables.on_node.entry(node.clone()).or_default();
            on_node.volumes.insert(id);
            on_node.allocation.disk.0 += volume.spec.size.0;
        }
        let same = |old: &Self, new: &Self| {
            old.status.node == new.status.node
                && old.metadata.deleted == new.metadata.deleted
                && old.spec == new.spec
                && old.status.phase == new.status.phase
                && old.status.flatten == new.status.flatten
        };
        let changed = match (old, new) {
            (Some(old), Some(new)) => !same(old, new),
            (None, Some(_)) | (Some(_), None) | (None, None) => true,
        };
        if changed {
            tables.tell_nodes(
                old.and_then(|volume| volume.status.node.as_ref()),
                new.and_then(|volume| volume.status.node.as_ref()),
                NodeChange::VolumeGone(id),
                new.map(|volume| NodeChange::Volume(Arc::clone(volume))),
            );
        }
    }

    fn is_settled(&self) -> bool {
        use ostler_api::volume::VolumePhase;
        matches!(self.status.phase, VolumePhase::Ready | VolumePhase::Error)
    }
}

impl Cached for Snapshot {
    cached!(Snapshot, snapshots);

    fn index(tables: &mut Tables, id: Uuid, old: Option<&Arc<Self>>, new: Option<&Arc<Self>>) {
        if let Some(snapshot) = old {
            if let Some(deadline) = snapshot.status.deadline {
                tables.deadlines.remove(&(deadline, id));
            }
            if let Some(node) = &snapshot.status.node
                && let Some(on_node) = tables.on_node.get_mut(node)
            {
                on_node.snapshots.remove(&id);
            }
        }
        if let Some(snapshot) = new {
            if let Some(deadline) = snapshot.status.deadline {
                tables.deadlines.insert((deadline, id));
            }
            if let Some(node) = &snapshot.status.node {
                tables.on_node.entry(node.clone()).or_default().snapshots.insert(id);
            }
        }
        let same = |old: &Self, new: &Self| {
            old.spec == new.spec
                && old.status.node == new.status.node
                && old.status.phase == new.status.phase
                && old.status.revert == new.status.revert
        };
        let changed = match (old, new) {
            (Some(old), Some(new)) => !same(old, new),
            (None, Some(_)) | (Some(_), None) | (None, None) => true,
        };
        if changed {
            tables.tell_nodes(
                old.and_then(|snapshot| snapshot.status.node.as_ref()),
                new.and_then(|snapshot| snapshot.status.node.as_ref()),
                NodeChange::SnapshotGone(id),
                new.map(|snapshot| NodeChange::Snapshot(Arc::clone(snapshot))),
            );
        }
    }

    fn is_settled(&self) -> bool {
        use ostler_api::snapshot::SnapshotPhase;
        matches!(self.status.phase, SnapshotPhase::Ready | SnapshotPhase::Error)
    }
}

impl Cached for Vm {
    cached!(Vm, vms);

    fn index(tables: &mut Tables, id: Uuid, old: Option<&Arc<Self>>, new: Option<&Arc<Self>>) {
        if let Some(vm) = old {
            if let Some(task) = &vm.status.task {
                tables.deadlines.remove(&(task.deadline, id));
            }
            if let Some(node) = &vm.status.node
                && let Some(on_node) = tables.on_node.get_mut(node)
            {
                on_node.vms.remove(&id);
                on_node.allocation.vms -= 1;
                on_node.allocation.cpus -= vm.spec.cpus;
                on_node.allocation.memory.0 -= vm.spec.memory.0;
            }
        }
        tables.unplaced.remove(&id);
        if let Some(vm) = new {
            if let Some(task) = &vm.status.task {
                tables.deadlines.insert((task.deadline, id));
                if vm.status.node.is_none() && task.action != VmAction::Delete {
                    tables.unplaced.insert(id);
                }
            }
            if let Some(node) = &vm.status.node {
                let on_node = tables.on_node.entry(node.clone()).or_default();
                on_node.vms.insert(id);
                on_node.allocation.vms += 1;
                on_node.allocation.cpus += vm.spec.cpus;
                on_node.allocation.memory.0 += vm.spec.memory.0;
            }
        }
        // The node need not hear its own reports again.
        let same = |old: &Self, new: &Self| {
            old.spec == new.spec
                && old.status.node == new.status.node
                && old.status.task == new.status.task
                && old.metadata.name == new.metadata.name
                && old.metadata.deleted == new.metadata.deleted
        };
        let changed = match (old, new) {
            (Some(old), Some(new)) => !same(old, new),
            (None, Some(_)) | (Some(_), None) | (None, None) => true,
        };
        if changed {
            tables.tell_nodes(
                old.and_then(|vm| vm.status.node.as_ref()),
                new.and_then(|vm| vm.status.node.as_ref()),
                NodeChange::VmGone(id),
                new.map(|vm| NodeChange::Vm(Arc::clone(vm))),
            );
        }
    }

    fn is_settled(&self) -> bool {
        self.status.task.is_none()
    }
}

impl Cached for Operation {
    cached!(Operation, operations);

    fn index(tables: &mut Tables, id: Uuid, old: Option<&Arc<Self>>, new: Option<&Arc<Self>>) {
        if let Some(old) = old {
            tables.open_operations.remove(&(old.spec.target.id, id));
        }
        if let Some(new) = new.filter(|new| !new.status.phase.is_final()) {
            tables.open_operations.insert((new.spec.target.id, id));
        }
    }

    fn is_settled(&self) -> bool {
        self.status.phase.is_final()
    }
}

impl Cached for Event {
    cached!(Event, events);
}

impl Cached for Token {
    cached!(Token, tokens);
}

/// The hash that is stored beside a token and leaves the control plane never.
#[derive(Deserialize)]
struct TokenHash {
    hash: String,
}

impl Tables {
    /// The operations on `target` that have not ended.
    pub(crate) fn open_on(&self, target: Uuid) -> impl Iterator<Item = OperationId> {
        self.open_operations.range((target, Uuid::nil())..=(target, Uuid::max())).map(|(_, id)| (*id).into())
    }

    fn tell_nodes(
        &mut self,
        old: Option<&Name>,
        new: Option<&Name>,
        gone: NodeChange,
        now: Option<NodeChange>,
    ) {
        if let Some(old) = old
            && (new != Some(old) || now.is_none())
        {
            self.tell_node(old, gone);
        }
        if let (Some(new), Some(now)) = (new, now) {
            self.tell_node(new, now);
        }
    }

    /// A node that does not keep up loses its stream, and starts over from the whole.
    pub(crate) fn tell_node(&mut self, node: &Name, change: NodeChange) -> bool {
        let Some(sender) = self.node_watchers.get(node) else { return false };
        let told = sender.try_send(change).is_ok();
        if !told {
            self.node_watchers.remove(node);
        }
        told
    }

    fn put(&mut self, kind: Kind, id: Uuid, kv: &KeyValue) -> Result<(), serde_json::Error> {
        match kind {
            Kind::Project => self.put_as::<Project>(id, kv),
            Kind::Node => self.put_as::<Node>(id, kv),
            Kind::Image => self.put_as::<Image>(id, kv),
            Kind::Volume => self.put_as::<Volume>(id, kv),
            Kind::Snapshot => self.put_as::<Snapshot>(id, kv),
            Kind::Vm => self.put_as::<Vm>(id, kv),
            Kind::Operation => self.put_as::<Operation>(id, kv),
            Kind::Event => self.put_as::<Event>(id, kv),
            Kind::Token => {
                let TokenHash { hash } = serde_json::from_slice(&kv.value)?;
                self.token_hashes.insert(id, hash);
                self.put_as::<Token>(id, kv)
            }
        }
    }

    fn put_as<T: Cached>(&mut self, id: Uuid, kv: &KeyValue) -> Result<(), serde_json::Error> {
        let mut object: T = serde_json::from_slice(&kv.value)?;
        object.metadata_mut().revision = kv.modified.0;
        self.set::<T>(id, Some(Arc::new(object)));
        Ok(())
    }

    fn delete(&mut self, kind: Kind, id: Uuid) {
        match kind {
            Kind::Project => self.set::<Project>(id, None),
            Kind::Node => self.set::<Node>(id, None),
            Kind::Image => self.set::<Image>(id, None),
            Kind::Volume => self.set::<Volume>(id, None),
            Kind::Snapshot => self.set::<Snapshot>(id, None),
            Kind::Vm => self.set::<Vm>(id, None),
            Kind::Operation => self.set::<Operation>(id, None),
            Kind::Event => self.set::<Event>(id, None),
            Kind::Token => {
                self.token_hashes.remove(&id);
                self.set::<Token>(id, None);
            }
        }
    }

    fn set<T: Cached>(&mut self, id: Uuid, new: Option<Arc<T>>) {
        let old = T::table_mut(self).set(id, new.clone());
        T::index(self, id, old.as_ref(), new.as_ref());
        // No receiver is no fault.
        let _ = T::table(self).changes.send(Change { old, new });
    }
}

/// The tables behind their lock, and how far they are.
#[derive(Debug)]
pub(crate) struct Cache {
    tables: RwLock<Tables>,
    applied: watch::Sender<Revision>,
}

impl Cache {
    /// Fills a cache with what the store held at `revision`.
    pub(crate) fn load(
        items: &[KeyValue],
        revision: Revision,
    ) -> Result<Self, (Arc<str>, serde_json::Error)> {
        let mut tables = Tables::default();
        for kv in items {
            if let Some((kind, id)) = keys::parse(&kv.key) {
                tables.put(kind, id, kv).map_err(|error| (Arc::clone(&kv.key), error))?;
            }
        }
        tables.revision = revision;
        Ok(Self { tables: RwLock::new(tables), applied: watch::channel(revision).0 })
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.tables.read()
    }

    pub(crate) fn apply(&self, batch: &WatchBatch) {
        let mut tables = self.tables.write();
        for event in &batch.events {
            match event {
                WatchEvent::Put { kv, .. } => {
                    if let Some((kind, id)) = keys::parse(&kv.key)
                        && let Err(error) = tables.put(kind, id, kv)
                    {
                        // Written by ourselves a moment ago: this is a bug, and the rest must go on.
                        tracing::error!(key = %kv.key, %error, "a resource in the store cannot be read");
                    }
                }
                WatchEvent::Delete { key, .. } => {
                    if let Some((kind, id)) = keys::parse(key) {
                        tables.delete(kind, id);
                    }
                }
            }
        }
        tables.revision = batch.revision;
        drop(tables);
        self.applied.send_replace(batch.revision);
    }

    /// Waits until everything up to `revision` is in the tables.
    pub(crate) async fn reached(&self, revision: Revision) {
        let mut applied = self.applied.subscribe();
        // The sender lives as long as we do.
        let _ = applied.wait_for(|at| *at >= revision).await;
    }

    pub(crate) fn applied(&self) -> watch::Receiver<Revision> {
        self.applied.subscribe()
    }

    /// Makes the one work stream of a node: `read` sees the tables at the moment from which changes are told.
    pub(crate) fn subscribe_node<R>(
        &self,
        node: &Name,
        read: impl FnOnce(&Tables) -> R,
    ) -> (R, mpsc::Receiver<NodeChange>) {
        let mut tables = self.tables.write();
        let (sender, receiver) = mpsc::channel(NODE_BUFFER);
        tables.node_watchers.insert(node.clone(), sender);
        (read(&tables), receiver)
    }

    pub(crate) fn tell_node(&self, node: &Name, change: NodeChange) -> bool {
        self.tables.write().tell_node(node, change)
    }
}
