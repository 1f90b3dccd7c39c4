//! Snapshots of volumes in a directory: pointers to layers, moved one durable step at a time.

use std::collections::HashMap;

use uuid::Uuid;

use super::{
    Inner,
    layer::{Role, Unclean},
    scan::Records,
};
use crate::{
    StorageError, files,
    pool::{
        SnapshotInfo, SnapshotPlan, VolumeInfo, conflict, snapshot_missing,
        tree::{Base, Record, prepared},
    },
};

impl Inner {
    pub(super) fn snapshot_prepare(
        &self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<SnapshotPlan, StorageError> {
        let _lock = self.exclusive()?;
        if let Some(record) = self.record(snapshot)? {
            record.check_volume(snapshot, volume)?;
            let over = self.layer_read(new_layer, Unclean::Refuse)?.map(|node| node.base);
            if over != Some(Base::Layer(record.layer)) || record.next.is_some_and(|next| next != new_layer) {
                let difference = format!("layer {new_layer} is not the one made for it");
                return Err(conflict(format!("snapshot {snapshot}"), difference));
            }
            return self.plan(record.layer, new_layer);
        }
        let top = self.top_of(volume)?;
        if let Some(other) = prepared(&self.records_all()?, volume).first() {
            return Err(StorageError::Busy { what: format!("snapshot {other} of the same volume") });
        }
        self.check_idle(top)?;
        let chain = self.chain(top, Unclean::Refuse)?;
        chain.check_room()?;
        self.layer_make(new_layer, chain.top().size, top)?;
        self.record_write(snapshot, &Record { volume, layer: top, next: Some(new_layer) })?;
        self.plan(top, new_layer)
    }

    fn plan(&self, frozen: Uuid, overlay: Uuid) -> Result<SnapshotPlan, StorageError> {
        let chain = self.chain(frozen, Unclean::Refuse)?;
        Ok(SnapshotPlan { frozen: self.files(&chain)?, overlay: self.layer(overlay), depth: chain.depth() })
    }

    pub(super) fn snapshot_commit(&self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError> {
        let _lock = self.exclusive()?;
        let record = self.record(snapshot)?.ok_or_else(|| snapshot_missing(snapshot))?;
        self.commit(volume, snapshot, &record)
    }

    /// The caller holds the exclusive lock.
    fn commit(&self, volume: Uuid, snapshot: Uuid, record: &Record) -> Result<(), StorageError> {
        record.check_volume(snapshot, volume)?;
        let Some(next) = record.next else { return Ok(()) };
        let top = self.top_of(volume)?;
        if top == record.layer {
            self.role_write(volume, Role::Top(next))?;
        } else if top != next {
            let difference = format!("the volume's top is {top}, which has nothing to do with it");
            return Err(conflict(format!("snapshot {snapshot}"), difference));
        }
        self.record_write(snapshot, &Record { next: None, ..*record })
    }

    pub(super) fn snapshot_abort(&self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError> {
        let _lock = self.exclusive()?;
        let Some(record) = self.record(snapshot)? else { return Ok(()) };
        record.check_volume(snapshot, volume)?;
        let top = self.top(volume)?;
        let Some(next) = record.next.filter(|next| top != Some(*next)) else {
            return Err(conflict(format!("snapshot {snapshot}"), "it is committed; delete it instead"));
        };
        self.record_remove(snapshot)?;
        self.layer_remove(next)
    }

    fn record_remove(&self, snapshot: Uuid) -> Result<(), StorageError> {
        if files::remove(&self.record_path(snapshot))? {
            files::sync_dir(&self.snapshots)?;
        }
        Ok(())
    }

    /// Every record, all of which must be readable.
    fn records_all(&self) -> Result<HashMap<Uuid, Record>, StorageError> {
        let records = self.records()?;
        records.damaged.into_values().next().map_or(Ok(records.read), Err)
    }

    pub(super) fn recover(&self, volume: Uuid) -> Result<Vec<Uuid>, StorageError> {
        let _lock = self.exclusive()?;
        self.recover_locked(volume)
    }

    /// Commits what was prepared. The caller holds the exclusive lock.
    pub(super) fn recover_locked(&self, volume: Uuid) -> Result<Vec<Uuid>, StorageError> {
        let Some(top) = self.top(volume)? else { return Ok(Vec::new()) };
        let Records { read: records, damaged } = self.records()?;
        if let Some(error) = damaged.into_values().next() {
            // It may be of this volume, and the newest data in the layer that it names. Else it is no reason to stop.
            let scan = self.scan()?;
            if scan.tree.layers.values().any(|node| node.base == Base::Layer(top)) {
                return Err(error);
            }
        }
        let pending = prepared(&records, volume);
        for snapshot in &pending {
            self.commit(volume, *snapshot, &records[snapshot])?;
        }
        Ok(pending)
    }

    pub(super) fn snapshot_revert(
        &self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<VolumeInfo, StorageError> {
        let _lock = self.exclusive()?;
        let record = self.record(snapshot)?.ok_or_else(|| snapshot_missing(snapshot))?;
        record.check_volume(snapshot, volume)?;
        let top = self.top_of(volume)?;
        let made = top == new_layer
            && self.layer_read(top, Unclean::Refuse)?.map(|node| node.base)
                == Some(Base::Layer(record.layer));
        if !made {
            self.recover_locked(volume)?;
            self.check_idle(self.top_of(volume)?)?;
            let below = self.chain(record.layer, Unclean::Refuse)?;
            below.check_room()?;
            self.layer_make(new_layer, below.top().size, record.layer)?;
            self.role_write(volume, Role::Top(new_layer))?;
        }
        self.info(volume, &self.chain(new_layer, Unclean::Refuse)?)
    }

    pub(super) fn snapshot_delete(&self, snapshot: Uuid) -> Result<(), StorageError> {
        let _lock = self.exclusive()?;
        match self.record(snapshot) {
            Ok(None) => return Ok(()),
            Ok(Some(record)) => record.check_committed(snapshot)?,
            Err(StorageError::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
        self.record_remove(snapshot)
    }

    pub(super) fn snapshot_list(&self) -> Result<Vec<SnapshotInfo>, StorageError> {
        let _lock = self.shared()?;
        let records = self.records()?.read;
        let infos = records.into_iter().map(|(id, record)| {
            // The audit tells of a layer that is missing or damaged.
            let node = self.layer_read(record.layer, Unclean::Accept).ok().flatten();
            SnapshotInfo {
                id,
                volume: record.volume,
                layer: record.layer,
                prepared: record.next.is_some(),
                virtual_size: node.as_ref().map_or(0, |node| node.size),
                used: node.map_or(0, |node| node.used),
            }
        });
        Ok(infos.collect())
    }
}
