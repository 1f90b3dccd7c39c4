//! Volumes: changed and deleted.

use std::sync::Arc;

use ostler_api::metadata::labels_check;
use ostler_api::operation::{Accepted, OperationPhase};
use ostler_api::vm::Vm;
use ostler_api::volume::{Volume, VolumePatch};
use ostler_api::{ApiError, ErrorCode, OperationId};

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::event::target;
use crate::operation::begin;
use crate::permission::Verb;
use crate::snapshot::of_volume;
use crate::vm_act::{check_match, drop_volume};
use crate::vm_create::check_rename;
use crate::vm_disk::has_machine;
use crate::volume_create::check_limits;

/// The VM that has this volume.
fn user<'a>(tables: &'a Tables, volume: &Volume) -> Option<&'a Arc<Vm>> {
    let vm = tables.vms.get(volume.spec.vm?.into())?;
    let has = vm.spec.disks.iter().any(|disk| disk.volume.0 == volume.metadata.id);
    let will_have = vm.status.task.as_ref().is_some_and(|task| {
        matches!(task.action, ostler_api::vm_action::VmAction::Rebuild { volume: new } if new.0 == volume.metadata.id)
    });
    (has || will_have).then_some(vm)
}

impl Cloud {
    pub async fn volume_patch(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        if_match: Option<u64>,
        patch: VolumePatch,
    ) -> Result<Arc<Volume>, ApiError> {
        if let Some(labels) = &patch.labels {
            labels_check(labels).map_err(|error| ApiError::invalid("labels", error))?;
        }
        patch.limits.as_ref().map_or(Ok(()), check_limits)?;
        let id = self
            .commit(|tables, change| {
                let volume = self.find::<Volume>(tables, caller, Verb::Update, project, name)?;
                check_match(volume.metadata.revision, if_match)?;
                let mut new = Volume::clone(&volume);
                if let Some(name) = &patch.name {
                    check_rename(tables, volume.as_ref(), name)?;
                    new.metadata.name = name.clone();
                }
                if let Some(labels) = &patch.labels {
                    new.metadata.labels.clone_from(labels);
                }
                if let Some(protected) = patch.protected {
                    new.spec.protected = protected;
                }
                if let Some(limits) = patch.limits {
                    new.spec.limits = limits;
                }
                new.spec.cache = patch.cache.unwrap_or(new.spec.cache);
                new.spec.discard = patch.discard.unwrap_or(new.spec.discard);
                let reopened = new.spec.cache != volume.spec.cache || new.spec.discard != volume.spec.discard;
                if reopened
                    && let Some(vm) = user(tables, &volume)
                    && has_machine(vm)
                {
                    return Err(ApiError::conflict(format!(
                        "VM {} has volume {} open; how it is cached and what becomes of discarded blocks change while it is not",
                        vm.metadata.name, volume.metadata.name
                    ))
                    .hint("stop the VM first: ostler vm shutdown"));
                }
                if new != *volume {
                    change.update(volume.as_ref(), &new)?;
                }
                Ok(volume.metadata.id)
            })
            .await?;
        self.get::<Volume>(caller, Some("*"), &id.to_string())
    }

    /// Deletes a volume that no VM has. Its node removes the file, then the record goes.
    pub async fn volume_delete(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        if_match: Option<u64>,
    ) -> Result<Accepted<Arc<Volume>>, ApiError> {
        let fresh = OperationId::new();
        let (before, operation) = self
            .commit(|tables, change| {
                let volume = self.find::<Volume>(tables, caller, Verb::Delete, project, name)?;
                check_match(volume.metadata.revision, if_match)?;
                if let Some(vm) = user(tables, &volume) {
                    return Err(ApiError::new(
                        ErrorCode::InUse,
                        format!("volume {} is a disk of VM {}", volume.metadata.name, vm.metadata.name),
                    )
                    .hint("detach it, or delete the VM: its own volumes go with it"));
                }
                if volume.metadata.deleted.is_some() {
                    return Ok((volume, None));
                }
                if volume.spec.protected {
                    return Err(ApiError::conflict(format!("volume {} is protected", volume.metadata.name))
                        .hint("take that back first: ostler volume set --unprotect"));
                }
                // One that is on its way out holds nothing.
                let held: Vec<_> = of_volume(tables, volume.metadata.id.into())
                    .filter(|snapshot| snapshot.metadata.deleted.is_none())
                    .map(|snapshot| snapshot.metadata.name.as_str())
                    .collect();
                if !held.is_empty() {
                    return Err(ApiError::new(
                        ErrorCode::InUse,
                        format!("volume {} has snapshots: {}", volume.metadata.name, held.join(", ")),
                    )
                    .hint("delete them first: ostler snapshot delete"));
                }
                drop_volume(tables, change, volume.metadata.id.into())?;
                let phase = match volume.status.node {
                    Some(_) => OperationPhase::Pending,
                    None => OperationPhase::Succeeded,
                };
                let project = volume.metadata.project.clone();
                change.create(&begin(fresh, project, "volume.delete", target(volume.as_ref()), phase)?)?;
                Ok((volume, Some(fresh)))
            })
            .await?;
        Ok(self.going(before, operation))
    }
}
