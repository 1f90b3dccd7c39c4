//! Flattening: a volume is made to stand on nothing but its top layer, by QEMU while a machine has it open, else by the pool.
//!
//! What always holds: nobody waits for it. Who starts, attaches or snapshots a volume asks for it first, which interrupts the
//! pool's work (the volume stays as it was); then it is done by QEMU, or begun again. It ends when the control plane no
//! longer wants it.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::work::VolumeState;
use ostler_api::{ByteSize, Fault, OperationId};
use ostler_qemu::{Machine, Progress, Stream};
use ostler_storage::Work;
use tokio::sync::watch;

use crate::fault;
use crate::host::{Backoff, Host};
use crate::machine_spec::disk_id;
use crate::volume_task::Entry;

/// Between two words on how far it is.
const WORD: Duration = Duration::from_secs(1);
/// Between attempts when others wanted the volume.
const AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
const WHOLE: u64 = 10_000;

/// How an attempt ended.
enum End {
    Done,
    Failed(Fault),
    /// Others wanted the volume, or its machine ended.
    Interrupted,
    /// It is not wanted any more.
    CalledOff,
}

impl Host {
    pub(crate) async fn volume_flatten(&self, entry: &Entry, operation: OperationId) {
        let mut backoff = Backoff::new(AGAIN);
        loop {
            let end = tokio::select! {
                biased;
                () = self.flatten_called_off(entry, operation) => End::CalledOff,
                end = self.flatten_once(entry, operation) => end,
            };
            let state = match end {
                End::CalledOff => return,
                End::Interrupted => {
                    backoff.pause().await;
                    continue;
                }
                End::Failed(fault) => {
                    tracing::warn!(volume = %entry.id, code = fault.code, reason = fault.message, "not flattened");
                    VolumeState::NotFlattened { operation, fault }
                }
                End::Done => match self.volume_now(entry.id).await {
                    Ok(info) => VolumeState::Flattened { operation, used: ByteSize(info.used) },
                    Err(fault) => VolumeState::NotFlattened { operation, fault },
                },
            };
            self.collect().await;
            self.volume_report(entry.id, state);
            return;
        }
    }

    async fn flatten_called_off(&self, entry: &Entry, operation: OperationId) {
        loop {
            let announced = self.volumes.announced();
            tokio::pin!(announced);
            announced.as_mut().enable();
            if entry.flatten_wanted() != Some(operation) {
                return;
            }
            tokio::select! {
                () = announced => {}
                () = self.stopping.cancelled() => return,
            }
        }
    }

    async fn flatten_once(&self, entry: &Entry, operation: OperationId) -> End {
        let desk = match self.desk_quietly(&[entry.id], || self.vm_of(entry.id)).await {
            Ok(desk) => desk,
            Err(fault) => return End::Failed(fault),
        };
        let plugged = match desk.machine() {
            None => None,
            Some(machine) => match self.has_disk(&machine, entry.id).await {
                Ok(true) => Some(machine),
                Ok(false) => None,
                Err(fault) => return End::Failed(fault),
            },
        };
        match plugged {
            Some(machine) => {
                // QEMU does it beside everything else; only merges have to keep away.
                drop(desk);
                match self.hold(&[entry.id]).await {
                    Ok(_hold) => self.flatten_live(&machine, entry, operation).await,
                    Err(fault) => End::Failed(fault),
                }
            }
            None if self.volume_is_open(entry.id) => {
                End::Failed(fault::unresponsive("it has the volume open and cannot be asked to copy"))
            }
            None => self.flatten_closed(entry, operation).await,
        }
    }

    async fn flatten_live(&self, machine: &Arc<dyn Machine>, entry: &Entry, operation: OperationId) -> End {
        let (progress, mut seen) = watch::channel(Progress::default());
        // Ends the job when this is given up.
        let (cancel, cancelled) = watch::channel(false);
        let _cancel = CancelOnDrop(cancel);
        let disk = disk_id(entry.id);
        let stream = machine.disk_stream(&disk, Stream::default(), progress, cancelled);
        tokio::pin!(stream);
        let done = loop {
            tokio::select! {
                biased;
                done = &mut stream => break done,
                () = tokio::time::sleep(WORD) => {
                    let Progress { done_bytes, total_bytes } = *seen.borrow_and_update();
                    let part = u128::from(done_bytes) * u128::from(WHOLE) / u128::from(total_bytes.max(1));
                    self.flatten_word(entry, operation, u64::try_from(part).unwrap_or(WHOLE));
                }
            }
        };
        match done {
            Ok(()) => End::Done,
            // What is left is done when it is off, or on again.
            Err(_) if self.vm_of(entry.id).is_none_or(|vm| vm.machine.lock().is_none()) => End::Interrupted,
            Err(error) => End::Failed(fault::machine_failed("flattening", &error)),
        }
    }

    async fn flatten_closed(&self, entry: &Entry, operation: OperationId) -> End {
        if entry.is_asked_for() {
            return End::Interrupted;
        }
        let work = Work::default();
        let flatten = self.pool.flatten(entry.id.0, &work);
        tokio::pin!(flatten);
        loop {
            let asked = entry.asked();
            tokio::pin!(asked);
            asked.as_mut().enable();
            if entry.is_asked_for() {
                work.cancel.cancel();
                // What is half copied is put in order before anybody opens it.
                let _ = flatten.await;
                return End::Interrupted;
            }
            tokio::select! {
                biased;
                done = &mut flatten => return match done {
                    Ok(()) => End::Done,
                    Err(error) => End::Failed(fault::storage_failed("flattening", &error)),
                },
                () = asked => {}
                () = tokio::time::sleep(WORD) => self.flatten_word(entry, operation, work.progress()),
            }
        }
    }

    fn flatten_word(&self, entry: &Entry, operation: OperationId, done: u64) {
        self.volume_report(entry.id, VolumeState::Flattening { operation, done: done.min(WHOLE) });
    }
}

struct CancelOnDrop(watch::Sender<bool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}
