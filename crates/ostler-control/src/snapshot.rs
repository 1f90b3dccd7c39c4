//! Snapshots: asked for and planned here, taken by the node that holds the disks.
//!
//! What always holds: at most one thing is done with a disk's snapshots at a time; a snapshot that has linked copies is
//! deleted by force only (the pool keeps what the copies stand on); the tree has no gaps, because whoever stood on a
//! snapshot that goes stands on its parent in the same transaction.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::metadata::labels_check;
use ostler_api::operation::{Accepted, OperationPhase};
use ostler_api::snapshot::{
    DESCRIPTION_MAX, SNAPSHOT_DEADLINE_SECS, SNAPSHOTS_MAX, Snapshot, SnapshotCreate, SnapshotDisk,
    SnapshotPatch, SnapshotPhase, SnapshotRevert, SnapshotSpec, SnapshotStatus,
};
use ostler_api::vm::{MachineState, Vm};
use ostler_api::vm_phase::VmPhase;
use ostler_api::volume::{Volume, VolumePhase};
use ostler_api::{ApiError, ErrorCode, Kind, Metadata, Name, OperationId, SnapshotId, Time, VolumeId};
use uuid::Uuid;

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::event::target;
use crate::idempotency::{Idempotency, remember};
use crate::operation::begin;
use crate::permission::Verb;
use crate::vm_act::check_match;
use crate::vm_create::{check_rename, taken};

pub(crate) fn deadline() -> Time {
    Time::now().after(Duration::from_secs(SNAPSHOT_DEADLINE_SECS))
}

/// The snapshots that hold something of a volume.
pub(crate) fn of_volume(tables: &Tables, volume: VolumeId) -> impl Iterator<Item = &Arc<Snapshot>> {
    tables
        .snapshots
        .iter()
        .filter(move |snapshot| snapshot.spec.disks.iter().any(|disk| disk.volume == volume))
}

/// The snapshots of a VM.
pub(crate) fn of_vm(tables: &Tables, vm: Uuid) -> impl Iterator<Item = &Arc<Snapshot>> {
    tables.snapshots.iter().filter(move |snapshot| snapshot.spec.vm.is_some_and(|of| of.0 == vm))
}

/// The volumes that were cloned from a snapshot.
fn copies<'a>(tables: &'a Tables, snapshot: &Snapshot) -> impl Iterator<Item = &'a Arc<Volume>> {
    let id = snapshot.metadata.id;
    tables.volumes.iter().filter(move |volume| {
        volume.metadata.deleted.is_none()
            && volume.spec.snapshot.as_ref().is_some_and(|from| from.snapshot.0 == id)
    })
}

/// Whether no machine can have the VM's disks open.
pub(crate) fn is_off(vm: &Vm) -> bool {
    let absent = vm.status.observed.as_ref().is_none_or(|seen| seen.state == MachineState::Absent);
    absent && vm.status.task.is_none() && matches!(vm.status.phase, VmPhase::Stopped | VmPhase::Error)
}

fn check_description(description: &str) -> Result<(), ApiError> {
    if description.chars().count() > DESCRIPTION_MAX {
        return Err(ApiError::invalid(
            "description",
            format!("a description has at most {DESCRIPTION_MAX} characters"),
        ));
    }
    if description.chars().any(|c| c.is_control() && c != '\n') {
        return Err(ApiError::invalid("description", "a description has no control characters"));
    }
    Ok(())
}

fn busy(what: &str, name: &Name, snapshot: &Snapshot) -> ApiError {
    ApiError::conflict(format!(
        "snapshot {} of {what} {name} is {}",
        snapshot.metadata.name, snapshot.status.phase
    ))
    .hint("wait for it: ostler snapshot show")
}

/// Refuses while something is done with the snapshots of a volume, or with all of its layers.
pub(crate) fn check_quiet(tables: &Tables, volume: &Volume) -> Result<(), ApiError> {
    if let Some(operation) = volume.status.flatten {
        return Err(ApiError::conflict(format!("volume {} is being flattened", volume.metadata.name))
            .hint(format!("wait for it, or: ostler operation cancel {operation}")));
    }
    check_snapshots(tables, volume)
}

/// Refuses while something is done with the snapshots of a volume.
pub(crate) fn check_snapshots(tables: &Tables, volume: &Volume) -> Result<(), ApiError> {
    let under_way = of_volume(tables, volume.metadata.id.into())
        .find(|one| matches!(one.status.phase, SnapshotPhase::Creating | SnapshotPhase::Reverting));
    under_way.map_or(Ok(()), |one| Err(busy("volume", &volume.metadata.name, one)))
}

impl Cloud {
    /// Takes a snapshot of all disks of a VM at one instant, or of one volume.
    pub async fn snapshot_create(
        &self,
        caller: &Caller,
        project: Option<&str>,
        request: SnapshotCreate,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted<Arc<Snapshot>>, ApiError> {
        labels_check(&request.labels).map_err(|error| ApiError::invalid("labels", error))?;
        check_description(&request.description)?;
        if let Some(made) = self.made_before(caller, idempotency.as_ref()).await? {
            return self.accepted(caller, made.id, made.operation);
        }
        let (id, operation) = (SnapshotId::new(), OperationId::new());
        self.commit(|tables, change| {
            let project = self.project(tables, caller, project, Verb::Create, Kind::Snapshot)?;
            let snapshot = self.plan_snapshot(tables, change, caller, id, &project, &request)?;
            let about = target(&snapshot);
            change.create(&snapshot)?;
            change.create(&begin(
                operation,
                Some(project),
                "snapshot.create",
                about,
                OperationPhase::Pending,
            )?)?;
            remember(change, caller, idempotency.as_ref(), id.into(), Some(operation))
        })
        .await?;
        self.accepted(caller, id.into(), Some(operation))
    }

    fn plan_snapshot(
        &self,
        tables: &Tables,
        change: &mut Change,
        caller: &Caller,
        id: SnapshotId,
        project: &Name,
        request: &SnapshotCreate,
    ) -> Result<Snapshot, ApiError> {
        if tables.snapshots.named(Some(project), &request.name).is_some() {
            return Err(taken(Kind::Snapshot, &request.name));
        }
        let in_project = Some(project.as_str());
        let (vm, volumes, others) = match (&request.vm, &request.volume) {
            (Some(name), None) => {
                let vm = self.find::<Vm>(tables, caller, Verb::Act, in_project, name)?;
                if vm.metadata.deleted.is_some() {
                    return Err(ApiError::conflict("the VM is being deleted"));
                }
                let disks = vm.spec.disks.iter().filter_map(|disk| tables.volumes.get(disk.volume.into()));
                let volumes: Vec<_> = disks.cloned().collect();
                if volumes.is_empty() {
                    return Err(ApiError::conflict(format!("VM {} has no disks", vm.metadata.name)));
                }
                change.guard(vm.as_ref());
                let others = of_vm(tables, vm.metadata.id).count();
                (Some(vm), volumes, others)
            }
            (None, Some(name)) => {
                let volume = self.find::<Volume>(tables, caller, Verb::Act, in_project, name)?;
                let others =
                    of_volume(tables, volume.metadata.id.into()).filter(|s| s.spec.vm.is_none()).count();
                (None, vec![volume], others)
            }
            (Some(_), Some(_)) | (None, None) => {
                return Err(ApiError::invalid(
                    "vm",
                    "a snapshot is of a VM or of a volume; name one of them",
                ));
            }
        };
        if others >= SNAPSHOTS_MAX {
            return Err(ApiError::conflict(format!("there are {SNAPSHOTS_MAX} snapshots of it already"))
                .hint("delete one that is not needed: ostler snapshot list"));
        }
        let node = volumes[0].status.node.clone();
        let mut disks = Vec::with_capacity(volumes.len());
        for volume in &volumes {
            check_snapshotable(tables, volume, node.as_ref())?;
            // A disk that changes hands or is deleted meanwhile is another question.
            change.guard(volume.as_ref());
            disks.push(SnapshotDisk {
                volume: volume.metadata.id.into(),
                name: volume.metadata.name.clone(),
                size: volume.spec.size,
                part: Uuid::now_v7(),
                layer: Uuid::now_v7(),
            });
        }
        let mut metadata = Metadata::new(id.into(), request.name.clone(), Some(project.clone()));
        metadata.labels.clone_from(&request.labels);
        Ok(Snapshot {
            metadata,
            spec: SnapshotSpec {
                vm: vm.map(|vm| vm.metadata.id.into()),
                disks,
                description: request.description.clone(),
            },
            status: SnapshotStatus {
                phase: SnapshotPhase::Creating,
                reason: None,
                node,
                parent: volumes[0].status.snapshot,
                taken: None,
                deadline: Some(deadline()),
                revert: None,
            },
        })
    }

    pub async fn snapshot_patch(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        if_match: Option<u64>,
        patch: SnapshotPatch,
    ) -> Result<Arc<Snapshot>, ApiError> {
        if let Some(labels) = &patch.labels {
            labels_check(labels).map_err(|error| ApiError::invalid("labels", error))?;
        }
        patch.description.as_deref().map_or(Ok(()), check_description)?;
        let id = self
            .commit(|tables, change| {
                let snapshot = self.find::<Snapshot>(tables, caller, Verb::Update, project, name)?;
                check_match(snapshot.metadata.revision, if_match)?;
                let mut new = Snapshot::clone(&snapshot);
                if let Some(name) = &patch.name {
                    check_rename(tables, snapshot.as_ref(), name)?;
                    new.metadata.name = name.clone();
                }
                if let Some(labels) = &patch.labels {
                    new.metadata.labels.clone_from(labels);
                }
                if let Some(description) = &patch.description {
                    new.spec.description.clone_from(description);
                }
                if new != *snapshot {
                    change.update(snapshot.as_ref(), &new)?;
                }
                Ok(snapshot.metadata.id)
            })
            .await?;
        self.get::<Snapshot>(caller, Some("*"), &id.to_string())
    }

    /// Deletes a snapshot, anywhere in the tree. One with linked copies only with `force`; the copies stay as they are.
    pub async fn snapshot_delete(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        if_match: Option<u64>,
        force: bool,
    ) -> Result<Accepted<Arc<Snapshot>>, ApiError> {
        let fresh = OperationId::new();
        let (before, operation) = self
            .commit(|tables, change| {
                let snapshot = self.find::<Snapshot>(tables, caller, Verb::Delete, project, name)?;
                check_match(snapshot.metadata.revision, if_match)?;
                if snapshot.metadata.deleted.is_some() {
                    let under_way = tables.open_on(snapshot.metadata.id).next();
                    return Ok((snapshot, under_way));
                }
                if snapshot.status.phase == SnapshotPhase::Reverting {
                    return Err(ApiError::conflict("its disks are being put back to it")
                        .hint("wait for it: ostler snapshot show"));
                }
                let children: Vec<_> =
                    copies(tables, &snapshot).map(|volume| volume.metadata.name.as_str()).take(10).collect();
                if !children.is_empty() && !force {
                    return Err(ApiError::new(
                        ErrorCode::InUse,
                        format!(
                            "snapshot {} has linked copies: {}",
                            snapshot.metadata.name,
                            children.join(", ")
                        ),
                    )
                    .hint("delete them first, or delete the snapshot with --force: its copies stay whole"));
                }
                let project = snapshot.metadata.project.clone();
                let phase = match snapshot.status.node {
                    Some(_) => OperationPhase::Pending,
                    None => OperationPhase::Succeeded,
                };
                change.create(&begin(
                    fresh,
                    project,
                    "snapshot.delete",
                    target(snapshot.as_ref()),
                    phase,
                )?)?;
                drop_snapshot(tables, change, &snapshot)?;
                Ok((snapshot, Some(fresh)))
            })
            .await?;
        Ok(self.going(before, operation))
    }

    /// Puts the disks of a snapshot back to what they held. What they held since is given up, unless a later snapshot
    /// has it.
    pub async fn snapshot_revert(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted<Arc<Snapshot>>, ApiError> {
        if let Some(made) = self.made_before(caller, idempotency.as_ref()).await? {
            return self.accepted(caller, made.id, made.operation);
        }
        let fresh = OperationId::new();
        let (id, operation) = self
            .commit(|tables, change| {
                let snapshot = self.find::<Snapshot>(tables, caller, Verb::Act, project, name)?;
                let id = snapshot.metadata.id;
                if let Some(revert) = &snapshot.status.revert {
                    return Ok((id, revert.operation));
                }
                if snapshot.status.phase != SnapshotPhase::Ready {
                    return Err(ApiError::conflict(format!(
                        "snapshot {} is {}",
                        snapshot.metadata.name, snapshot.status.phase
                    ))
                    .hint("only one that is ready can be gone back to"));
                }
                for disk in &snapshot.spec.disks {
                    check_revertable(tables, change, &snapshot, disk)?;
                }
                let mut new = Snapshot::clone(&snapshot);
                new.status.phase = SnapshotPhase::Reverting;
                new.status.reason = None;
                new.status.deadline = Some(deadline());
                let layers = snapshot.spec.disks.iter().map(|_| Uuid::now_v7()).collect();
                new.status.revert = Some(SnapshotRevert { operation: fresh, layers });
                change.update(snapshot.as_ref(), &new)?;
                let project = snapshot.metadata.project.clone();
                let about = target(snapshot.as_ref());
                change.create(&begin(fresh, project, "snapshot.revert", about, OperationPhase::Pending)?)?;
                remember(change, caller, idempotency.as_ref(), id, Some(fresh))?;
                Ok((id, fresh))
            })
            .await?;
        self.accepted(caller, id, Some(operation))
    }
}

fn check_snapshotable(tables: &Tables, volume: &Volume, node: Option<&Name>) -> Result<(), ApiError> {
    let name = &volume.metadata.name;
    if volume.status.phase != VolumePhase::Ready {
        return Err(ApiError::conflict(format!("volume {name} is {}", volume.status.phase))
            .hint("wait until it is ready: ostler volume show"));
    }
    if volume.status.node.as_ref() != node {
        return Err(ApiError::conflict(format!("volume {name} is on another node than the rest")));
    }
    check_quiet(tables, volume)
}

/// The disk must be where it was, and nobody may have it open.
fn check_revertable(
    tables: &Tables,
    change: &mut Change,
    snapshot: &Snapshot,
    disk: &SnapshotDisk,
) -> Result<(), ApiError> {
    let gone = || {
        ApiError::conflict(format!("volume {} does not exist any more", disk.name))
            .hint("make a new volume of the snapshot: ostler volume create NAME --snapshot SNAPSHOT")
    };
    let volume =
        tables.volumes.get(disk.volume.into()).filter(|v| v.metadata.deleted.is_none()).ok_or_else(gone)?;
    check_quiet(tables, volume)?;
    change.guard(volume.as_ref());
    let Some(vm) = volume.spec.vm.and_then(|vm| tables.vms.get(vm.into())) else {
        return match snapshot.spec.vm {
            None => Ok(()),
            Some(_) => Err(ApiError::conflict(format!("volume {} is detached from the VM", disk.name))
                .hint("attach it again: ostler volume attach")),
        };
    };
    if snapshot.spec.vm.is_some_and(|of| of.0 != vm.metadata.id) {
        return Err(ApiError::conflict(format!(
            "volume {} is a disk of another VM now, {}",
            disk.name, vm.metadata.name
        )));
    }
    change.guard(vm.as_ref());
    if is_off(vm) {
        return Ok(());
    }
    Err(ApiError::conflict(format!(
        "VM {} is {}; its disks are put back while it is stopped",
        vm.metadata.name, vm.status.phase
    ))
    .hint("stop it first: ostler vm shutdown, or ostler vm stop"))
}

/// Marks a snapshot for deletion; one that no node holds is gone at once.
pub(crate) fn drop_snapshot(
    tables: &Tables,
    change: &mut Change,
    snapshot: &Snapshot,
) -> Result<(), ApiError> {
    if snapshot.status.node.is_none() {
        return remove_snapshot(tables, change, snapshot);
    }
    if snapshot.metadata.deleted.is_some() {
        return Ok(());
    }
    let mut new = snapshot.clone();
    new.metadata.deleted = Some(Time::now());
    new.status.phase = SnapshotPhase::Deleting;
    new.status.reason = None;
    new.status.deadline = Some(deadline());
    new.status.revert = None;
    change.update(snapshot, &new)
}

/// The end of a snapshot's record. Whoever stood on it stands on its parent.
pub(crate) fn remove_snapshot(
    tables: &Tables,
    change: &mut Change,
    snapshot: &Snapshot,
) -> Result<(), ApiError> {
    let id = SnapshotId::from(snapshot.metadata.id);
    for child in tables.snapshots.iter().filter(|child| child.status.parent == Some(id)) {
        let mut new = Snapshot::clone(child);
        new.status.parent = snapshot.status.parent;
        change.update(child.as_ref(), &new)?;
    }
    for disk in &snapshot.spec.disks {
        if let Some(volume) = tables.volumes.get(disk.volume.into())
            && volume.status.snapshot == Some(id)
        {
            let mut new = Volume::clone(volume);
            new.status.snapshot = snapshot.status.parent;
            change.update(volume.as_ref(), &new)?;
        }
    }
    change.delete(snapshot);
    Ok(())
}
