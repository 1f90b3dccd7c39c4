//! Disks of VMs: attached and detached, while the VM runs or not.
//!
//! What always holds: `volume.spec.vm` and the VM's `spec.disks` change in one transaction, so that no volume is ever a
//! disk of two VMs. A disk that is to be plugged into a running machine is in the list first (a start that comes in
//! between takes it along); one that is to come out leaves the list when it is out.

use std::sync::Arc;

use ostler_api::vm::{DiskBus, MachineState, MachineType, Vm, VmDisk};
use ostler_api::vm_action::VmAction;
use ostler_api::volume::{Volume, VolumePhase};
use ostler_api::{ApiError, ErrorCode, VolumeId};

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::permission::Verb;
use crate::snapshot::check_snapshots;

/// Most disks of a VM.
const fn disks_max(machine: MachineType) -> usize {
    match machine {
        MachineType::Q35 => 24,
        MachineType::I440fx => 13,
        MachineType::Microvm => 4,
    }
}

/// Whether a machine has its disks open, or may have.
pub(crate) fn has_machine(vm: &Vm) -> bool {
    vm.status.observed.as_ref().is_some_and(|seen| match seen.state {
        MachineState::Absent => false,
        MachineState::Starting
        | MachineState::Running
        | MachineState::Paused
        | MachineState::IoError
        | MachineState::Panicked
        | MachineState::Saved
        | MachineState::Unresponsive => true,
    })
}

/// Takes a disk off a VM's list.
pub(crate) fn unplug(vm: &mut Vm, volume: VolumeId) {
    vm.spec.disks.retain(|disk| disk.volume != volume);
}

/// A volume is on its own again.
pub(crate) fn release(tables: &Tables, change: &mut Change, volume: VolumeId) -> Result<(), ApiError> {
    let Some(old) = tables.volumes.get(volume.into()) else { return Ok(()) };
    let mut new = Volume::clone(old);
    new.spec.vm = None;
    if new == **old { Ok(()) } else { change.update(old.as_ref(), &new) }
}

impl Cloud {
    /// Plans the new list of disks with `volume` in it; none when it is there already.
    pub(crate) fn plan_attach(
        &self,
        tables: &Tables,
        change: &mut Change,
        caller: &Caller,
        vm: &Vm,
        volume: &str,
        bus: DiskBus,
    ) -> Result<Option<(Vm, VmAction)>, ApiError> {
        let volume = self.disk_of(tables, caller, vm, volume)?;
        let id = VolumeId::from(volume.metadata.id);
        if vm.spec.disks.iter().any(|disk| disk.volume == id) {
            return Ok(None);
        }
        check_attach(tables, vm, &volume, bus)?;
        let mut new = vm.clone();
        new.spec.disks.push(VmDisk { volume: id, bus, owned: false });
        let mut taken = Volume::clone(&volume);
        taken.spec.vm = Some(vm.metadata.id.into());
        if taken.status.node.is_none()
            && let Some(node) = &vm.status.node
        {
            taken.status.node = Some(node.clone());
            taken.status.phase = VolumePhase::Creating;
        }
        change.update(volume.as_ref(), &taken)?;
        Ok(Some((new, VmAction::Attach { volume: id })))
    }

    /// Plans the new list of disks without `volume`.
    pub(crate) fn plan_detach(
        &self,
        tables: &Tables,
        change: &mut Change,
        caller: &Caller,
        vm: &Vm,
        volume: &str,
    ) -> Result<(Vm, VmAction), ApiError> {
        let volume = self.disk_of(tables, caller, vm, volume)?;
        let id = VolumeId::from(volume.metadata.id);
        let Some(index) = vm.spec.disks.iter().position(|disk| disk.volume == id) else {
            return Err(ApiError::conflict(format!(
                "volume {} is not a disk of VM {}",
                volume.metadata.name, vm.metadata.name
            ))
            .hint("see its disks: ostler vm show"));
        };
        check_snapshots(tables, &volume)?;
        let mut new = vm.clone();
        if !has_machine(vm) {
            unplug(&mut new, id);
            release(tables, change, id)?;
        } else if index == 0 {
            return Err(ApiError::conflict(format!(
                "volume {} is what VM {} runs from",
                volume.metadata.name, vm.metadata.name
            ))
            .hint("stop it first: ostler vm shutdown"));
        } else if vm.spec.disks[index].bus != DiskBus::Virtio {
            return Err(ApiError::conflict(format!(
                "a {} disk cannot be pulled out of a running machine",
                vm.spec.disks[index].bus
            ))
            .hint("stop the VM first: ostler vm shutdown"));
        }
        Ok((new, VmAction::Detach { volume: id }))
    }

    pub(crate) fn disk_of(
        &self,
        tables: &Tables,
        caller: &Caller,
        vm: &Vm,
        volume: &str,
    ) -> Result<Arc<Volume>, ApiError> {
        let project = vm.metadata.project.as_ref().map(|project| project.as_str());
        self.find::<Volume>(tables, caller, Verb::Update, project, volume).map_err(|mut error| {
            error.field = Some("volume".to_owned());
            error
        })
    }
}

fn check_attach(tables: &Tables, vm: &Vm, volume: &Volume, bus: DiskBus) -> Result<(), ApiError> {
    let (name, vm_name) = (&volume.metadata.name, &vm.metadata.name);
    if volume.metadata.deleted.is_some() || volume.status.phase == VolumePhase::Error {
        return Err(ApiError::conflict(format!("volume {name} is {}", volume.status.phase))
            .hint("see why: ostler volume show"));
    }
    if let Some(other) = volume.spec.vm.and_then(|other| tables.vms.get(other.into())) {
        return Err(ApiError::new(
            ErrorCode::InUse,
            format!("volume {name} is a disk of VM {}", other.metadata.name),
        )
        .hint("detach it first: ostler volume detach"));
    }
    if let (Some(here), Some(there)) = (&vm.status.node, &volume.status.node)
        && here != there
    {
        return Err(ApiError::conflict(format!(
            "volume {name} is on node {there}, and VM {vm_name} is on node {here}"
        ))
        .hint("a volume is attached on the node that holds it"));
    }
    let most = disks_max(vm.spec.machine);
    if vm.spec.disks.len() >= most {
        return Err(ApiError::conflict(format!("a {} VM has at most {most} disks", vm.spec.machine)));
    }
    let unfit = match (vm.spec.machine, bus) {
        (MachineType::Q35, DiskBus::Ide) => Some("the q35 machine has no IDE controller"),
        (MachineType::I440fx, DiskBus::Sata) => Some("the i440fx machine has no SATA controller"),
        (MachineType::Microvm, DiskBus::Sata | DiskBus::Ide) => Some("a microvm has virtio disks only"),
        (MachineType::Q35 | MachineType::I440fx | MachineType::Microvm, _) => None,
    };
    if let Some(unfit) = unfit {
        return Err(ApiError::invalid("bus", unfit).hint("use virtio"));
    }
    if has_machine(vm) && (bus != DiskBus::Virtio || vm.spec.machine == MachineType::Microvm) {
        return Err(ApiError::conflict(format!(
            "a {bus} disk cannot be plugged into a {} machine that runs",
            vm.spec.machine
        ))
        .hint("stop the VM first, or use virtio on a q35 or i440fx machine"));
    }
    check_snapshots(tables, volume)
}
