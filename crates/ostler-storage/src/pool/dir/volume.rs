//! Volumes of a pool in a directory: made, told about, deleted.

use uuid::Uuid;

use super::{
    Inner,
    layer::{Role, Unclean, image_name, layer_name},
    scan::Records,
    scratch,
};
use crate::{
    ImageFormat, StorageError,
    files::{self, Context},
    pool::{
        Layer, NewVolume, PoolUsage, VolumeInfo, VolumeSource, check_new_volume, snapshot_missing,
        tree::{Chain, Node, Record, check_same, hidden, prepared},
        volume_missing,
    },
    qcow2,
};

impl Inner {
    pub(super) fn volume_create(&self, new: &NewVolume) -> Result<VolumeInfo, StorageError> {
        check_new_volume(new)?;
        let _lock = self.shared()?;
        let record = match &new.source {
            VolumeSource::Blank | VolumeSource::Image { .. } => None,
            VolumeSource::Snapshot { snapshot } => self.record(*snapshot)?,
        };
        if let Some(info) = self.volume_made(new, record.as_ref())? {
            return Ok(info);
        }
        let (empty, depth) = self.volume_empty(new, record)?;
        let scratch = scratch(&self.volumes)?;
        empty.write(&scratch.file).context("write", &scratch.path)?;
        if scratch.publish(&self.layer_path(new.id), 0o600)? {
            let node = self.layer_read(new.id, Unclean::Refuse)?.ok_or_else(|| volume_missing(new.id))?;
            return Ok(VolumeInfo {
                id: new.id,
                virtual_size: node.size,
                used: node.used,
                depth,
                top: new.id,
            });
        }
        // Someone else made it at the same moment: then theirs counts, if it is the same.
        self.volume_made(new, record.as_ref())?.ok_or_else(|| volume_missing(new.id))
    }

    /// The volume if it is there already, and the same.
    fn volume_made(
        &self,
        new: &NewVolume,
        record: Option<&Record>,
    ) -> Result<Option<VolumeInfo>, StorageError> {
        let top = match self.role(new.id)? {
            Some(Role::Top(top)) => top,
            Some(Role::Layer) if self.layer_exists(new.id)? => return Err(hidden(new.id)),
            Some(Role::Layer) => return Err(StorageError::Busy { what: format!("the id {}", new.id) }),
            None if self.layer_exists(new.id)? => new.id,
            None => return Ok(None),
        };
        let chain = self.chain(top, Unclean::Refuse)?;
        let first = match self.layer_read(new.id, Unclean::Refuse)? {
            Some(node) => Node { size: chain.top().size, ..node },
            None => chain.top().clone(),
        };
        check_same(new, &first, record)?;
        self.info(new.id, &chain).map(Some)
    }

    /// The content of a new volume's layer, and the depth that it will have.
    fn volume_empty(
        &self,
        new: &NewVolume,
        record: Option<Record>,
    ) -> Result<(qcow2::Empty, u32), StorageError> {
        let (minimum, name, format, below) = match &new.source {
            VolumeSource::Blank => return Ok((qcow2::Empty::new(new.size, None), 1)),
            VolumeSource::Image { image, .. } => {
                (self.image_size(image)?, image_name(image)?, image.format, 0)
            }
            VolumeSource::Snapshot { snapshot } => {
                let record = record.ok_or_else(|| snapshot_missing(*snapshot))?;
                record.check_committed(*snapshot)?;
                let chain = self.chain(record.layer, Unclean::Refuse)?;
                chain.check_room()?;
                (chain.top().size, layer_name(record.layer), ImageFormat::Qcow2, chain.depth())
            }
        };
        if new.size < minimum {
            return Err(StorageError::TooSmall { size: new.size, minimum });
        }
        Ok((qcow2::Empty::new(new.size, Some((&name, format))), below + 1))
    }

    pub(super) fn volume_layers(&self, id: Uuid) -> Result<Vec<Layer>, StorageError> {
        let _lock = self.shared()?;
        let chain = self.chain(self.top_of(id)?, Unclean::Refuse)?;
        self.files(&chain)
    }

    pub(super) fn volume_info(&self, id: Uuid) -> Result<Option<VolumeInfo>, StorageError> {
        let _lock = self.shared()?;
        let Some(top) = self.top(id)? else { return Ok(None) };
        let chain = self.chain(top, Unclean::Refuse)?;
        self.info(id, &chain).map(Some)
    }

    /// Tells about a volume. The caller holds a lock.
    pub(super) fn info(&self, id: Uuid, chain: &Chain) -> Result<VolumeInfo, StorageError> {
        let used = match chain.layers[..] {
            // Nobody else can stand on a top, so the others need not be looked at.
            [(_, ref top)] => top.used,
            _ => self.scan()?.tree.own_bytes(id, chain),
        };
        Ok(VolumeInfo {
            id,
            virtual_size: chain.top().size,
            used,
            depth: chain.depth(),
            top: chain.layers[0].0,
        })
    }

    pub(super) fn volume_list(&self) -> Result<Vec<Uuid>, StorageError> {
        let _lock = self.shared()?;
        Ok(self.tops()?.into_keys().collect())
    }

    pub(super) fn volume_delete(&self, id: Uuid) -> Result<(), StorageError> {
        let _lock = self.exclusive()?;
        let top = match self.role(id) {
            Ok(Some(Role::Top(top))) => Some(top),
            Ok(Some(Role::Layer)) => None,
            Ok(None) => Some(id),
            // Its top cannot be known any more; without the pointer, what it was is garbage.
            Err(StorageError::Damaged { .. }) => None,
            Err(error) => return Err(error),
        };
        let Records { read: records, damaged } = self.records()?;
        // A top carries no snapshot but one that is being made. A record that cannot be read may be of any layer.
        let kept = !damaged.is_empty() || records.values().any(|record| Some(record.layer) == top);
        if self.layer_exists(id)? {
            if top == Some(id) && !kept {
                return self.layer_remove(id);
            }
            if !matches!(self.role(id), Ok(Some(Role::Layer))) {
                self.role_write(id, Role::Layer)?;
            }
        } else if files::remove(&self.role_path(id))? {
            files::sync_dir(&self.volumes)?;
        }
        for snapshot in prepared(&records, id) {
            let record = records[&snapshot];
            self.record_write(snapshot, &Record { next: None, ..record })?;
            if let Some(next) = record.next {
                self.layer_remove(next)?;
            }
        }
        match top {
            Some(top) if top != id && !kept => self.layer_remove(top),
            Some(_) | None => Ok(()),
        }
    }

    pub(super) fn usage(&self) -> Result<PoolUsage, StorageError> {
        let stat =
            rustix::fs::statvfs(&self.dir).map_err(std::io::Error::from).context("look at", &self.dir)?;
        let mut provisioned = 0u64;
        for top in self.tops()?.into_values() {
            // A damaged volume, or one that was just deleted, promises nothing.
            if let Ok(Some(node)) = self.layer_read(top, Unclean::Accept) {
                provisioned = provisioned.saturating_add(node.size);
            }
        }
        Ok(PoolUsage {
            total: stat.f_blocks * stat.f_frsize,
            used: (stat.f_blocks - stat.f_bfree) * stat.f_frsize,
            available: stat.f_bavail * stat.f_frsize,
            provisioned,
        })
    }
}
