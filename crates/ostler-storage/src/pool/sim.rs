//! A pool in memory with injectable delays and failures, cheap enough for 10,000 volumes in one process.

mod state;

use std::{collections::HashSet, sync::Arc, time::Duration};

use async_trait::async_trait;
use parking_lot::Mutex;
use uuid::Uuid;

use super::{
    Audit, CheckReport, ImageSource, Layer, Merge, NewVolume, Pool, PoolKind, PoolUsage, SnapshotInfo,
    SnapshotPlan, VolumeInfo, Work,
    tree::{Base, Tree},
};
use crate::{ImageRef, StorageError};

/// Decides for each call what goes wrong: given the operation's name ("volume_create") and the volume, an error to
/// return instead of acting.
pub type SimFault = dyn Fn(&'static str, Option<Uuid>) -> Option<StorageError> + Send + Sync;

/// What a simulated pool does besides working. Shared by all clones.
#[derive(Clone, Default)]
pub struct SimFaults {
    /// Waited at the start of each call.
    pub delay: Duration,
    pub fault: Option<Arc<SimFault>>,
}

impl std::fmt::Debug for SimFaults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimFaults").field("delay", &self.delay).field("fault", &self.fault.is_some()).finish()
    }
}

#[derive(Default)]
struct State {
    images: HashSet<ImageRef>,
    /// One copy of each image's name for all the layers on it.
    names: HashSet<Arc<ImageRef>>,
    tree: Tree,
    faults: SimFaults,
}

/// A pool in memory; clones share their content.
#[derive(Clone)]
pub struct SimPool {
    capacity: u64,
    state: Arc<Mutex<State>>,
}

impl std::fmt::Debug for SimPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = self.state.lock();
        f.debug_struct("SimPool")
            .field("capacity", &self.capacity)
            .field("images", &state.images.len())
            .field("volumes", &state.tree.volumes.len())
            .field("snapshots", &state.tree.snapshots.len())
            .finish()
    }
}

impl SimPool {
    /// A pool that claims to have `capacity` bytes.
    pub fn new(capacity: u64) -> Self {
        Self { capacity, state: Arc::default() }
    }

    /// Sets what goes wrong from now on.
    pub fn set_faults(&self, faults: SimFaults) {
        self.state.lock().faults = faults;
    }

    async fn enter(&self, operation: &'static str, volume: Option<Uuid>) -> Result<(), StorageError> {
        let faults = self.state.lock().faults.clone();
        if !faults.delay.is_zero() {
            tokio::time::sleep(faults.delay).await;
        }
        match faults.fault.and_then(|fault| fault(operation, volume)) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Pool for SimPool {
    fn kind(&self) -> PoolKind {
        PoolKind::Simulated
    }

    async fn usage(&self) -> Result<PoolUsage, StorageError> {
        self.enter("usage", None).await?;
        let state = self.state.lock();
        let provisioned = state.tree.volumes.values().map(|top| state.tree.layers[top].size).sum();
        Ok(PoolUsage { total: self.capacity, used: 0, available: self.capacity, provisioned })
    }

    async fn image_present(&self, image: &ImageRef) -> Result<bool, StorageError> {
        self.enter("image_present", None).await?;
        Ok(self.state.lock().images.contains(image))
    }

    async fn image_add(&self, image: &ImageRef, from: ImageSource) -> Result<(), StorageError> {
        self.enter("image_add", None).await?;
        image.file_name()?;
        match from {
            ImageSource::Path(_) => {}
            ImageSource::Stream(stream) => super::check_stream(image, stream).await?,
        }
        self.state.lock().images.insert(image.clone());
        Ok(())
    }

    async fn image_remove(&self, image: &ImageRef) -> Result<(), StorageError> {
        self.enter("image_remove", None).await?;
        let mut state = self.state.lock();
        let holds = |base: &Base| matches!(base, Base::Image(base) if **base == *image);
        if let Some((id, _)) = state.tree.layers.iter().find(|(_, node)| holds(&node.base)) {
            return Err(StorageError::InUse { what: image.to_string(), by: format!("layer {id}") });
        }
        state.images.remove(image);
        Ok(())
    }

    async fn image_list(&self) -> Result<Vec<ImageRef>, StorageError> {
        self.enter("image_list", None).await?;
        Ok(self.state.lock().images.iter().cloned().collect())
    }

    async fn volume_create(&self, volume: &NewVolume) -> Result<VolumeInfo, StorageError> {
        self.enter("volume_create", Some(volume.id)).await?;
        super::check_new_volume(volume)?;
        self.state.lock().volume_create(volume)
    }

    async fn volume_layers(&self, id: Uuid) -> Result<Vec<Layer>, StorageError> {
        self.enter("volume_layers", Some(id)).await?;
        let state = self.state.lock();
        state::files(&state.chain(state.top(id)?)?)
    }

    async fn volume_info(&self, id: Uuid) -> Result<Option<VolumeInfo>, StorageError> {
        self.enter("volume_info", Some(id)).await?;
        let state = self.state.lock();
        if state.tree.volumes.contains_key(&id) { state.info(id).map(Some) } else { Ok(None) }
    }

    async fn volume_delete(&self, id: Uuid) -> Result<(), StorageError> {
        self.enter("volume_delete", Some(id)).await?;
        self.state.lock().volume_delete(id);
        Ok(())
    }

    async fn volume_list(&self) -> Result<Vec<Uuid>, StorageError> {
        self.enter("volume_list", None).await?;
        Ok(self.state.lock().tree.volumes.keys().copied().collect())
    }

    async fn volume_grow(&self, id: Uuid, size: u64) -> Result<VolumeInfo, StorageError> {
        self.enter("volume_grow", Some(id)).await?;
        self.state.lock().volume_grow(id, size)
    }

    async fn volume_check(&self, id: Uuid, _repair: bool, work: &Work) -> Result<CheckReport, StorageError> {
        self.enter("volume_check", Some(id)).await?;
        self.state.lock().top(id)?;
        done(work)?;
        Ok(CheckReport { clean: true, ..CheckReport::default() })
    }

    async fn flatten(&self, volume: Uuid, work: &Work) -> Result<(), StorageError> {
        self.enter("flatten", Some(volume)).await?;
        let mut state = self.state.lock();
        state.recover(volume)?;
        let top = state.top(volume)?;
        done(work)?;
        state.rebase(top, Base::Nothing);
        Ok(())
    }

    async fn snapshot_prepare(
        &self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<SnapshotPlan, StorageError> {
        self.enter("snapshot_prepare", Some(volume)).await?;
        self.state.lock().snapshot_prepare(volume, snapshot, new_layer)
    }

    async fn snapshot_commit(&self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError> {
        self.enter("snapshot_commit", Some(volume)).await?;
        self.state.lock().snapshot_commit(volume, snapshot)
    }

    async fn snapshot_abort(&self, volume: Uuid, snapshot: Uuid) -> Result<(), StorageError> {
        self.enter("snapshot_abort", Some(volume)).await?;
        self.state.lock().snapshot_abort(volume, snapshot)
    }

    async fn recover(&self, volume: Uuid) -> Result<Vec<Uuid>, StorageError> {
        self.enter("recover", Some(volume)).await?;
        self.state.lock().recover(volume)
    }

    async fn snapshot_revert(
        &self,
        volume: Uuid,
        snapshot: Uuid,
        new_layer: Uuid,
    ) -> Result<VolumeInfo, StorageError> {
        self.enter("snapshot_revert", Some(volume)).await?;
        self.state.lock().snapshot_revert(volume, snapshot, new_layer)
    }

    async fn snapshot_delete(&self, snapshot: Uuid) -> Result<(), StorageError> {
        self.enter("snapshot_delete", None).await?;
        self.state.lock().snapshot_delete(snapshot)
    }

    async fn snapshot_list(&self) -> Result<Vec<SnapshotInfo>, StorageError> {
        self.enter("snapshot_list", None).await?;
        Ok(self.state.lock().snapshot_list())
    }

    async fn collect(&self, in_use: &HashSet<Uuid>) -> Result<Vec<Uuid>, StorageError> {
        self.enter("collect", None).await?;
        let mut state = self.state.lock();
        let gone = state.tree.garbage(in_use);
        for id in &gone {
            state.tree.layers.remove(id);
        }
        Ok(gone)
    }

    async fn merge_candidates(&self) -> Result<Vec<Merge>, StorageError> {
        self.enter("merge_candidates", None).await?;
        Ok(self.state.lock().tree.merge_candidates())
    }

    async fn merge(&self, layer: Uuid, child: Uuid, work: &Work) -> Result<(), StorageError> {
        self.enter("merge", None).await?;
        let mut state = self.state.lock();
        if state.tree.merge_check(layer, child)? {
            done(work)?;
            let base = state.tree.layers[&layer].base.clone();
            state.rebase(child, base);
        }
        Ok(())
    }

    async fn audit(&self) -> Result<Audit, StorageError> {
        self.enter("audit", None).await?;
        Ok(self.state.lock().audit())
    }
}

/// Long work takes no time here; cancelled before, it is not done.
fn done(work: &Work) -> Result<(), StorageError> {
    if work.cancel.is_cancelled() {
        return Err(StorageError::Cancelled);
    }
    work.advance(10_000);
    Ok(())
}
