//! Snapshots: taken, gone back to and deleted, level-triggered by what the control plane says of each.
//!
//! What always holds: one worker per snapshot, and only while there is something to do with it. A snapshot of disks that a
//! machine has open is prepared in the pool, switched to by QEMU for all disks at one instant, and committed in the
//! pool; cut off anywhere, the next look finishes it forward or takes it back, by what QEMU's block graph says, or, when
//! there is no machine, forward (see the pool's documentation for why that loses nothing).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ostler_api::snapshot::{Snapshot, SnapshotDisk, SnapshotPhase};
use ostler_api::work::{Report, SnapshotReport, SnapshotState};
use ostler_api::{Fault, SnapshotId, VmId, VolumeId};
use ostler_qemu as qemu;
use ostler_qemu::Machine;
use ostler_storage::{SnapshotPlan, StorageError};
use parking_lot::Mutex;
use uuid::Uuid;

use crate::fault;
use crate::host::{Backoff, Host, within};
use crate::machine_spec::{disk_id, disk_layer, layer_name};
use crate::vm_handle::{VmHandle, Wanted};

/// Between attempts to delete one.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

#[derive(Debug, Default)]
pub(crate) struct Snapshots(Mutex<HashMap<SnapshotId, Entry>>);

#[derive(Debug)]
struct Entry {
    wanted: Arc<Snapshot>,
    /// A worker has taken it up; it looks again at what is wanted before it ends.
    busy: bool,
}

impl Host {
    /// A snapshot is placed here, new or changed.
    pub(crate) fn snapshot_want(self: &Arc<Self>, snapshot: Arc<Snapshot>) {
        let id = SnapshotId::from(snapshot.metadata.id);
        let work = match snapshot.status.phase {
            SnapshotPhase::Creating | SnapshotPhase::Reverting | SnapshotPhase::Deleting => true,
            SnapshotPhase::Ready | SnapshotPhase::Error => false,
        };
        let begin = {
            let mut entries = self.snapshots.0.lock();
            let entry =
                entries.entry(id).or_insert_with(|| Entry { wanted: Arc::clone(&snapshot), busy: false });
            entry.wanted = snapshot;
            work && !std::mem::replace(&mut entry.busy, true)
        };
        if begin {
            let host = Arc::clone(self);
            self.spawn(async move { Box::pin(host.snapshot_worker(id)).await });
        }
    }

    /// A snapshot is gone; what the pool has of one that was never heard of is left alone.
    pub(crate) fn snapshot_unwant(&self, id: SnapshotId) {
        self.snapshots.0.lock().remove(&id);
    }

    async fn snapshot_worker(self: &Arc<Self>, id: SnapshotId) {
        loop {
            let Some(wanted) = self.snapshots.0.lock().get(&id).map(|entry| Arc::clone(&entry.wanted)) else {
                return;
            };
            match (wanted.status.phase, &wanted.status.revert) {
                (SnapshotPhase::Creating, _) => {
                    let state = match self.snapshot_take(&wanted).await {
                        Ok(()) => SnapshotState::Ready,
                        Err(fault) => SnapshotState::Failed { fault },
                    };
                    self.snapshot_report(id, state);
                }
                (SnapshotPhase::Reverting, Some(revert)) => {
                    let operation = revert.operation;
                    let state = match self.snapshot_revert(&wanted, &revert.layers).await {
                        Ok(()) => SnapshotState::Reverted { operation },
                        Err(fault) => SnapshotState::NotReverted { operation, fault },
                    };
                    self.snapshot_report(id, state);
                    self.collect().await;
                }
                (SnapshotPhase::Deleting, _) => self.snapshot_delete(id, &wanted).await,
                (SnapshotPhase::Ready | SnapshotPhase::Error | SnapshotPhase::Reverting, _) => {}
            }
            let mut entries = self.snapshots.0.lock();
            let Some(entry) = entries.get_mut(&id) else { return };
            if self.stopping.is_cancelled() || Arc::ptr_eq(&entry.wanted, &wanted) {
                entry.busy = false;
                return;
            }
        }
    }

    fn snapshot_report(&self, snapshot: SnapshotId, state: SnapshotState) {
        if let SnapshotState::Failed { fault } | SnapshotState::NotReverted { fault, .. } = &state {
            tracing::warn!(%snapshot, code = fault.code, reason = fault.message, "a snapshot was not done");
        }
        self.outbox.put(Report::Snapshot(SnapshotReport { snapshot, state }));
    }

    /// The VM whose disk a volume is.
    pub(crate) fn vm_of(&self, volume: VolumeId) -> Option<Arc<VmHandle>> {
        let handles: Vec<_> = self.vms.lock().values().cloned().collect();
        handles.into_iter().find(|handle| {
            let listed = match handle.wanted() {
                Wanted::Placed { vm, .. } => vm.spec.disks.iter().any(|disk| disk.volume == volume),
                Wanted::Unknown | Wanted::Missing { .. } => false,
            };
            listed || handle.open.lock().contains(&volume)
        })
    }

    fn vm_of_snapshot(&self, snapshot: &Snapshot) -> Option<Arc<VmHandle>> {
        let of_vm = snapshot.spec.vm.and_then(|vm: VmId| self.vm(vm));
        of_vm.or_else(|| snapshot.spec.disks.iter().find_map(|disk| self.vm_of(disk.volume)))
    }

    /// Whether QEMU has a disk of this volume.
    pub(crate) async fn has_disk(&self, machine: &Arc<dyn Machine>, volume: VolumeId) -> Result<bool, Fault> {
        let id = disk_id(volume);
        Ok(self.disks_of(machine).await?.iter().any(|disk| disk.id == id))
    }

    async fn disks_of(&self, machine: &Arc<dyn Machine>) -> Result<Vec<qemu::DiskState>, Fault> {
        let what = "asking QEMU for its disks";
        let disks = within(what, self.config.times.ask, machine.disks()).await?;
        disks.map_err(|error| fault::machine_failed(what, &error))
    }

    async fn pool<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, Fault> {
        let done = within(what, self.config.times.pool, call).await?;
        done.map_err(|error| fault::storage_failed(what, &error))
    }

    async fn snapshot_take(&self, snapshot: &Snapshot) -> Result<(), Fault> {
        let handle = self.vm_of_snapshot(snapshot);
        let _disks = match &handle {
            Some(handle) => Some(handle.disks.lock().await),
            None => None,
        };
        let committed = self.parts_committed().await?;
        let left: Vec<&SnapshotDisk> =
            snapshot.spec.disks.iter().filter(|disk| !committed.contains(&disk.part)).collect();
        let machine = handle.as_ref().and_then(|handle| handle.machine.lock().clone());
        let plugged = match &machine {
            Some(machine) => self.disks_of(machine).await?,
            None => Vec::new(),
        };
        for disk in &left {
            if self.volume_is_open(disk.volume) && !plugged.iter().any(|one| one.id == disk_id(disk.volume)) {
                return Err(fault::unresponsive("it has the disk open and cannot be asked for a snapshot"));
            }
        }
        let mut overlays = Vec::new();
        for disk in &left {
            let plan = self.snapshot_prepare(disk).await;
            match plan {
                Ok(plan) => overlays.push((*disk, plan)),
                Err(fault) => {
                    // Nothing has been switched to yet.
                    self.take_back(snapshot, machine.as_ref()).await;
                    return Err(fault);
                }
            }
        }
        if let Some(machine) = &machine
            && let Err(fault) = self.switch(machine, &plugged, &overlays).await
        {
            // QEMU did not answer, refused or died: what is true is asked of it, or told by its end.
            let machine = handle.as_ref().and_then(|handle| handle.machine.lock().clone());
            return if self.take_back(snapshot, machine.as_ref()).await { Ok(()) } else { Err(fault) };
        }
        for (disk, _) in overlays {
            let commit = self.pool.snapshot_commit(disk.volume.0, disk.part);
            self.pool("committing a snapshot", commit).await?;
        }
        Ok(())
    }

    async fn snapshot_prepare(&self, disk: &SnapshotDisk) -> Result<SnapshotPlan, Fault> {
        let prepare = self.pool.snapshot_prepare(disk.volume.0, disk.part, disk.layer);
        self.pool(&format!("preparing a snapshot of volume {}", disk.name), prepare).await
    }

    /// Lets QEMU write to the new layers from one instant on: all of them or none.
    async fn switch(
        &self,
        machine: &Arc<dyn Machine>,
        plugged: &[qemu::DiskState],
        overlays: &[(&SnapshotDisk, SnapshotPlan)],
    ) -> Result<(), Fault> {
        let mut disks = Vec::with_capacity(overlays.len());
        for (disk, plan) in overlays {
            let id = disk_id(disk.volume);
            if plugged.iter().any(|one| one.id == id) {
                let overlay = disk_layer(&plan.overlay)
                    .map_err(|error| fault::fault("machine_invalid", error.to_string()))?;
                disks.push(qemu::SnapshotDisk { id, overlay });
            }
        }
        if disks.is_empty() {
            return Ok(());
        }
        let what = "taking the snapshot";
        let took = within(what, self.config.times.ask, machine.disks_snapshot(disks)).await?;
        let took = took.map_err(|error| fault::machine_failed(what, &error))?;
        tracing::info!(millis = took.as_secs_f64() * 1e3, "the disks write to new layers");
        Ok(())
    }

    /// Settles every prepared part: forward where QEMU writes to the new layer and where nobody has the disk open, back
    /// where QEMU writes to the old one. Without an answer nothing is touched; the next look finishes it. True when the
    /// snapshot is whole.
    async fn take_back(&self, snapshot: &Snapshot, machine: Option<&Arc<dyn Machine>>) -> bool {
        let Ok(prepared) = self.parts_prepared().await else { return false };
        let plugged = match machine {
            None => Vec::new(),
            Some(machine) => match self.disks_of(machine).await {
                Ok(plugged) => plugged,
                Err(fault) => {
                    tracing::warn!(reason = fault.message, "what became of a snapshot is not known yet");
                    return false;
                }
            },
        };
        let mut whole = true;
        for disk in &snapshot.spec.disks {
            if !prepared.contains(&disk.part) {
                continue;
            }
            let state = plugged.iter().find(|one| one.id == disk_id(disk.volume));
            if state.is_none() && self.volume_is_open(disk.volume) && machine.is_some() {
                whole = false;
                continue;
            }
            let forward = state.is_none_or(|one| one.top.as_deref() == Some(&layer_name(disk.layer)));
            let settled = if forward {
                self.pool("committing a snapshot", self.pool.snapshot_commit(disk.volume.0, disk.part)).await
            } else {
                whole = false;
                self.pool("taking back a snapshot", self.pool.snapshot_abort(disk.volume.0, disk.part)).await
            };
            if let Err(fault) = settled {
                tracing::warn!(reason = fault.message, "a snapshot is not settled yet");
                whole = false;
            }
        }
        whole
    }

    async fn parts_committed(&self) -> Result<HashSet<Uuid>, Fault> {
        let all = self.pool("listing the snapshots", self.pool.snapshot_list()).await?;
        Ok(all.into_iter().filter(|part| !part.prepared).map(|part| part.id).collect())
    }

    async fn parts_prepared(&self) -> Result<HashSet<Uuid>, Fault> {
        let all = self.pool("listing the snapshots", self.pool.snapshot_list()).await?;
        Ok(all.into_iter().filter(|part| part.prepared).map(|part| part.id).collect())
    }

    async fn snapshot_revert(&self, snapshot: &Snapshot, layers: &[Uuid]) -> Result<(), Fault> {
        let handle = self.vm_of_snapshot(snapshot);
        let _disks = match &handle {
            Some(handle) => Some(handle.disks.lock().await),
            None => None,
        };
        let committed = self.parts_committed().await?;
        for disk in &snapshot.spec.disks {
            if self.volume_is_open(disk.volume) {
                let message = format!("volume {} is in use; stop the VM first: ostler vm stop", disk.name);
                return Err(fault::fault("volume_in_use", message));
            }
            if !committed.contains(&disk.part) {
                let message =
                    format!("what the snapshot held of volume {} is not in this node's pool", disk.name);
                return Err(fault::fault("snapshot_missing", message));
            }
        }
        for (disk, layer) in snapshot.spec.disks.iter().zip(layers) {
            let revert = self.pool.snapshot_revert(disk.volume.0, disk.part, *layer);
            self.pool(&format!("putting back volume {}", disk.name), revert).await?;
        }
        Ok(())
    }

    /// Goes on until it is deleted or no longer to be.
    async fn snapshot_delete(&self, id: SnapshotId, snapshot: &Snapshot) {
        let mut backoff = Backoff::new(RETRY);
        loop {
            match self.snapshot_drop(snapshot).await {
                Ok(()) => break,
                Err(fault) => self.snapshot_report(id, SnapshotState::Failed { fault }),
            }
            tokio::select! {
                () = backoff.pause() => {}
                () = self.stopping.cancelled() => return,
            }
        }
        self.collect().await;
        self.snapshot_report(id, SnapshotState::Gone);
    }

    async fn snapshot_drop(&self, snapshot: &Snapshot) -> Result<(), Fault> {
        let handle = self.vm_of_snapshot(snapshot);
        let _disks = match &handle {
            Some(handle) => Some(handle.disks.lock().await),
            None => None,
        };
        // One that was cut off while it was taken is settled first.
        let machine = handle.as_ref().and_then(|handle| handle.machine.lock().clone());
        self.take_back(snapshot, machine.as_ref()).await;
        for disk in &snapshot.spec.disks {
            self.pool("deleting a snapshot", self.pool.snapshot_delete(disk.part)).await?;
        }
        Ok(())
    }

    /// Removes layers that nothing needs any more. A failure costs room and nothing else.
    pub(crate) async fn collect(&self) {
        // What a machine has open stands below a volume's top, which is never garbage.
        match self.pool("collecting layers", self.pool.collect(&HashSet::new())).await {
            Ok(removed) if removed.is_empty() => {}
            Ok(removed) => tracing::info!(layers = removed.len(), "layers that nothing needed are removed"),
            Err(fault) => tracing::warn!(reason = fault.message, "layers that nothing needs stay"),
        }
    }
}
