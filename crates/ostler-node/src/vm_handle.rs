//! The shared side of a VM's task: its inbox, and what others may see of it.
//!
//! The session puts the newest wish in, streams take the machine out; everything else of a VM belongs to its task.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering};

use ostler_api::vm::Vm;
use ostler_api::vm_action::VmTask as Task;
use ostler_api::{VmId, VolumeId};
use ostler_qemu::Machine;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedMutexGuard};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::console::Hub;

/// What the control plane wants of a VM here.
#[derive(Debug, Clone)]
pub(crate) enum Wanted {
    /// It has not said so yet.
    Unknown,
    Placed {
        vm: Arc<Vm>,
        cloud: Uuid,
    },
    /// It is not placed here, by the word of a cloud at a revision.
    Missing {
        cloud: Uuid,
        revision: u64,
        trust: Trust,
    },
}

/// How far the word that a VM is not wanted is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trust {
    /// It was placed here in the same session and is no longer.
    Explicit,
    /// It was not in the list of all that is placed here.
    Listed,
    /// As before, but the store is older than one that this node has seen.
    OlderStore,
}

#[derive(Debug)]
struct Inbox {
    wanted: Wanted,
    /// A session has begun: what the control plane knows is compared with what is.
    compare: bool,
}

#[derive(Debug)]
pub(crate) struct VmHandle {
    pub(crate) id: VmId,
    inbox: Mutex<Inbox>,
    bell: Notify,
    /// The machine, while one lives and answers.
    pub(crate) machine: Mutex<Option<Arc<dyn Machine>>>,
    /// Volumes that its machine has open.
    pub(crate) open: Mutex<Vec<VolumeId>>,
    /// Held by whoever changes what its disks are made of. Taken before any volume's own lock.
    disks: Arc<tokio::sync::Mutex<()>>,
    /// Cancelled once its task has looked whether there is a machine.
    pub(crate) adopted: CancellationToken,
    /// Where the console is logged now, while a machine lives.
    pub(crate) console_log: Mutex<Option<PathBuf>>,
    /// The console's hub, while somebody watches.
    pub(crate) hub: tokio::sync::Mutex<Weak<Hub>>,
    /// It belongs to another cloud, or to a newer store than the present one.
    estranged: AtomicBool,
}

impl VmHandle {
    pub(crate) fn new(id: VmId) -> Arc<Self> {
        Arc::new(Self {
            id,
            inbox: Mutex::new(Inbox { wanted: Wanted::Unknown, compare: false }),
            bell: Notify::new(),
            machine: Mutex::new(None),
            open: Mutex::default(),
            disks: Arc::default(),
            adopted: CancellationToken::new(),
            console_log: Mutex::default(),
            hub: crate::console::none(),
            estranged: AtomicBool::new(false),
        })
    }

    /// What its disks are made of stays as it is while this is held. Until it is known whether there is a machine nobody
    /// may say that its disks are closed, so that is waited for.
    pub(crate) async fn lock_disks(&self) -> OwnedMutexGuard<()> {
        self.adopted.cancelled().await;
        Arc::clone(&self.disks).lock_owned().await
    }

    /// Called by the session. Only the newest wish counts.
    pub(crate) fn want(&self, wanted: Wanted, compare: bool) {
        let mut inbox = self.inbox.lock();
        inbox.wanted = wanted;
        inbox.compare |= compare;
        drop(inbox);
        self.bell.notify_one();
    }

    pub(crate) fn wanted(&self) -> Wanted {
        self.inbox.lock().wanted.clone()
    }

    /// The newest wish, and whether a session began since the last call.
    pub(crate) fn take(&self) -> (Wanted, bool) {
        let mut inbox = self.inbox.lock();
        (inbox.wanted.clone(), std::mem::take(&mut inbox.compare))
    }

    /// Resolves once something may have been put in. Only the VM's own task waits here.
    pub(crate) async fn rung(&self) {
        self.bell.notified().await;
    }

    /// Resolves once `task` is no longer what is wanted. Only the VM's own task waits here.
    pub(crate) async fn superseded(&self, task: &Task) {
        loop {
            if !self.is_wanted(task) {
                // The bell has been heard here; the task's main loop must hear it too.
                self.bell.notify_one();
                return;
            }
            self.bell.notified().await;
        }
    }

    pub(crate) fn is_wanted(&self, task: &Task) -> bool {
        match &self.inbox.lock().wanted {
            Wanted::Placed { vm, .. } => vm.status.task.as_ref().is_some_and(|now| {
                now.operation == task.operation && now.action.name() == task.action.name()
            }),
            Wanted::Unknown | Wanted::Missing { .. } => false,
        }
    }

    pub(crate) fn estrange(&self, estranged: bool) {
        self.estranged.store(estranged, Ordering::Relaxed);
    }

    pub(crate) fn is_estranged(&self) -> bool {
        self.estranged.load(Ordering::Relaxed)
    }
}
