//! A pool in memory with injectable delays and failures, cheap enough for 10,000 volumes in one process.

use std::{collections::HashMap, collections::HashSet, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use parking_lot::Mutex;
use uuid::Uuid;

use super::{ImageSource, Layer, NewVolume, Pool, PoolKind, PoolUsage, VolumeInfo, VolumeSource};
use crate::{ImageFormat, ImageRef, StorageError};

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

/// Index into the table of images; volumes are many and images few.
type ImageIndex = u32;

struct SimVolume {
    size: u64,
    image: Option<ImageIndex>,
}

#[derive(Default)]
struct State {
    images: HashSet<ImageRef>,
    /// Every image that a volume was ever made from.
    table: Vec<ImageRef>,
    volumes: HashMap<Uuid, SimVolume>,
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
            .field("volumes", &state.volumes.len())
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

impl State {
    fn source(&self, volume: &SimVolume) -> Option<&ImageRef> {
        volume.image.map(|index| &self.table[index as usize])
    }

    fn intern(&mut self, image: &ImageRef) -> ImageIndex {
        let index = self.table.iter().position(|known| known == image).unwrap_or_else(|| {
            self.table.push(image.clone());
            self.table.len() - 1
        });
        u32::try_from(index).expect("fewer than 2^32 images")
    }
}

#[async_trait]
impl Pool for SimPool {
    fn kind(&self) -> PoolKind {
        PoolKind::Simulated
    }

    async fn usage(&self) -> Result<PoolUsage, StorageError> {
        self.enter("usage", None).await?;
        let provisioned = self.state.lock().volumes.values().map(|volume| volume.size).sum();
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
        if let Some((id, _)) = state.volumes.iter().find(|(_, volume)| state.source(volume) == Some(image)) {
            return Err(StorageError::InUse { what: image.to_string(), by: format!("volume {id}") });
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
        let mut state = self.state.lock();
        if let Some(existing) = state.volumes.get(&volume.id) {
            super::check_same(volume, existing.size, state.source(existing))?;
        } else {
            let image = match &volume.source {
                VolumeSource::Blank => None,
                VolumeSource::Image { image, .. } => {
                    if !state.images.contains(image) {
                        return Err(StorageError::NotFound { what: image.to_string() });
                    }
                    Some(state.intern(image))
                }
            };
            state.volumes.insert(volume.id, SimVolume { size: volume.size, image });
        }
        Ok(VolumeInfo { id: volume.id, virtual_size: volume.size, used: 0 })
    }

    async fn volume_layers(&self, id: Uuid) -> Result<Vec<Layer>, StorageError> {
        self.enter("volume_layers", Some(id)).await?;
        let state = self.state.lock();
        let volume = state.volumes.get(&id).ok_or_else(|| super::volume_missing(id))?;
        let mut layers = vec![Layer {
            path: PathBuf::from(format!("/simulated/volumes/{id}.qcow2")),
            format: ImageFormat::Qcow2,
        }];
        if let Some(image) = state.source(volume) {
            let path = PathBuf::from(format!("/simulated/images/{}", image.file_name()?));
            layers.push(Layer { path, format: image.format });
        }
        Ok(layers)
    }

    async fn volume_info(&self, id: Uuid) -> Result<Option<VolumeInfo>, StorageError> {
        self.enter("volume_info", Some(id)).await?;
        let state = self.state.lock();
        Ok(state.volumes.get(&id).map(|volume| VolumeInfo { id, virtual_size: volume.size, used: 0 }))
    }

    async fn volume_delete(&self, id: Uuid) -> Result<(), StorageError> {
        self.enter("volume_delete", Some(id)).await?;
        self.state.lock().volumes.remove(&id);
        Ok(())
    }

    async fn volume_list(&self) -> Result<Vec<Uuid>, StorageError> {
        self.enter("volume_list", None).await?;
        Ok(self.state.lock().volumes.keys().copied().collect())
    }
}
