//! Volumes: made when they are placed here, deleted when they are marked. One worker per volume, and only while there
//! is something to do with it.
//!
//! What always holds: a volume that was ready once is never made again (a lost disk must not come back blank), and none
//! is deleted while a machine of this host has it open.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use ostler_api::disk::DiskLimits;
use ostler_api::volume::{Volume, VolumePhase, VolumeSpec};
use ostler_api::work::{Report, VolumeReport, VolumeState};
use ostler_api::{ByteSize, Fault, OperationId, VolumeId};
use ostler_storage::{NewVolume, StorageError, VolumeInfo, VolumeSource};
use parking_lot::Mutex;
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, OwnedMutexGuard};
use uuid::Uuid;

use crate::desk::Desk;
use crate::fault;
use crate::host::{Backoff, Host, within};
use crate::images::image_ref;
use crate::machine_spec::{DiskParts, disk_id, disk_limits};
use crate::record::VolumeRecord;
use crate::vm_handle::Trust;

/// Between attempts to delete a volume.
const DELETE_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

#[derive(Debug, Default)]
pub(crate) struct Volumes {
    entries: Mutex<HashMap<VolumeId, Arc<Entry>>>,
    /// Rung when a volume is announced.
    announced: Notify,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: VolumeId,
    slot: Mutex<Slot>,
    /// Held while the volume's files are made, changed or deleted with no machine having them open. Who opens them says so
    /// first (`VmHandle::open`) and takes this then, so that each sees the other.
    work: Arc<tokio::sync::Mutex<()>>,
    /// How many want the volume now, so that long work on it makes way; and what rings when one more does.
    asking: AtomicUsize,
    asked: Notify,
}

impl Entry {
    pub(crate) fn is_asked_for(&self) -> bool {
        self.asking.load(Ordering::Acquire) > 0
    }

    pub(crate) fn asked(&self) -> Notified<'_> {
        self.asked.notified()
    }

    /// The flatten that the control plane wants.
    pub(crate) fn flatten_wanted(&self) -> Option<OperationId> {
        match &self.slot.lock().wanted {
            Wanted::Placed { volume, .. } if volume.metadata.deleted.is_none() => volume.status.flatten,
            Wanted::Placed { .. } | Wanted::Missing | Wanted::Unknown => None,
        }
    }
}

/// While it exists, long work on the volumes makes way.
#[derive(Debug)]
pub(crate) struct Asking(Vec<Arc<Entry>>);

impl Drop for Asking {
    fn drop(&mut self) {
        for entry in &self.0 {
            entry.asking.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

#[derive(Debug)]
struct Slot {
    wanted: Wanted,
    /// The file is here and ours.
    made: bool,
    /// Attempts to make it that have ended, and why the last one failed.
    attempts: u64,
    failed: Option<Fault>,
    record: Option<VolumeRecord>,
    /// A worker has taken it up; it looks again at what is wanted before it ends.
    busy: bool,
    /// What limits a machine that has it open has, as far as that is known.
    limits: Option<DiskLimits>,
}

#[derive(Debug, Clone)]
enum Wanted {
    Unknown,
    Placed {
        volume: Arc<Volume>,
        cloud: Uuid,
    },
    /// Delete what there is; nobody waits for an answer.
    Missing,
}

impl Volumes {
    fn entry(&self, id: VolumeId, record: Option<VolumeRecord>) -> Arc<Entry> {
        let new = || Slot {
            wanted: Wanted::Unknown,
            made: false,
            attempts: 0,
            failed: None,
            record,
            busy: false,
            limits: None,
        };
        let entry = || {
            Arc::new(Entry {
                id,
                slot: Mutex::new(new()),
                work: Arc::default(),
                asking: AtomicUsize::new(0),
                asked: Notify::new(),
            })
        };
        Arc::clone(self.entries.lock().entry(id).or_insert_with(entry))
    }

    /// Takes in what was kept, once at the start.
    pub(crate) fn load(&self, records: HashMap<VolumeId, VolumeRecord>) {
        for (id, record) in records {
            self.entry(id, Some(record));
        }
    }

    /// The lock of one volume's files.
    pub(crate) async fn lock(&self, id: VolumeId) -> OwnedMutexGuard<()> {
        let work = Arc::clone(&self.entry(id, None).work);
        work.lock_owned().await
    }

    /// Says that somebody wants these volumes and will wait for them.
    pub(crate) fn ask(&self, volumes: impl IntoIterator<Item = VolumeId>) -> Asking {
        let entries: Vec<_> = volumes.into_iter().map(|id| self.entry(id, None)).collect();
        for entry in &entries {
            entry.asking.fetch_add(1, Ordering::AcqRel);
            entry.asked.notify_waiters();
        }
        Asking(entries)
    }

    /// What people call a volume.
    pub(crate) fn name(&self, id: VolumeId) -> Option<String> {
        let entry = self.entries.lock().get(&id).cloned()?;
        match &entry.slot.lock().wanted {
            Wanted::Placed { volume, .. } => Some(volume.metadata.name.to_string()),
            Wanted::Missing | Wanted::Unknown => None,
        }
    }

    /// Resolves when a volume is announced, new or changed.
    pub(crate) fn announced(&self) -> Notified<'_> {
        self.announced.notified()
    }

    pub(crate) fn known(&self) -> Vec<VolumeId> {
        self.entries.lock().keys().copied().collect()
    }
}

impl Host {
    /// A volume is placed here, new or changed.
    pub(crate) fn volume_want(self: &Arc<Self>, volume: Arc<Volume>, cloud: Uuid) {
        let entry = self.volumes.entry(volume.metadata.id.into(), None);
        let grows = volume.status.size.is_some_and(|size| size < volume.spec.size);
        let opened = self.volume_is_open(volume.metadata.id.into());
        let limited = opened && entry.slot.lock().limits != Some(volume.spec.limits);
        let work = grows
            || limited
            || volume.status.flatten.is_some()
            || volume.metadata.deleted.is_some()
            || matches!(volume.status.phase, VolumePhase::Creating | VolumePhase::Deleting);
        {
            let mut slot = entry.slot.lock();
            if let Some(record) = &mut slot.record {
                record.revision = volume.metadata.revision;
            }
            slot.wanted = Wanted::Placed { volume, cloud };
        }
        self.volumes.announced.notify_waiters();
        if work {
            self.volume_work(&entry);
        }
    }

    /// A volume is not placed here. What is known to be this cloud's is deleted, all else is left alone.
    pub(crate) fn volume_unwant(self: &Arc<Self>, id: VolumeId, cloud: Uuid, revision: u64, trust: Trust) {
        let entry = self.volumes.entry(id, None);
        {
            let mut slot = entry.slot.lock();
            let ours = slot.record.as_ref().is_some_and(|record| {
                record.cloud == Some(cloud)
                    && match trust {
                        Trust::Explicit => true,
                        Trust::Listed => revision >= record.revision,
                        Trust::OlderStore => false,
                    }
            });
            let placed = matches!(&slot.wanted, Wanted::Placed { .. });
            if ours || (placed && trust == Trust::Explicit) {
                slot.wanted = Wanted::Missing;
            } else {
                slot.wanted = Wanted::Unknown;
                return;
            }
        }
        self.volume_work(&entry);
    }

    /// The files of a volume, top first. Makes the volume if that is still to be done, and waits for its announcement.
    pub(crate) async fn volume_ready(&self, id: VolumeId) -> Result<DiskParts, Fault> {
        let entry = self.volume_announced(id).await?;
        let since = entry.slot.lock().attempts;
        self.volume_make(&entry, since, false).await?;
        let _hold = self.hold(&[id]).await?;
        let what = format!("volume {id} cannot be opened");
        // Nobody has it open: a snapshot that was cut off is finished before anything is written again.
        let recovered = within(&what, self.config.times.pool, self.pool.recover(id.0)).await?;
        recovered.map_err(|error| fault::storage_failed(&what, &error))?;
        let layers = within(&what, self.config.times.pool, self.pool.volume_layers(id.0)).await?;
        let layers = layers.map_err(|error| fault::storage_failed(&what, &error))?;
        let mut slot = entry.slot.lock();
        let Wanted::Placed { volume, .. } = &slot.wanted else {
            return Err(fault::fault("volume_missing", format!("volume {id} is not placed here any more")));
        };
        let VolumeSpec { limits, cache, discard, .. } = volume.spec;
        slot.limits = Some(limits);
        Ok(DiskParts { layers, limits, cache, discard })
    }

    async fn volume_announced(&self, id: VolumeId) -> Result<Arc<Entry>, Fault> {
        let wait = async {
            loop {
                let announced = self.volumes.announced.notified();
                tokio::pin!(announced);
                announced.as_mut().enable();
                let entry = self.volumes.entries.lock().get(&id).cloned();
                if let Some(entry) = entry
                    && matches!(entry.slot.lock().wanted, Wanted::Placed { .. })
                {
                    return entry;
                }
                announced.await;
            }
        };
        within("waiting for the VM's volumes", self.config.times.volumes, wait).await.map_err(|_| {
            fault::fault("volume_missing", format!("volume {id} is not placed on this node; rebuild the VM"))
        })
    }

    fn volume_work(self: &Arc<Self>, entry: &Arc<Entry>) {
        if std::mem::replace(&mut entry.slot.lock().busy, true) {
            return;
        }
        let (host, entry) = (Arc::clone(self), Arc::clone(entry));
        self.spawn(async move { Box::pin(host.volume_worker(&entry)).await });
    }

    async fn volume_worker(&self, entry: &Entry) {
        loop {
            let wanted = entry.slot.lock().wanted.clone();
            match &wanted {
                Wanted::Placed { volume, .. }
                    if volume.metadata.deleted.is_none() && volume.status.phase != VolumePhase::Deleting =>
                {
                    // A failure was reported there; the control plane decides what follows.
                    let since = entry.slot.lock().attempts;
                    if self.volume_make(entry, since, true).await.is_ok() {
                        self.volume_grow(entry).await;
                        self.volume_limit(entry).await;
                        if let Some(operation) = entry.flatten_wanted() {
                            self.volume_flatten(entry, operation).await;
                        }
                    }
                }
                Wanted::Placed { .. } => self.volume_delete(entry, true).await,
                Wanted::Missing => self.volume_delete(entry, false).await,
                Wanted::Unknown => {}
            }
            let mut slot = entry.slot.lock();
            if self.stopping.is_cancelled() || same(&wanted, &slot.wanted) {
                slot.busy = false;
                return;
            }
        }
    }

    /// Makes the volume unless it is there; a failure after `since` attempts is not tried again. Reports how it went, with `again`
    /// also what was reported before.
    async fn volume_make(&self, entry: &Entry, since: u64, again: bool) -> Result<(), Fault> {
        let _work = entry.work.lock().await;
        let (volume, cloud, made) = {
            let slot = entry.slot.lock();
            let Wanted::Placed { volume, cloud } = &slot.wanted else {
                return Err(fault::fault(
                    "volume_missing",
                    format!("volume {} is not placed here", entry.id),
                ));
            };
            if let Some(fault) = &slot.failed
                && slot.attempts > since
            {
                return Err(fault.clone());
            }
            (Arc::clone(volume), *cloud, slot.made)
        };
        if made && !again {
            return Ok(());
        }
        let result = self.volume_try(entry, &volume, cloud).await;
        {
            let mut slot = entry.slot.lock();
            slot.made = result.is_ok();
            slot.attempts += 1;
            slot.failed = result.as_ref().err().cloned();
        }
        match &result {
            Ok(info) if volume.status.phase != VolumePhase::Ready => {
                self.volume_report(entry.id, ready(info));
            }
            Ok(_) => {}
            Err(fault) => {
                tracing::warn!(volume = %entry.id, code = fault.code, reason = fault.message, "not made");
                self.volume_report(entry.id, VolumeState::Failed { fault: fault.clone() });
            }
        }
        result.map(drop)
    }

    async fn volume_try(&self, entry: &Entry, volume: &Volume, cloud: Uuid) -> Result<VolumeInfo, Fault> {
        let id = entry.id;
        if volume.metadata.deleted.is_some() {
            return Err(fault::fault("volume_deleted", format!("volume {id} is being deleted")));
        }
        let limit = self.config.times.pool;
        let failed =
            |error: StorageError| fault::storage_failed(&format!("volume {id} cannot be made"), &error);
        let record = VolumeRecord { cloud: Some(cloud), revision: volume.metadata.revision };
        let ready = volume.status.phase == VolumePhase::Ready;
        if ready {
            self.volume_record(entry, record.clone()).await;
        }
        let was_made = entry.slot.lock().record.is_some();
        let info = if ready || (was_made && volume.status.phase != VolumePhase::Creating) {
            let info =
                within("looking for a volume", limit, self.pool.volume_info(id.0)).await?.map_err(failed)?;
            info.ok_or_else(|| {
                let message = format!(
                    "the disk of volume {id} is not in this node's pool any more; restore its file, or rebuild the VM"
                );
                fault::fault("volume_missing", message)
            })?
        } else {
            let source = match (&volume.spec.snapshot, &volume.spec.image) {
                (Some(from), _) => VolumeSource::Snapshot { snapshot: from.part },
                (None, None) => VolumeSource::Blank,
                (None, Some(image)) => {
                    let reference = image_ref(image);
                    self.image_ensure(&reference, &Arc::new(AtomicU64::new(0))).await?;
                    VolumeSource::Image { image: reference, virtual_size: image.virtual_size.bytes() }
                }
            };
            let new = NewVolume { id: id.0, size: volume.spec.size.bytes(), source };
            within("making a volume", limit, self.pool.volume_create(&new)).await?.map_err(failed)?
        };
        self.volume_record(entry, record).await;
        Ok(info)
    }

    /// Makes a volume that is there as large as it is wanted: through its machine when one has it open, else in the pool.
    async fn volume_grow(&self, entry: &Entry) {
        let desk = match self.desk(&[entry.id], || self.vm_of(entry.id)).await {
            Ok(desk) => desk,
            Err(fault) => {
                tracing::warn!(volume = %entry.id, reason = fault.message, "not grown yet");
                return;
            }
        };
        let (wanted, told) = match &entry.slot.lock().wanted {
            Wanted::Placed { volume, .. } if volume.metadata.deleted.is_none() => {
                (volume.spec.size, volume.status.size)
            }
            Wanted::Placed { .. } | Wanted::Missing | Wanted::Unknown => return,
        };
        let now = match self.volume_now(entry.id).await {
            Ok(now) if now.virtual_size < wanted.0 => now,
            Ok(now) => {
                // By an agent that could not say so any more.
                if told.is_some_and(|told| told.0 < now.virtual_size) {
                    self.volume_report(entry.id, ready(&now));
                }
                return;
            }
            Err(fault) => {
                tracing::warn!(volume = %entry.id, reason = fault.message, "not grown yet");
                return;
            }
        };
        let grown = match self.volume_grow_to(entry.id, &desk, wanted).await {
            Ok(()) => self.volume_now(entry.id).await,
            Err(fault) => Err(fault),
        };
        match grown {
            // A machine may have grown it before the pool shows it.
            Ok(info) => {
                let info = VolumeInfo { virtual_size: info.virtual_size.max(wanted.0), ..info };
                self.volume_report(entry.id, ready(&info));
            }
            Err(fault) => {
                tracing::warn!(volume = %entry.id, code = fault.code, reason = fault.message, "not grown");
                let size = self.volume_now(entry.id).await.map_or(now.virtual_size, |info| info.virtual_size);
                self.volume_report(entry.id, VolumeState::NotGrown { size: ByteSize(size), fault });
            }
        }
    }

    /// Gives the machine that has it open the limits that are wanted.
    async fn volume_limit(&self, entry: &Entry) {
        if !self.volume_is_open(entry.id) {
            return;
        }
        let limited = async {
            let desk = self.desk(&[entry.id], || self.vm_of(entry.id)).await?;
            let limits = match &entry.slot.lock().wanted {
                Wanted::Placed { volume, .. } => volume.spec.limits,
                Wanted::Missing | Wanted::Unknown => return Ok(()),
            };
            if let Some(machine) = desk.machine() {
                let (id, wanted) = (disk_id(entry.id), disk_limits(&limits));
                let plugged = self.disks_of(&machine).await?.into_iter().find(|disk| disk.id == id);
                if plugged.is_some_and(|disk| disk.limits != wanted) {
                    let what = "setting a disk's limits";
                    let set = within(what, self.config.times.ask, machine.disk_limits(&id, wanted)).await?;
                    set.map_err(|error| fault::machine_failed(what, &error))?;
                }
            }
            entry.slot.lock().limits = Some(limits);
            Ok::<_, Fault>(())
        };
        if let Err(fault) = limited.await {
            tracing::warn!(volume = %entry.id, code = fault.code, reason = fault.message, "its limits are not set");
        }
    }

    pub(crate) async fn volume_now(&self, id: VolumeId) -> Result<VolumeInfo, Fault> {
        let what = format!("looking for volume {id}");
        let info = within(&what, self.config.times.pool, self.pool.volume_info(id.0)).await?;
        let info = info.map_err(|error| fault::storage_failed(&what, &error))?;
        info.ok_or_else(|| fault::fault("volume_missing", format!("volume {id} is not in this node's pool")))
    }

    async fn volume_grow_to(&self, id: VolumeId, desk: &Desk<'_>, size: ByteSize) -> Result<(), Fault> {
        let what = format!("growing volume {id} to {size}");
        if let Some(machine) = desk.machine()
            && self.has_disk(&machine, id).await?
        {
            let disk = disk_id(id);
            let resize = machine.disk_resize(&disk, size.0);
            let done = within(&what, self.config.times.ask, resize).await?;
            return done.map_err(|error| fault::machine_failed(&what, &error));
        }
        if desk.is_open(id) {
            return Err(fault::unresponsive("it has the volume open and cannot be told its new size"));
        }
        let grown = within(&what, self.config.times.pool, self.pool.volume_grow(id.0, size.0)).await?;
        grown.map(drop).map_err(|error| fault::storage_failed(&what, &error))
    }

    async fn volume_record(&self, entry: &Entry, record: VolumeRecord) {
        let known = entry.slot.lock().record.replace(record.clone());
        if known.is_none_or(|known| known.cloud != record.cloud)
            && let Err(error) = self.config.keep.volume_put(entry.id, &record).await
        {
            tracing::warn!(volume = %entry.id, %error, "the volume's record is not kept");
        }
    }

    /// Deletes the file once no machine has it open; goes on until that is done or no longer wanted.
    async fn volume_delete(&self, entry: &Entry, answer: bool) {
        let mut backoff = Backoff::new(DELETE_RETRY);
        loop {
            self.volume_closed(entry.id).await;
            let _work = entry.work.lock().await;
            let unwanted = match &entry.slot.lock().wanted {
                Wanted::Missing => true,
                Wanted::Unknown => false,
                Wanted::Placed { volume, .. } => {
                    volume.metadata.deleted.is_some() || volume.status.phase == VolumePhase::Deleting
                }
            };
            if !unwanted || self.stopping.is_cancelled() {
                return;
            }
            if self.volume_is_open(entry.id) {
                continue;
            }
            let what = format!("volume {} cannot be deleted", entry.id);
            let delete = async {
                let _hold = self.hold(&[entry.id]).await?;
                let delete = self.pool.volume_delete(entry.id.0);
                let deleted = within(&what, self.config.times.pool, delete).await?;
                deleted.map_err(|error| fault::storage_failed(&what, &error))
            };
            let Err(fault) = delete.await else { break };
            tracing::warn!(volume = %entry.id, code = fault.code, reason = fault.message, "not deleted yet");
            if answer {
                self.volume_report(entry.id, VolumeState::Failed { fault });
            }
            drop(_work);
            tokio::select! {
                () = backoff.pause() => {}
                () = self.stopping.cancelled() => return,
            }
        }
        {
            let mut slot = entry.slot.lock();
            slot.made = false;
            slot.record = None;
        }
        if let Err(error) = self.config.keep.volume_drop(entry.id).await {
            tracing::warn!(volume = %entry.id, %error, "the volume's record stays");
        }
        self.collect().await;
        if answer {
            self.volume_report(entry.id, VolumeState::Gone);
        } else {
            let mut entries = self.volumes.entries.lock();
            if matches!(entry.slot.lock().wanted, Wanted::Missing) {
                entries.remove(&entry.id);
            }
        }
    }

    async fn volume_closed(&self, id: VolumeId) {
        loop {
            let released = self.disks_released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            if !self.volume_is_open(id) {
                return;
            }
            tokio::select! {
                () = released => {}
                () = self.stopping.cancelled() => return,
            }
        }
    }

    pub(crate) fn volume_report(&self, volume: VolumeId, state: VolumeState) {
        self.outbox.put(Report::Volume(VolumeReport { volume, state }));
    }
}

fn ready(info: &VolumeInfo) -> VolumeState {
    VolumeState::Ready { used: ByteSize(info.used), size: ByteSize(info.virtual_size) }
}

/// Whether nothing was put in meanwhile.
fn same(before: &Wanted, now: &Wanted) -> bool {
    match (before, now) {
        (Wanted::Unknown, Wanted::Unknown) | (Wanted::Missing, Wanted::Missing) => true,
        (Wanted::Placed { volume: before, .. }, Wanted::Placed { volume: now, .. }) => {
            Arc::ptr_eq(before, now)
        }
        (Wanted::Unknown | Wanted::Missing | Wanted::Placed { .. }, _) => false,
    }
}
