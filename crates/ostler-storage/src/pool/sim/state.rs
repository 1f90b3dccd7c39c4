//! What the calls of a simulated pool do to its tree: the same as the directory pool does to its files.

use std::{path::PathBuf, sync::Arc};

use uuid::Uuid;

use super::State;
use crate::{
    ImageFormat, ImageRef, StorageError,
    pool::{
        Audit, Layer, NewVolume, Orphan, SnapshotInfo, SnapshotPlan, VolumeInfo, VolumeSource, check_grow,
        conflict, snapshot_missing,
        tree::{Base, Chain, Node, Record, check_same, hidden},
        volume_missing,
    },
};

impl State {
    pub(super) fn top(&self, volume: Uuid) -> Result<Uuid, StorageError> {
        self.tree.volumes.get(&volume).copied().ok_or_else(|| volume_missing(volume))
    }

    pub(super) fn chain(&self, top: Uuid) -> Result<Chain, StorageError> {
        self.tree
            .chain(top)
            .map_err(|error| StorageError::Damaged { path: path(top), why: error.to_string() })
    }

    pub(super) fn info(&self, volume: Uuid) -> Result<VolumeInfo, StorageError> {
        let top = self.top(volume)?;
        let chain = self.chain(top)?;
        // Nothing is ever written here, so nothing takes room.
        Ok(VolumeInfo { id: volume, virtual_size: chain.top().size, used: 0, depth: chain.depth(), top })
    }

    fn intern(&mut self, image: &ImageRef) -> Arc<ImageRef> {
        if let Some(name) = self.names.get(image) {
            return Arc::clone(name);
        }
        let name = Arc::new(image.clone());
        self.names.insert(Arc::clone(&name));
        name
    }

    pub(super) fn volume_create(&mut self, new: &NewVolume) -> Result<VolumeInfo, StorageError> {
        let record = match &new.source {
            VolumeSource::Blank | VolumeSource::Image { .. } => None,
            VolumeSource::Snapshot { snapshot } => self.tree.snapshots.get(snapshot).copied(),
        };
        if let Some(top) = self.tree.volumes.get(&new.id) {
            let node = &self.tree.layers[top];
            let base = self.tree.layers.get(&new.id).unwrap_or(node).base.clone();
            check_same(new, &Node { base, ..node.clone() }, record.as_ref())?;
            return self.info(new.id);
        }
        if self.tree.layers.contains_key(&new.id) {
            return Err(hidden(new.id));
        }
        let base = match &new.source {
            VolumeSource::Blank => Base::Nothing,
            VolumeSource::Image { image, .. } if self.images.contains(image) => {
                Base::Image(self.intern(image))
            }
            VolumeSource::Image { image, .. } => {
                return Err(StorageError::NotFound { what: image.to_string() });
            }
            VolumeSource::Snapshot { snapshot } => {
                let record = record.ok_or_else(|| snapshot_missing(*snapshot))?;
                record.check_committed(*snapshot)?;
                let chain = self.chain(record.layer)?;
                chain.check_room()?;
                let minimum = chain.top().size;
                if new.size < minimum {
                    return Err(StorageError::TooSmall { size: new.size, minimum });
                }
                Base::Layer(record.layer)
            }
        };
        self.tree.layers.insert(new.id, Node { size: new.size, used: 0, base });
        self.tree.volumes.insert(new.id, new.id);
        self.info(new.id)
    }

    pub(super) fn volume_delete(&mut self, volume: Uuid) {
        let Some(top) = self.tree.volumes.remove(&volume) else { return };
        let kept = self.tree.snapshots.values().any(|record| record.layer == top);
        for snapshot in self.tree.prepared(volume) {
            if let Some(record) = self.tree.snapshots.get_mut(&snapshot)
                && let Some(next) = record.next.take()
            {
                self.tree.layers.remove(&next);
            }
        }
        if !kept {
            self.tree.layers.remove(&top);
        }
    }

    pub(super) fn volume_grow(&mut self, volume: Uuid, size: u64) -> Result<VolumeInfo, StorageError> {
        self.recover(volume)?;
        let top = self.top(volume)?;
        if let Some(node) = self.tree.layers.get_mut(&top)
            && check_grow(node.size, size)?
        {
            node.size = size;
        }
        self.info(volume)
    }

    pub(super) fn rebase(&mut self, layer: Uuid, base: Base) {
        if let Some(node) = self.tree.layers.get_mut(&layer) {
            node.base = base;
        }
    }

    fn base_of(&self, layer: Uuid) -> Option<&Base> {
        self.tree.layers.get(&layer).map(|node| &node.base)
    }

    /// An empty layer over another one.
    fn layer_make(&mut self, id: Uuid, size: u64, below: Uuid) -> Result<(), StorageError> {
        let taken = self.tree.layers.contains_key(&id) && self.tree.needed().contains(&id);
        if taken || self.tree.volumes.contains_key(&id) {
            return Err(conflict(format!("layer {id}"), "it has other data; use another id"));
        }
        self.tree.layers.insert(id, Node { size, used: 0, base: Base::Layer(below) });
        Ok(())
    }

    pub(super) fn snapshot_prepare(
        &mut self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<SnapshotPlan, StorageError> {
        if let Some(record) = self.tree.snapshots.get(&snapshot) {
            record.check_volume(snapshot, volume)?;
            if self.base_of(new_layer) != Some(&Base::Layer(record.layer))
                || record.next.is_some_and(|next| next != new_layer)
            {
                let difference = format!("layer {new_layer} is not the one made for it");
                return Err(conflict(format!("snapshot {snapshot}"), difference));
            }
            return self.plan(record.layer, new_layer);
        }
        let top = self.top(volume)?;
        if let Some(other) = self.tree.prepared(volume).first() {
            return Err(StorageError::Busy { what: format!("snapshot {other} of the same volume") });
        }
        let chain = self.chain(top)?;
        chain.check_room()?;
        self.layer_make(new_layer, chain.top().size, top)?;
        self.tree.snapshots.insert(snapshot, Record { volume, layer: top, next: Some(new_layer) });
        self.plan(top, new_layer)
    }

    fn plan(&self, frozen: Uuid, overlay: Uuid) -> Result<SnapshotPlan, StorageError> {
        let chain = self.chain(frozen)?;
        Ok(SnapshotPlan { frozen: files(&chain)?, overlay: layer(overlay), depth: chain.depth() })
    }

    pub(super) fn snapshot_commit(&mut self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError> {
        let record = self.tree.snapshots.get(&snapshot).copied().ok_or_else(|| snapshot_missing(snapshot))?;
        record.check_volume(snapshot, volume)?;
        let Some(next) = record.next else { return Ok(()) };
        let top = self.top(volume)?;
        if top != record.layer && top != next {
            let difference = format!("the volume's top is {top}, which has nothing to do with it");
            return Err(conflict(format!("snapshot {snapshot}"), difference));
        }
        self.tree.volumes.insert(volume, next);
        self.tree.snapshots.insert(snapshot, Record { next: None, ..record });
        Ok(())
    }

    pub(super) fn snapshot_abort(&mut self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError> {
        let Some(record) = self.tree.snapshots.get(&snapshot) else { return Ok(()) };
        record.check_volume(snapshot, volume)?;
        let top = self.tree.volumes.get(&volume).copied();
        let Some(next) = record.next.filter(|next| top != Some(*next)) else {
            return Err(conflict(format!("snapshot {snapshot}"), "it is committed; delete it instead"));
        };
        self.tree.snapshots.remove(&snapshot);
        self.tree.layers.remove(&next);
        Ok(())
    }

    pub(super) fn recover(&mut self, volume: Uuid) -> Result<Vec<Uuid>, StorageError> {
        if !self.tree.volumes.contains_key(&volume) {
            return Ok(Vec::new());
        }
        let pending = self.tree.prepared(volume);
        for snapshot in &pending {
            self.snapshot_commit(volume, *snapshot)?;
        }
        Ok(pending)
    }

    pub(super) fn snapshot_revert(
        &mut self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<VolumeInfo, StorageError> {
        let record = self.tree.snapshots.get(&snapshot).copied().ok_or_else(|| snapshot_missing(snapshot))?;
        record.check_volume(snapshot, volume)?;
        let top = self.top(volume)?;
        if top != new_layer || self.base_of(top) != Some(&Base::Layer(record.layer)) {
            self.recover(volume)?;
            let below = self.chain(record.layer)?;
            below.check_room()?;
            self.layer_make(new_layer, below.top().size, record.layer)?;
            self.tree.volumes.insert(volume, new_layer);
        }
        self.info(volume)
    }

    pub(super) fn snapshot_delete(&mut self, snapshot: Uuid) -> Result<(), StorageError> {
        if let Some(record) = self.tree.snapshots.get(&snapshot) {
            record.check_committed(snapshot)?;
            self.tree.snapshots.remove(&snapshot);
        }
        Ok(())
    }

    pub(super) fn snapshot_list(&self) -> Vec<SnapshotInfo> {
        let info = |(id, record): (&Uuid, &Record)| {
            let node = self.tree.layers.get(&record.layer);
            SnapshotInfo {
                id: *id,
                volume: record.volume,
                layer: record.layer,
                prepared: record.next.is_some(),
                virtual_size: node.map_or(0, |node| node.size),
                used: node.map_or(0, |node| node.used),
            }
        };
        self.tree.snapshots.iter().map(info).collect()
    }

    pub(super) fn audit(&self) -> Audit {
        let needed = self.tree.needed();
        let garbage = self.tree.layers.iter().filter(|(id, _)| !needed.contains(id));
        let orphans = garbage.map(|(id, node)| Orphan {
            path: path(*id),
            bytes: node.used,
            why: "no volume, snapshot or layer needs it; it goes with the next collection".to_owned(),
        });
        Audit { orphans: orphans.collect(), broken: Vec::new() }
    }
}

fn path(layer: Uuid) -> PathBuf {
    PathBuf::from(format!("/simulated/volumes/{layer}.qcow2"))
}

fn layer(id: Uuid) -> Layer {
    Layer { path: path(id), format: ImageFormat::Qcow2 }
}

/// A chain as files, top first.
pub(super) fn files(chain: &Chain) -> Result<Vec<Layer>, StorageError> {
    let mut files: Vec<Layer> = chain.layers.iter().map(|(id, _)| layer(*id)).collect();
    if let Some(image) = &chain.image {
        let path = PathBuf::from(format!("/simulated/images/{}", image.file_name()?));
        files.push(Layer { path, format: image.format });
    }
    Ok(files)
}
