//! What a node's agent is told: everything that is placed on it, then every change, over one stream.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use ostler_api::snapshot::Snapshot;
use ostler_api::vm::Vm;
use ostler_api::volume::Volume;
use ostler_api::work::WorkLine;
use ostler_api::{ApiError, Kind, Name};

use crate::cache::{NodeChange, Tables};
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::permission::{Owner, Verb};

/// How often a line is sent when there is nothing to say.
const BOOKMARK_EVERY: Duration = Duration::from_secs(5);

impl Cloud {
    /// The work of a node. A later stream of the same node takes the place of an earlier one.
    pub async fn node_work(
        self: &Arc<Self>,
        caller: &Caller,
        node: &str,
    ) -> Result<BoxStream<'static, WorkLine>, ApiError> {
        caller.may(Verb::Serve, Kind::Node, Owner::Node(node), node)?;
        let name = Name::new(node).map_err(|_| ApiError::not_found(Kind::Node, node))?;
        if self.cache.read().nodes.named(None, &name).is_none() {
            return Err(ApiError::not_found(Kind::Node, node).hint("register it first"));
        }
        let cloud = self.cloud_id();
        let (first, changes) = self.cache.subscribe_node(&name, |tables| snapshot(tables, &name, cloud));
        let weak = Arc::downgrade(self);
        let later = stream::unfold((changes, weak), |(mut changes, weak)| async move {
            match tokio::time::timeout(BOOKMARK_EVERY, changes.recv()).await {
                Ok(Some(change)) => Some((line(change), (changes, weak))),
                Ok(None) => None,
                Err(_) => {
                    let revision = weak.upgrade()?.revision();
                    Some((WorkLine::Bookmark { revision }, (changes, weak)))
                }
            }
        });
        Ok(stream::iter(first).chain(later).boxed())
    }
}

fn snapshot(tables: &Tables, node: &Name, cloud: uuid::Uuid) -> Vec<WorkLine> {
    let revision = tables.revision.0;
    let mut lines = vec![WorkLine::Hello { cloud, revision }];
    if let Some(on_node) = tables.on_node.get(node) {
        // Volumes first: VMs need them.
        let volumes = on_node.volumes.iter().filter_map(|id| tables.volumes.get(*id));
        lines.extend(volumes.map(|volume| WorkLine::Volume { volume: Box::new(Volume::clone(volume)) }));
        let snapshots = on_node.snapshots.iter().filter_map(|id| tables.snapshots.get(*id));
        lines.extend(
            snapshots.map(|snapshot| WorkLine::Snapshot { snapshot: Box::new(Snapshot::clone(snapshot)) }),
        );
        let vms = on_node.vms.iter().filter_map(|id| tables.vms.get(*id));
        lines.extend(vms.map(|vm| WorkLine::Vm { vm: Box::new(Vm::clone(vm)) }));
    }
    let images = tables.images.iter().filter_map(|image| image.status.data.as_ref());
    let sha256: BTreeSet<&str> = images.map(|data| data.sha256.as_str()).collect();
    lines.push(WorkLine::Images { sha256: sha256.into_iter().map(str::to_owned).collect() });
    lines.push(WorkLine::Synced { revision });
    lines
}

fn line(change: NodeChange) -> WorkLine {
    match change {
        NodeChange::Vm(vm) => WorkLine::Vm { vm: Box::new(Vm::clone(&vm)) },
        NodeChange::VmGone(id) => WorkLine::VmGone { vm: id.into() },
        NodeChange::Volume(volume) => WorkLine::Volume { volume: Box::new(Volume::clone(&volume)) },
        NodeChange::VolumeGone(id) => WorkLine::VolumeGone { volume: id.into() },
        NodeChange::Snapshot(snapshot) => {
            WorkLine::Snapshot { snapshot: Box::new(Snapshot::clone(&snapshot)) }
        }
        NodeChange::SnapshotGone(id) => WorkLine::SnapshotGone { snapshot: id.into() },
        NodeChange::ImageGone(sha256) => WorkLine::ImageGone { sha256 },
        NodeChange::Stream(stream) => WorkLine::Stream { stream },
    }
}
