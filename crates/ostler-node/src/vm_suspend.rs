//! Suspend: a machine's memory to a file, then its end.
//!
//! The order keeps one copy true at any moment: the file is whole and on disk, then the record says so, then the process
//! ends. Cut off before the record, the machine goes on; after it, the file counts.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::vm::{EndCause, MachineState};
use ostler_api::vm_action::VmTask as Task;
use ostler_qemu::{Machine, Progress};
use tokio::sync::watch;

use crate::fault;
use crate::host::within;
use crate::keep::{Durable, blocking};
use crate::record::SavedDisks;
use crate::vm_task::{Outcome, Sight, VmTask};

/// Between two words on how far a save is.
pub(crate) const PROGRESS_EVERY: Duration = Duration::from_millis(500);

impl VmTask {
    pub(crate) async fn suspend(&mut self, task: &Task) -> Outcome {
        if self.live.is_none() && self.record.saved {
            return Outcome::Done;
        }
        let machine = match self.living().await {
            Ok(machine) => machine,
            Err(fault) => return fault.into(),
        };
        let state = self.host.state_file(self.id());
        let dir = self.host.vm_dir(self.id());
        if let Err(error) = blocking(move || std::fs::create_dir_all(dir)).await {
            return fault::fault("save_failed", format!("no directory for the machine's memory: {error}"))
                .into();
        }
        let (host, handle) = (Arc::clone(&self.host), Arc::clone(&self.handle));
        let volumes: Vec<_> = handle.open.lock().clone();
        // No snapshot is taken and nothing is merged in the middle of it.
        let still = async { (handle.lock_disks().await, host.hold(&volumes).await) };
        let (_disks, hold) = tokio::select! {
            biased;
            () = Self::called_off(&host, &handle, task) => return Outcome::Superseded,
            still = still => still,
        };
        let _hold = match hold {
            Ok(hold) => hold,
            Err(fault) => return fault.into(),
        };
        match self.save(task, &machine, &state).await {
            Outcome::Done => {}
            other => {
                self.look().await;
                return other;
            }
        }
        self.record.saved_disks = self.disks_now(&machine).await;
        self.record.saved = true;
        if let Err(fault) = self.persist(Durable::Host).await {
            self.record.saved = false;
            self.remove_state_files().await;
            if let Err(fault) = self.command("letting the guest run", machine.resume()).await {
                tracing::warn!(reason = fault.message, "the guest stays paused");
            }
            self.look().await;
            return fault.into();
        }
        if let Err(fault) = self.end(EndCause::Asked).await {
            self.see_unresponsive(&fault.message);
            return fault.into();
        }
        self.sight = Sight::of(MachineState::Saved);
        Outcome::Done
    }

    /// Where the machine's disks are.
    async fn disks_now(&self, machine: &Arc<dyn Machine>) -> Option<SavedDisks> {
        let disks = within("asking QEMU for its disks", self.host.config.times.ask, machine.disks()).await;
        let disks = disks.ok()?.ok()?;
        let places = disks.into_iter().filter_map(|disk| Some((disk.id, disk.place?))).collect();
        Some(SavedDisks { room: machine.facts().disk_places, places })
    }

    async fn save(&mut self, task: &Task, machine: &Arc<dyn Machine>, to: &std::path::Path) -> Outcome {
        let (host, handle) = (Arc::clone(&self.host), Arc::clone(&self.handle));
        let (tx, mut rx) = watch::channel(Progress::default());
        let save = within("writing the machine's memory", host.config.times.state, machine.save(to, tx));
        let called_off = Self::called_off(&host, &handle, task);
        tokio::pin!(save, called_off);
        loop {
            tokio::select! {
                biased;
                result = &mut save => return match result {
                    Ok(Ok(())) => Outcome::Done,
                    Ok(Err(error)) => fault::machine_failed("suspending", &error).into(),
                    Err(late) => late.into(),
                },
                () = &mut called_off => return Outcome::Superseded,
                () = tokio::time::sleep(PROGRESS_EVERY) => {
                    if rx.has_changed().unwrap_or(false) {
                        let Progress { done_bytes, total_bytes } = *rx.borrow_and_update();
                        self.progress(task, "saving", done_bytes, Some(total_bytes));
                    }
                }
            }
        }
    }
}
