//! What must stand still while somebody changes what disks are made of: the VM that has them, the files of the volumes, and
//! the merges of their layers.
//!
//! Snapshots, reverts and growth work at a desk. What always holds there: no machine opens or closes one of the volumes, and
//! a volume that no machine had open stays closed. The order of the locks is the VM's, then the volumes' by id.

use std::sync::Arc;

use ostler_api::{Fault, VolumeId};
use ostler_qemu::Machine;
use tokio::sync::OwnedMutexGuard;

use crate::host::Host;
use crate::tidy::Hold;
use crate::vm_handle::{VmHandle, Wanted};

#[derive(Debug)]
pub(crate) struct Desk<'a> {
    vm: Option<Arc<VmHandle>>,
    _disks: Option<OwnedMutexGuard<()>>,
    _work: Vec<OwnedMutexGuard<()>>,
    _hold: Hold<'a>,
    host: &'a Host,
    /// What was open when the locks were had. Who opens more says so and then waits for them.
    open: Vec<VolumeId>,
}

impl Desk<'_> {
    /// The machine of the VM that has the volumes, while it lives.
    pub(crate) fn machine(&self) -> Option<Arc<dyn Machine>> {
        self.vm.as_ref()?.machine.lock().clone()
    }

    /// Whether a machine has the volume open, or may have.
    pub(crate) fn is_open(&self, volume: VolumeId) -> bool {
        self.open.contains(&volume) && self.host.volume_is_open(volume)
    }
}

impl Host {
    /// Sits down with these volumes, which `vm` finds the VM of. Long work on them makes way.
    pub(crate) async fn desk(
        &self,
        volumes: &[VolumeId],
        vm: impl Fn() -> Option<Arc<VmHandle>>,
    ) -> Result<Desk<'_>, Fault> {
        let _asking = self.volumes.ask(volumes.iter().copied());
        self.desk_quietly(volumes, vm).await
    }

    /// The same for work that takes long and makes way itself.
    pub(crate) async fn desk_quietly(
        &self,
        volumes: &[VolumeId],
        vm: impl Fn() -> Option<Arc<VmHandle>>,
    ) -> Result<Desk<'_>, Fault> {
        let mut sorted = volumes.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        loop {
            let found = vm();
            let disks = match &found {
                Some(handle) => Some(handle.lock_disks().await),
                None => None,
            };
            let mut work = Vec::with_capacity(sorted.len());
            for volume in &sorted {
                work.push(self.volumes.lock(*volume).await);
            }
            let open = volumes.iter().filter(|volume| self.volume_is_open(**volume)).copied().collect();
            // They may have come to a VM, or left it, while the locks were waited for.
            if found.as_ref().map(Arc::as_ptr) == vm().as_ref().map(Arc::as_ptr) {
                let hold = self.hold(volumes).await?;
                return Ok(Desk { vm: found, _disks: disks, _work: work, _hold: hold, host: self, open });
            }
        }
    }

    /// The VM whose disk a volume is.
    pub(crate) fn vm_of(&self, volume: VolumeId) -> Option<Arc<VmHandle>> {
        let handles: Vec<_> = self.vms.lock().values().cloned().collect();
        let opened = handles.iter().find(|handle| handle.open.lock().contains(&volume));
        let listed = || {
            handles.iter().find(|handle| match handle.wanted() {
                Wanted::Placed { vm, .. } => vm.spec.disks.iter().any(|disk| disk.volume == volume),
                Wanted::Unknown | Wanted::Missing { .. } => false,
            })
        };
        opened.or_else(listed).cloned()
    }
}
