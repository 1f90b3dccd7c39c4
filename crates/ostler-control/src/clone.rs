//! Linked copies: volumes and the disks of VMs that begin as what a snapshot holds.

use ostler_api::snapshot::{Snapshot, SnapshotDisk, SnapshotPhase};
use ostler_api::vm::{VmCreate, VmDisk};
use ostler_api::volume::{SnapshotUse, Volume, VolumeSpec, VolumeStatus};
use ostler_api::{ApiError, Metadata, Name, SnapshotId, VmId, VolumeId};
use std::sync::Arc;

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::permission::Verb;

impl Cloud {
    /// Finds a snapshot to copy, and makes the transaction fail when it changes meanwhile.
    pub(crate) fn snapshot_use(
        &self,
        tables: &Tables,
        change: &mut Change,
        caller: &Caller,
        project: &Name,
        name: &str,
    ) -> Result<Arc<Snapshot>, ApiError> {
        let at_field = |mut error: ApiError| {
            error.field = Some("snapshot".to_owned());
            error
        };
        let snapshot = self
            .find::<Snapshot>(tables, caller, Verb::Read, Some(project.as_str()), name)
            .map_err(at_field)?;
        let usable = matches!(snapshot.status.phase, SnapshotPhase::Ready | SnapshotPhase::Reverting);
        if !usable {
            return Err(at_field(
                ApiError::conflict(format!(
                    "snapshot {} is {} and cannot be copied",
                    snapshot.metadata.name, snapshot.status.phase
                ))
                .hint("wait until it is ready: ostler snapshot show"),
            ));
        }
        change.guard(snapshot.as_ref());
        Ok(snapshot)
    }

    /// The disks of a new VM: a linked copy of each disk of a snapshot.
    #[expect(clippy::too_many_arguments, reason = "one plan, made of what the request names")]
    pub(crate) fn snapshot_disks(
        &self,
        tables: &Tables,
        change: &mut Change,
        caller: &Caller,
        project: &Name,
        vm: VmId,
        request: &VmCreate,
        name: &str,
    ) -> Result<Vec<VmDisk>, ApiError> {
        let snapshot = self.snapshot_use(tables, change, caller, project, name)?;
        if let (Some(wanted), Some(there)) = (&request.node, &snapshot.status.node)
            && wanted != there
        {
            return Err(ApiError::conflict(format!("snapshot {name} is on node {there}, not on {wanted}"))
                .hint("leave the node out: a linked copy is where its snapshot is"));
        }
        let mut disks = Vec::with_capacity(snapshot.spec.disks.len());
        for (number, disk) in snapshot.spec.disks.iter().enumerate() {
            let name = disk_name(tables, project, &request.name, number, vm)?;
            let mut volume = copy_of(project, name, &snapshot, disk);
            volume.spec.vm = Some(vm);
            disks.push(VmDisk { volume: volume.metadata.id.into(), bus: request.disk_bus, owned: true });
            change.create(&volume)?;
        }
        Ok(disks)
    }
}

/// A volume that begins as `disk` of `snapshot`.
pub(crate) fn copy_of(project: &Name, name: Name, snapshot: &Snapshot, disk: &SnapshotDisk) -> Volume {
    let from = SnapshotUse { snapshot: SnapshotId::from(snapshot.metadata.id), part: disk.part };
    Volume {
        metadata: Metadata::new(VolumeId::new().into(), name, Some(project.clone())),
        spec: VolumeSpec { snapshot: Some(from), ..VolumeSpec::blank(disk.size) },
        status: VolumeStatus::pending(),
    }
}

/// `NAME-root` for the first disk, `NAME-disk1` and so on for the others.
fn disk_name(tables: &Tables, project: &Name, vm: &Name, number: usize, id: VmId) -> Result<Name, ApiError> {
    if number == 0 {
        return crate::vm_create::volume_name(tables, project, vm, id.into());
    }
    let short = |cut: usize| vm.as_str()[..vm.as_str().len().min(cut)].trim_end_matches('-').to_owned();
    let plain = Name::new(&format!("{}-disk{number}", short(56))).map_err(ApiError::internal)?;
    if tables.volumes.named(Some(project), &plain).is_none() {
        return Ok(plain);
    }
    let tail = id.0.simple().to_string().split_off(24);
    Name::new(&format!("{}-disk{number}-{tail}", short(47))).map_err(ApiError::internal)
}
