//! Snapshots: taken, gone back to and deleted, level-triggered by what the control plane says of each.
//!
//! What always holds: one worker per snapshot, and only while there is something to do with it. A snapshot of disks that a
//! machine has open is prepared in the pool, switched to by QEMU for all disks at one instant, and committed in the
//! pool; cut off anywhere, the next look finishes it forward or takes it back, by what QEMU's block graph says, or, when
//! there is no machine, forward (see the pool's documentation for why that loses nothing). While QEMU does not say what it
//! writes to, nothing is said either: the worker asks again, and it ends with every part committed or taken back.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use ostler_api::snapshot::{Snapshot, SnapshotDisk, SnapshotPhase};
use ostler_api::work::{Report, SnapshotReport, SnapshotState};
use ostler_api::{Fault, SnapshotId, VmId, VolumeId};
use ostler_qemu as qemu;
use ostler_qemu::Machine;
use ostler_storage::{SnapshotInfo, SnapshotPlan, StorageError};
use parking_lot::Mutex;
use uuid::Uuid;

use crate::desk::Desk;
use crate::fault;
use crate::host::{Backoff, Host, within};
use crate::machine_spec::{disk_id, disk_layer, layer_name};
use crate::vm_handle::VmHandle;

/// Between attempts to delete one, and to learn what became of one.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

#[derive(Debug, Default)]
pub(crate) struct Snapshots(Mutex<HashMap<SnapshotId, Entry>>);

#[derive(Debug)]
struct Entry {
    wanted: Arc<Snapshot>,
    /// A worker has taken it up; it looks again at what is wanted before it ends.
    busy: bool,
}

/// Why a snapshot is not there.
#[derive(Debug)]
enum Untaken {
    /// Nothing of it is left, and the disks are as before.
    Back(Fault),
    /// A part of it may be there.
    Unknown(Fault),
}

/// What becomes of a prepared part that no machine has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closed {
    Forward,
    /// Only where nobody can have written to the new layer.
    Back,
}

#[derive(Debug)]
struct Parts {
    committed: HashSet<Uuid>,
    prepared: HashSet<Uuid>,
}

/// Whether QEMU writes to one of the new layers.
fn switched(snapshot: &Snapshot, plugged: &[qemu::DiskState]) -> bool {
    snapshot.spec.disks.iter().any(|disk| {
        let new = layer_name(disk.layer);
        plugged.iter().any(|one| one.id == disk_id(disk.volume) && one.top.as_ref() == Some(&new))
    })
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
                (SnapshotPhase::Creating, _) => self.snapshot_make(id, &wanted).await,
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

    fn vm_of_snapshot(&self, snapshot: &Snapshot) -> Option<Arc<VmHandle>> {
        let of_vm = snapshot.spec.vm.and_then(|vm: VmId| self.vm(vm));
        of_vm.or_else(|| snapshot.spec.disks.iter().find_map(|disk| self.vm_of(disk.volume)))
    }

    /// Whether QEMU has a disk of this volume.
    pub(crate) async fn has_disk(&self, machine: &Arc<dyn Machine>, volume: VolumeId) -> Result<bool, Fault> {
        let id = disk_id(volume);
        Ok(self.disks_of(machine).await?.iter().any(|disk| disk.id == id))
    }

    pub(crate) async fn disks_of(&self, machine: &Arc<dyn Machine>) -> Result<Vec<qemu::DiskState>, Fault> {
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

    /// Takes it, or settles what an attempt left behind; goes on until it is known how it ended.
    async fn snapshot_make(&self, id: SnapshotId, snapshot: &Snapshot) {
        let mut backoff = Backoff::new(RETRY);
        loop {
            // Past its deadline the control plane has called it failed.
            let (wanted, late) = match self.snapshot_phase(id) {
                Some(SnapshotPhase::Creating) => (true, false),
                Some(SnapshotPhase::Error) => (false, true),
                Some(SnapshotPhase::Ready | SnapshotPhase::Reverting | SnapshotPhase::Deleting) | None => {
                    return;
                }
            };
            let taken = if wanted {
                self.snapshot_take(snapshot).await
            } else {
                self.snapshot_settle(snapshot).await
            };
            match taken {
                Ok(()) => return self.snapshot_report(id, SnapshotState::Ready),
                Err(Untaken::Back(_)) if late => return,
                Err(Untaken::Back(fault)) => {
                    return self.snapshot_report(id, SnapshotState::Failed { fault });
                }
                Err(Untaken::Unknown(fault)) => {
                    tracing::warn!(
                        snapshot = %id, code = fault.code, reason = fault.message,
                        "what became of a snapshot is not known yet",
                    );
                }
            }
            tokio::select! {
                () = backoff.pause() => {}
                () = self.stopping.cancelled() => return,
            }
        }
    }

    fn snapshot_phase(&self, id: SnapshotId) -> Option<SnapshotPhase> {
        self.snapshots.0.lock().get(&id).map(|entry| entry.wanted.status.phase)
    }

    async fn snapshot_desk(&self, snapshot: &Snapshot) -> Result<Desk<'_>, Fault> {
        let volumes: Vec<_> = snapshot.spec.disks.iter().map(|disk| disk.volume).collect();
        self.desk(&volumes, || self.vm_of_snapshot(snapshot)).await
    }

    async fn snapshot_take(&self, snapshot: &Snapshot) -> Result<(), Untaken> {
        let desk = self.snapshot_desk(snapshot).await.map_err(Untaken::Back)?;
        let parts = self.parts(snapshot).await.map_err(Untaken::Unknown)?;
        let untouched = parts.prepared.is_empty();
        let unclear = |fault| if untouched { Untaken::Back(fault) } else { Untaken::Unknown(fault) };
        let machine = desk.machine();
        let plugged = self.plugged(snapshot, &desk).await.map_err(unclear)?;
        let is_plugged = |disk: &SnapshotDisk| plugged.iter().any(|one| one.id == disk_id(disk.volume));
        let mut overlays = Vec::new();
        for disk in snapshot.spec.disks.iter().filter(|disk| !parts.committed.contains(&disk.part)) {
            // From an attempt that was cut off; a machine that is gone may have written to the new layer.
            if parts.prepared.contains(&disk.part) && !is_plugged(disk) {
                self.commit(disk).await.map_err(Untaken::Unknown)?;
                continue;
            }
            match self.snapshot_prepare(disk).await {
                Ok(plan) => overlays.push((disk, plan)),
                Err(fault) => {
                    // Nobody writes to the new layers of closed disks: they were made just now.
                    return match self.take_back(snapshot, &plugged, Closed::Back).await {
                        Ok(_) => Err(Untaken::Back(fault)),
                        Err(unsettled) => Err(Untaken::Unknown(unsettled)),
                    };
                }
            }
        }
        if let Some(machine) = &machine
            && let Err(fault) = self.switch(machine, &plugged, &overlays).await
        {
            // QEMU did not answer, refused or died: what is true is asked of it, or told by its end.
            let switching = !plugged.is_empty();
            let now = self.plugged(snapshot, &desk).await.map_err(Untaken::Unknown)?;
            let closed = if switching && now.is_empty() || switched(snapshot, &now) {
                Closed::Forward
            } else {
                Closed::Back
            };
            return match self.take_back(snapshot, &now, closed).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(Untaken::Back(fault)),
                Err(unsettled) => Err(Untaken::Unknown(unsettled)),
            };
        }
        for (disk, _) in overlays {
            self.commit(disk).await.map_err(Untaken::Unknown)?;
        }
        Ok(())
    }

    /// Ends what an attempt left behind.
    async fn snapshot_settle(&self, snapshot: &Snapshot) -> Result<(), Untaken> {
        let desk = self.snapshot_desk(snapshot).await.map_err(Untaken::Unknown)?;
        let plugged = self.plugged(snapshot, &desk).await.map_err(Untaken::Unknown)?;
        match self.take_back(snapshot, &plugged, Closed::Forward).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Untaken::Back(fault::fault("not_taken", "the snapshot was taken back"))),
            Err(fault) => Err(Untaken::Unknown(fault)),
        }
    }

    /// The snapshot's disks that QEMU has. Fails while it cannot be said of one that may be open.
    async fn plugged(&self, snapshot: &Snapshot, desk: &Desk<'_>) -> Result<Vec<qemu::DiskState>, Fault> {
        let mut plugged = match desk.machine() {
            Some(machine) => self.disks_of(&machine).await?,
            None => Vec::new(),
        };
        plugged.retain(|one| snapshot.spec.disks.iter().any(|disk| one.id == disk_id(disk.volume)));
        for disk in &snapshot.spec.disks {
            if desk.is_open(disk.volume) && !plugged.iter().any(|one| one.id == disk_id(disk.volume)) {
                let reason = format!("it may have volume {} open and does not say so", disk.name);
                return Err(fault::unresponsive(&reason));
            }
        }
        Ok(plugged)
    }

    async fn commit(&self, disk: &SnapshotDisk) -> Result<(), Fault> {
        self.pool("committing a snapshot", self.pool.snapshot_commit(disk.volume.0, disk.part)).await
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

    /// Settles every prepared part: a disk that QEMU has goes forward where it writes to the new layer and back where it
    /// writes to the old one. True when the snapshot is whole.
    async fn take_back(
        &self,
        snapshot: &Snapshot,
        plugged: &[qemu::DiskState],
        closed: Closed,
    ) -> Result<bool, Fault> {
        let parts = self.parts(snapshot).await?;
        let mut whole = true;
        for disk in snapshot.spec.disks.iter().filter(|disk| !parts.committed.contains(&disk.part)) {
            let forward = match plugged.iter().find(|one| one.id == disk_id(disk.volume)) {
                Some(state) => state.top.as_deref() == Some(&layer_name(disk.layer)),
                None => closed == Closed::Forward,
            };
            if !parts.prepared.contains(&disk.part) {
                whole = false;
            } else if forward {
                self.commit(disk).await?;
            } else {
                whole = false;
                let abort = self.pool.snapshot_abort(disk.volume.0, disk.part);
                self.pool("taking back a snapshot", abort).await?;
            }
        }
        Ok(whole)
    }

    /// What the pool has of a snapshot.
    async fn parts(&self, snapshot: &Snapshot) -> Result<Parts, Fault> {
        let mut all = self.pool("listing the snapshots", self.pool.snapshot_list()).await?;
        all.retain(|part| snapshot.spec.disks.iter().any(|disk| disk.part == part.id));
        let (prepared, committed): (Vec<_>, Vec<_>) = all.into_iter().partition(|part| part.prepared);
        let ids = |parts: Vec<SnapshotInfo>| parts.into_iter().map(|part| part.id).collect();
        Ok(Parts { committed: ids(committed), prepared: ids(prepared) })
    }

    async fn snapshot_revert(&self, snapshot: &Snapshot, layers: &[Uuid]) -> Result<(), Fault> {
        let desk = self.snapshot_desk(snapshot).await?;
        let committed = self.parts(snapshot).await?.committed;
        for disk in &snapshot.spec.disks {
            if desk.is_open(disk.volume) {
                let message = format!("volume {} is in use; stop the VM first: ostler vm stop", disk.name);
                return Err(fault::fault("volume_in_use", message));
            }
            if !committed.contains(&disk.part) {
                let message =
                    format!("what the snapshot held of volume {} is not in this node's pool", disk.name);
                return Err(fault::fault("snapshot_missing", message));
            }
        }
        for (number, (disk, layer)) in snapshot.spec.disks.iter().zip(layers).enumerate() {
            let revert = self.pool.snapshot_revert(disk.volume.0, disk.part, *layer);
            let what = format!("putting back volume {}", disk.name);
            self.pool(&what, revert).await.map_err(|mut fault| {
                if number > 0 {
                    fault
                        .message
                        .push_str("; volumes before it are put back: revert again before the VM starts");
                }
                fault
            })?;
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
            if self.snapshot_phase(id) != Some(SnapshotPhase::Deleting) {
                return;
            }
        }
        self.collect().await;
        self.snapshot_report(id, SnapshotState::Gone);
    }

    async fn snapshot_drop(&self, snapshot: &Snapshot) -> Result<(), Fault> {
        let desk = self.snapshot_desk(snapshot).await?;
        // One that was cut off while it was taken is settled first.
        if !self.parts(snapshot).await?.prepared.is_empty() {
            let plugged = self.plugged(snapshot, &desk).await?;
            self.take_back(snapshot, &plugged, Closed::Forward).await?;
        }
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
        self.tidy.wake();
    }
}
