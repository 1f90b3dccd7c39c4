//! Changing VMs that exist.

use std::sync::Arc;

use ostler_api::metadata::labels_check;
use ostler_api::vm::{Vm, VmPatch};
use ostler_api::vm_phase::VmPhase;
use ostler_api::{ApiError, ErrorCode};

use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::permission::Verb;
use crate::vm_act::check_match;
use crate::vm_create::{check_cpus, check_memory, check_publish, check_rename};

impl Cloud {
    /// Renames, labels, and (while it is stopped) changes CPUs, memory and published ports.
    pub async fn vm_patch(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        if_match: Option<u64>,
        patch: VmPatch,
    ) -> Result<Arc<Vm>, ApiError> {
        if let Some(labels) = &patch.labels {
            labels_check(labels).map_err(|error| ApiError::invalid("labels", error))?;
        }
        patch.cpus.map_or(Ok(()), check_cpus)?;
        patch.memory.map_or(Ok(()), check_memory)?;
        patch.publish.as_deref().map_or(Ok(()), check_publish)?;
        let id = self
            .commit(|tables, change| {
                let vm = self.find::<Vm>(tables, caller, Verb::Update, project, name)?;
                check_match(vm.metadata.revision, if_match)?;
                let new = patched(&vm, &patch)?;
                if let Some(name) = &patch.name {
                    check_rename(tables, vm.as_ref(), name)?;
                }
                if new != *vm {
                    change.update(vm.as_ref(), &new)?;
                }
                Ok(vm.metadata.id)
            })
            .await?;
        self.get::<Vm>(caller, Some("*"), &id.to_string())
    }
}

fn patched(vm: &Vm, patch: &VmPatch) -> Result<Vm, ApiError> {
    let mut new = vm.clone();
    if vm.metadata.deleted.is_some() {
        return Err(ApiError::conflict("the VM is being deleted"));
    }
    if let Some(name) = &patch.name {
        new.metadata.name = name.clone();
    }
    if let Some(labels) = &patch.labels {
        new.metadata.labels.clone_from(labels);
    }
    if let Some(cpus) = patch.cpus {
        new.spec.cpus = cpus;
    }
    if let Some(memory) = patch.memory {
        new.spec.memory = memory;
    }
    if let Some(publish) = &patch.publish {
        match new.spec.nics.first_mut() {
            Some(nic) => nic.publish.clone_from(publish),
            None => return Err(ApiError::conflict("the VM has no network card to publish ports of")),
        }
    }
    let stopped = matches!(vm.status.phase, VmPhase::Stopped | VmPhase::Error);
    if new.spec != vm.spec && !stopped {
        return Err(ApiError::new(
            ErrorCode::Conflict,
            format!(
                "the VM is {}; its CPUs, memory and published ports change while it is stopped",
                vm.status.phase
            ),
        )
        .hint("ostler vm shutdown, change it, ostler vm start"));
    }
    Ok(new)
}
