//! Actions on VMs: the request queue's answer becomes a task, an operation and one transaction.

use std::sync::Arc;

use ostler_api::event::Severity;
use ostler_api::operation::{Accepted, Operation, OperationPhase};
use ostler_api::vm::{DiskBus, Power, Vm, VmDisk};
use ostler_api::vm_action::{Decision, SHUTDOWN_TIMEOUT_MAX, VmAction, decide};
use ostler_api::vm_phase::{VmPhase, vm_phase};
use ostler_api::volume::{Volume, VolumePhase};
use ostler_api::{ApiError, ByteSize, ErrorCode, Fault, OperationId, Time, VolumeId};
use uuid::Uuid;

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::event::target;
use crate::idempotency::{Idempotency, remember};
use crate::operation::{Step, advance, begin};
use crate::permission::Verb;
use crate::snapshot::{drop_snapshot, of_vm};
use crate::vm_create::{check_disk, image_use, root_volume, task, volume_name};
use crate::vm_disk::{has_machine, release};

/// What a caller asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmActionRequest {
    Start,
    Shutdown { timeout: u32, force: bool },
    Stop,
    Reset,
    Reboot { timeout: u32 },
    Pause,
    Resume,
    Suspend,
    Rebuild { image: String, disk: Option<ByteSize> },
    Attach { volume: String, bus: DiskBus },
    Detach { volume: String },
}

impl VmActionRequest {
    fn check(&self) -> Result<(), ApiError> {
        match self {
            Self::Shutdown { timeout, .. } | Self::Reboot { timeout } if *timeout > SHUTDOWN_TIMEOUT_MAX => {
                Err(ApiError::invalid(
                    "timeout",
                    format!("at most {SHUTDOWN_TIMEOUT_MAX} seconds, not {timeout}"),
                ))
            }
            Self::Rebuild { disk: Some(disk), .. } => check_disk(*disk),
            _ => Ok(()),
        }
    }

    /// The action, with the id of the volume that it is about.
    fn action(&self, volume: VolumeId) -> VmAction {
        match self {
            Self::Start => VmAction::Start,
            Self::Shutdown { timeout, force } => VmAction::Shutdown { timeout: *timeout, force: *force },
            Self::Stop => VmAction::Stop,
            Self::Reset => VmAction::Reset,
            Self::Reboot { timeout } => VmAction::Reboot { timeout: *timeout },
            Self::Pause => VmAction::Pause,
            Self::Resume => VmAction::Resume,
            Self::Suspend => VmAction::Suspend,
            Self::Rebuild { .. } => VmAction::Rebuild { volume },
            Self::Attach { .. } => VmAction::Attach { volume },
            Self::Detach { .. } => VmAction::Detach { volume },
        }
    }
}

impl Cloud {
    /// Asks for an action. The operation in the answer is a new one, or the one that is doing the same already, or none
    /// when there is nothing to do.
    pub async fn vm_act(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        request: VmActionRequest,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted<Arc<Vm>>, ApiError> {
        request.check()?;
        if let Some(made) = self.made_before(caller, idempotency.as_ref()).await? {
            return self.accepted(caller, made.id, made.operation);
        }
        let fresh = OperationId::new();
        let (id, operation) = self
            .commit(|tables, change| {
                let vm = self.find::<Vm>(tables, caller, Verb::Act, project, name)?;
                let id = vm.metadata.id;
                let volume = match &request {
                    VmActionRequest::Attach { volume, .. } | VmActionRequest::Detach { volume } => {
                        self.disk_of(tables, caller, &vm, volume)?.metadata.id.into()
                    }
                    _ => VolumeId::new(),
                };
                let action = request.action(volume);
                let operation = match decide(&action, vm.status.phase, vm.status.task.as_ref()) {
                    Decision::Already => None,
                    Decision::Join(operation) => Some(operation),
                    Decision::Refuse { detail, hint } => {
                        return Err(ApiError::conflict(format!("{}: {detail}", vm.metadata.name)).hint(hint));
                    }
                    Decision::Accept => {
                        let planned = match &request {
                            VmActionRequest::Rebuild { image, disk } => {
                                let action = self.plan_rebuild(tables, change, caller, &vm, image, *disk)?;
                                Some((Vm::clone(&vm), action))
                            }
                            VmActionRequest::Attach { volume, bus } => {
                                self.plan_attach(tables, change, caller, &vm, volume, *bus)?
                            }
                            VmActionRequest::Detach { volume } => {
                                Some(self.plan_detach(tables, change, caller, &vm, volume)?)
                            }
                            _ => Some((Vm::clone(&vm), action)),
                        };
                        match planned {
                            Some((edited, action)) => {
                                accept_edited(tables, change, &vm, edited, action, fresh)?;
                                Some(fresh)
                            }
                            None => None,
                        }
                    }
                };
                if operation.is_some() {
                    remember(change, caller, idempotency.as_ref(), id, operation)?;
                }
                Ok((id, operation))
            })
            .await?;
        self.accepted(caller, id, operation)
    }

    /// Makes the volume that a rebuild will put in the place of the root disk.
    fn plan_rebuild(
        &self,
        tables: &Tables,
        change: &mut Change,
        caller: &Caller,
        vm: &Vm,
        image: &str,
        disk: Option<ByteSize>,
    ) -> Result<VmAction, ApiError> {
        let Some(project) = &vm.metadata.project else {
            return Err(ApiError::internal("a VM without a project"));
        };
        let (image, _) = image_use(self, tables, change, caller, project, "image", image)?;
        let old = vm.spec.disks.first().and_then(|disk| tables.volumes.get(disk.volume.into()));
        // As large as it was, unless asked otherwise.
        let size = disk.or_else(|| old.map(|old| old.spec.size.max(image.virtual_size)));
        let name = volume_name(tables, project, &vm.metadata.name, Uuid::now_v7())?;
        let mut volume = root_volume(project, vm.metadata.id.into(), name, Some(image), size)?;
        if let Some(node) = &vm.status.node {
            volume.status.node = Some(node.clone());
            volume.status.phase = VolumePhase::Creating;
        }
        change.create(&volume)?;
        Ok(VmAction::Rebuild { volume: volume.metadata.id.into() })
    }

    /// Deletes a VM and the volumes it owns. With `force` it is forgotten at once when its node does not report; what is
    /// left there goes when the node comes back.
    pub async fn vm_delete(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        if_match: Option<u64>,
        force: bool,
    ) -> Result<Accepted<Arc<Vm>>, ApiError> {
        let fresh = OperationId::new();
        let (before, operation) = self
            .commit(|tables, change| {
                let vm = self.find::<Vm>(tables, caller, Verb::Delete, project, name)?;
                check_match(vm.metadata.revision, if_match)?;
                if force && vm.status.node_silent {
                    let operation = finished_delete(&vm, fresh)?;
                    change.create(&operation)?;
                    supersede(tables, change, &vm, None)?;
                    remove(tables, change, &vm)?;
                    return Ok((vm, Some(fresh)));
                }
                match decide(&VmAction::Delete, vm.status.phase, vm.status.task.as_ref()) {
                    Decision::Join(operation) => Ok((vm, Some(operation))),
                    Decision::Already => Ok((vm, None)),
                    Decision::Refuse { detail, hint } => Err(ApiError::conflict(detail).hint(hint)),
                    Decision::Accept => {
                        accept(tables, change, &vm, VmAction::Delete, fresh)?;
                        Ok((vm, Some(fresh)))
                    }
                }
            })
            .await?;
        Ok(self.going(before, operation))
    }
}

pub(crate) fn check_match(revision: u64, if_match: Option<u64>) -> Result<(), ApiError> {
    match if_match {
        Some(wanted) if wanted != revision => Err(ApiError::new(
            ErrorCode::RevisionMismatch,
            format!("it is at revision {revision}, not {wanted}"),
        )
        .hint("read it again and repeat the change")),
        Some(_) | None => Ok(()),
    }
}

fn finished_delete(vm: &Vm, id: OperationId) -> Result<Operation, ApiError> {
    begin(id, vm.metadata.project.clone(), "vm.delete", target(vm), OperationPhase::Succeeded)
}

/// Ends the operation of the task that is replaced, and gives back what it held.
fn supersede(tables: &Tables, change: &mut Change, vm: &Vm, by: Option<&VmAction>) -> Result<(), ApiError> {
    let Some(task) = &vm.status.task else { return Ok(()) };
    let by = by.map_or("delete", VmAction::name);
    let fault = Fault::new("superseded", format!("a later {by} took its place"));
    advance(tables, change, task.operation, Step::Cancelled(fault))?;
    drop_rebuild_volume(tables, change, vm)
}

/// The new volume of a rebuild that will not be finished.
pub(crate) fn drop_rebuild_volume(tables: &Tables, change: &mut Change, vm: &Vm) -> Result<(), ApiError> {
    if let Some(task) = &vm.status.task
        && let VmAction::Rebuild { volume } = &task.action
    {
        drop_volume(tables, change, *volume)?;
    }
    Ok(())
}

/// Marks a volume for deletion; one that no node holds is gone at once.
pub(crate) fn drop_volume(tables: &Tables, change: &mut Change, id: VolumeId) -> Result<(), ApiError> {
    let Some(volume) = tables.volumes.get(id.into()) else { return Ok(()) };
    if volume.status.node.is_none() {
        change.delete(volume.as_ref());
        return Ok(());
    }
    if volume.metadata.deleted.is_some() {
        return Ok(());
    }
    let mut new = Volume::clone(volume);
    new.metadata.deleted = Some(Time::now());
    new.status.phase = VolumePhase::Deleting;
    change.update(volume.as_ref(), &new)
}

/// Whether a disk goes with its VM: one that was made with it and is not protected.
fn goes_along(tables: &Tables, disk: &VmDisk) -> bool {
    disk.owned && tables.volumes.get(disk.volume.into()).is_none_or(|volume| !volume.spec.protected)
}

/// The end of a VM's record: its name is free, its own volumes go.
pub(crate) fn remove(tables: &Tables, change: &mut Change, vm: &Vm) -> Result<(), ApiError> {
    for disk in &vm.spec.disks {
        if goes_along(tables, disk) {
            drop_volume(tables, change, disk.volume)?;
        } else {
            release(tables, change, disk.volume)?;
        }
    }
    drop_rebuild_volume(tables, change, vm)?;
    // The way back to its past goes with it; linked copies stay whole.
    for snapshot in of_vm(tables, vm.metadata.id) {
        drop_snapshot(tables, change, snapshot)?;
    }
    change.delete(vm);
    change.event(
        vm.metadata.project.clone(),
        Severity::Info,
        "vm.deleted",
        target(vm),
        format!("VM {} was deleted", vm.metadata.name),
    )
}

/// Goes on with the deletion of a VM that its node has ended: first its own volumes, then, when none is left, the VM.
pub(crate) fn end_delete(tables: &Tables, change: &mut Change, old: &Vm, new: &Vm) -> Result<(), ApiError> {
    let owned = old.spec.disks.iter().filter(|disk| goes_along(tables, disk));
    let left = owned.filter_map(|disk| tables.volumes.get(disk.volume.into()));
    // What no node holds is gone at once.
    if left.filter(|volume| volume.status.node.is_some()).count() == 0 {
        if let Some(task) = &old.status.task {
            advance(tables, change, task.operation, Step::Succeeded)?;
        }
        return remove(tables, change, old);
    }
    for disk in old.spec.disks.iter().filter(|disk| goes_along(tables, disk)) {
        drop_volume(tables, change, disk.volume)?;
    }
    if new != old {
        change.update(old, new)?;
    }
    Ok(())
}

const fn power_after(action: &VmAction, now: Power) -> Power {
    match action {
        VmAction::Start | VmAction::Resume | VmAction::Reboot { .. } => Power::Running,
        VmAction::Shutdown { .. } | VmAction::Stop | VmAction::Delete => Power::Stopped,
        VmAction::Pause => Power::Paused,
        VmAction::Suspend => Power::Suspended,
        VmAction::Reset | VmAction::Rebuild { .. } | VmAction::Attach { .. } | VmAction::Detach { .. } => now,
    }
}

/// Plans an accepted action: the VM gets its task, whatever it was doing is superseded. A VM that no node has needs
/// nobody's answer for most of them.
pub(crate) fn accept(
    tables: &Tables,
    change: &mut Change,
    vm: &Vm,
    action: VmAction,
    id: OperationId,
) -> Result<(), ApiError> {
    accept_edited(tables, change, vm, vm.clone(), action, id)
}

/// The same with further changes of the VM, which `edited` has already.
fn accept_edited(
    tables: &Tables,
    change: &mut Change,
    vm: &Vm,
    edited: Vm,
    action: VmAction,
    id: OperationId,
) -> Result<(), ApiError> {
    let now = Time::now();
    supersede(tables, change, vm, Some(&action))?;
    let name = format!("vm.{}", action.name());
    let project = vm.metadata.project.clone();
    let disks_only = matches!(action, VmAction::Attach { .. } | VmAction::Detach { .. });
    let at_once = match &action {
        VmAction::Start => false,
        _ if disks_only => !has_machine(vm),
        _ => vm.status.node.is_none(),
    };
    let phase = if at_once { OperationPhase::Succeeded } else { OperationPhase::Pending };
    change.create(&begin(id, project, name, target(vm), phase)?)?;

    let mut new = edited;
    new.spec.power = power_after(&action, vm.spec.power);
    if !disks_only {
        new.status.reason = None;
    }
    match (&action, at_once) {
        (VmAction::Delete, true) => {
            let mut unbusy = vm.clone();
            // What it was doing is superseded above already.
            unbusy.status.task = None;
            return remove(tables, change, &unbusy);
        }
        (VmAction::Rebuild { volume }, true) => {
            swap_root(tables, change, &mut new, *volume)?;
            new.status.task = None;
        }
        (_, true) => new.status.task = None,
        (VmAction::Delete, false) => {
            new.metadata.deleted = Some(now);
            new.status.task = Some(task(id, action, now));
        }
        (_, false) => new.status.task = Some(task(id, action, now)),
    }
    new.status.phase = vm_phase(&new.status);
    change.update(vm, &new)
}

/// Puts a rebuild's volume in the place of the root disk and drops the old one.
pub(crate) fn swap_root(
    tables: &Tables,
    change: &mut Change,
    vm: &mut Vm,
    volume: VolumeId,
) -> Result<(), ApiError> {
    match vm.spec.disks.first_mut() {
        Some(disk) => {
            let old = std::mem::replace(disk, VmDisk { volume, owned: true, bus: disk.bus });
            if goes_along(tables, &old) {
                drop_volume(tables, change, old.volume)?;
            } else {
                release(tables, change, old.volume)?;
            }
        }
        None => vm.spec.disks.push(VmDisk { volume, bus: DiskBus::Virtio, owned: true }),
    }
    Ok(())
}

/// Cancels the operation a VM works on, where that can be undone.
pub(crate) fn cancel(
    tables: &Tables,
    change: &mut Change,
    operation: &Operation,
    fault: Fault,
) -> Result<(), ApiError> {
    let id: OperationId = operation.metadata.id.into();
    let vm = tables.vms.get(operation.spec.target.id);
    let Some((vm, task)) =
        vm.and_then(|vm| vm.status.task.as_ref().map(|task| (vm, task))).filter(|(_, t)| t.operation == id)
    else {
        // Nobody works on it any more.
        return advance(tables, change, id, Step::Cancelled(fault));
    };
    match &task.action {
        VmAction::Start | VmAction::Resume if vm.status.phase != VmPhase::Paused => {
            // A start that is taken back is a stop; saved memory stays, since a resume that failed keeps it too.
            if vm.status.node.is_none() {
                advance(tables, change, id, Step::Cancelled(fault))?;
                let mut new = Vm::clone(vm);
                new.spec.power = Power::Stopped;
                new.status.task = None;
                new.status.reason = None;
                new.status.phase = vm_phase(&new.status);
                change.update(vm.as_ref(), &new)
            } else {
                accept(tables, change, vm, VmAction::Stop, OperationId::new())
            }
        }
        VmAction::Shutdown { .. } => {
            advance(tables, change, id, Step::Cancelled(fault))?;
            let mut new = Vm::clone(vm);
            new.spec.power = Power::Running;
            new.status.task = None;
            new.status.phase = vm_phase(&new.status);
            change.update(vm.as_ref(), &new)
        }
        action => {
            Err(ApiError::conflict(format!("a {} cannot be cancelled once it has begun", action.name()))
                .hint("wait for it, or ostler vm stop"))
        }
    }
}
