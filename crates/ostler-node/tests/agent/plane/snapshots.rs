//! Snapshots as the control plane has them: asked for, and what it makes of the reports.

use ostler_api::snapshot::{SnapshotDisk, SnapshotPhase, SnapshotRevert, SnapshotSpec, SnapshotStatus};

use super::*;

impl Plane {
    /// A snapshot of all disks of a VM.
    pub(crate) fn snapshot_vm(&self, vm: VmId) -> SnapshotId {
        let volumes =
            self.with(|inner| inner.vms[&vm].spec.disks.iter().map(|disk| disk.volume).collect::<Vec<_>>());
        self.snapshot_create(Some(vm), &volumes)
    }

    pub(crate) fn snapshot_create(&self, vm: Option<VmId>, volumes: &[VolumeId]) -> SnapshotId {
        self.with(|inner| {
            let id = SnapshotId::new();
            let disks = volumes.iter().map(|volume| SnapshotDisk {
                volume: *volume,
                name: name("disk"),
                size: inner.volumes[volume].spec.size,
                part: Uuid::now_v7(),
                layer: Uuid::now_v7(),
            });
            let disks = disks.collect();
            let status = SnapshotStatus {
                phase: SnapshotPhase::Creating,
                reason: None,
                node: Some(name("n1")),
                parent: None,
                taken: None,
                deadline: None,
                revert: None,
            };
            let spec = SnapshotSpec { vm, disks, description: String::new() };
            let metadata = Metadata::new(id.0, name("snap"), Some(name("default")));
            inner.snapshots.insert(id, Snapshot { metadata, spec, status });
            inner.send_snapshot(id);
            id
        })
    }

    pub(crate) fn snapshot_change(&self, id: SnapshotId, change: impl FnOnce(&mut Snapshot)) {
        self.with(|inner| {
            change(inner.snapshots.get_mut(&id).unwrap());
            inner.send_snapshot(id);
        });
    }

    pub(crate) async fn snapshot_phase(&self, id: SnapshotId, phase: SnapshotPhase) -> Snapshot {
        self.wait(&format!("snapshot phase {phase}"), |inner| {
            inner.snapshots.get(&id).filter(|snapshot| snapshot.status.phase == phase).cloned()
        })
        .await
    }

    pub(crate) async fn snapshot_taken(&self, vm: VmId) -> SnapshotId {
        let id = self.snapshot_vm(vm);
        self.snapshot_phase(id, SnapshotPhase::Ready).await;
        id
    }

    pub(crate) fn snapshot_delete(&self, id: SnapshotId) {
        self.snapshot_change(id, |snapshot| {
            snapshot.metadata.deleted = Some(Time::now());
            snapshot.status.phase = SnapshotPhase::Deleting;
        });
    }

    pub(crate) async fn snapshot_gone(&self, id: SnapshotId) {
        self.wait("the snapshot's end", |inner| (!inner.snapshots.contains_key(&id)).then_some(())).await;
    }

    pub(crate) fn snapshot_revert(&self, id: SnapshotId) -> OperationId {
        let operation = OperationId::new();
        self.snapshot_change(id, |snapshot| {
            let layers = snapshot.spec.disks.iter().map(|_| Uuid::now_v7()).collect();
            snapshot.status.phase = SnapshotPhase::Reverting;
            snapshot.status.revert = Some(SnapshotRevert { operation, layers });
        });
        operation
    }

    pub(crate) async fn reverted(&self, operation: OperationId) -> Option<Fault> {
        self.wait("the end of the revert", |inner| inner.reverts.get(&operation).cloned()).await
    }
}

impl Inner {
    pub(super) fn take_snapshot(&mut self, report: SnapshotReport) -> bool {
        let Some(snapshot) = self.snapshots.get_mut(&report.snapshot) else { return false };
        let deleting = snapshot.metadata.deleted.is_some();
        let status = &mut snapshot.status;
        let is_reverting = |operation| status.revert.as_ref().is_some_and(|now| now.operation == operation);
        match report.state {
            SnapshotState::Gone if deleting => {
                self.snapshots.remove(&report.snapshot);
                self.tell(WorkLine::SnapshotGone { snapshot: report.snapshot });
                return true;
            }
            SnapshotState::Gone => return true,
            SnapshotState::Ready if deleting || status.taken.is_some() => return true,
            SnapshotState::Ready => {
                status.phase = SnapshotPhase::Ready;
                status.taken = Some(Time::now());
                status.reason = None;
            }
            SnapshotState::Failed { fault } => {
                status.reason = Some(fault);
                if !deleting {
                    status.phase = SnapshotPhase::Error;
                    self.not_taken += 1;
                }
            }
            SnapshotState::Reverted { operation } if is_reverting(operation) => {
                self.reverts.insert(operation, None);
                (status.phase, status.revert) = (SnapshotPhase::Ready, None);
                for disk in snapshot.spec.disks.clone() {
                    if let Some(volume) = self.volumes.get_mut(&disk.volume) {
                        volume.spec.size = disk.size;
                        volume.status.size = Some(disk.size);
                        self.send_volume(disk.volume);
                    }
                }
            }
            SnapshotState::NotReverted { operation, fault } if is_reverting(operation) => {
                self.reverts.insert(operation, Some(fault));
                (status.phase, status.revert) = (SnapshotPhase::Ready, None);
            }
            SnapshotState::Reverted { .. } | SnapshotState::NotReverted { .. } => return true,
        }
        self.send_snapshot(report.snapshot);
        true
    }
}
