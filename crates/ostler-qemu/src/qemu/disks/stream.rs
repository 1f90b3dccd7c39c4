//! Copying into the top layer what lies in the layers below it, while the guest runs; then letting go of those layers.
//!
//! The job in QEMU goes on by itself and is not dismissed by itself, so that whoever asks next (a restarted agent too)
//! learns how it ended.

use tokio::sync::watch;
use tokio::time::timeout;

use super::{Desk, next_signal};
use crate::args::names;
use crate::disk::Stream;
use crate::error::{DiskError, QmpError, Result};
use crate::machine::Progress;
use crate::qemu::machine::QemuMachine;
use crate::qmp::Connection;
use crate::qmp::block::{JobInfo, JobStatus};
use crate::qmp::commands::{BlockStream, Command, JobCancel, JobDismiss, QueryJobs};
use crate::text::clean;

fn job_id(disk: &str) -> String {
    format!("stream-{disk}")
}

impl QemuMachine {
    pub(in crate::qemu) async fn stream_disk(
        &self,
        id: &str,
        stream: Stream,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()> {
        {
            let desk = self.desk().await?;
            desk.begin_stream(id, stream).await?;
        }
        // The other disks are not kept waiting.
        let outcome = self.follow(id, &progress, cancel).await?;
        let desk = self.desk().await?;
        // Unknown when somebody else waited for it too.
        match desk.qmp.execute(&JobDismiss { id: job_id(id) }).await {
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        desk.sweep(id).await?;
        outcome.map_err(Into::into)
    }

    /// Follows the job to its end.
    async fn follow(
        &self,
        id: &str,
        progress: &watch::Sender<Progress>,
        mut cancel: watch::Receiver<bool>,
    ) -> Result<Result<(), DiskError>> {
        let mut signals = self.signals();
        let mut cancelled = false;
        loop {
            let qmp = self.qmp().await?;
            let Some(job) = find_job(&qmp, id).await? else {
                // Dismissed by another caller, who got the error if there was one.
                return Ok(Ok(()));
            };
            progress
                .send_replace(Progress { done_bytes: job.current_progress, total_bytes: job.total_progress });
            if job.status == JobStatus::Concluded {
                return Ok(match job.error {
                    // Perhaps before a cancel reached it.
                    None => Ok(()),
                    Some(_) if cancelled => Err(DiskError::Cancelled { disk: id.into() }),
                    Some(reason) => Err(DiskError::Job { disk: id.into(), reason: clean(&reason, 512) }),
                });
            }
            if *cancel.borrow_and_update() && !cancelled {
                cancelled = true;
                match qmp.execute(&JobCancel { id: job_id(id) }).await {
                    // Refused when it has just ended.
                    Ok(_) | Err(QmpError::Refused { .. }) => {}
                    Err(other) => return Err(other.into()),
                }
            }
            tokio::select! {
                signal = next_signal(&mut signals) => { signal?; }
                () = changed(&mut cancel), if !cancelled => {}
            }
        }
    }
}

/// Pending for ever when nobody can cancel any more.
async fn changed(cancel: &mut watch::Receiver<bool>) {
    if cancel.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn find_job(qmp: &Connection, id: &str) -> Result<Option<JobInfo>, QmpError> {
    let id = job_id(id);
    Ok(qmp.execute(&QueryJobs {}).await?.into_iter().find(|job| job.id == id))
}

impl Desk<'_> {
    /// Begins the job, unless it is there already.
    async fn begin_stream(&self, id: &str, stream: Stream) -> Result<()> {
        let disk = self.disk(id).await?;
        if disk.top.ro {
            return Err(DiskError::ReadOnly { disk: id.into() }.into());
        }
        match find_job(&self.qmp, id).await? {
            None => self.sweep(id).await?,
            // An earlier attempt that failed while nobody looked; this is a new one.
            Some(JobInfo { status: JobStatus::Concluded, error: Some(_), .. }) => {
                self.qmp.execute(&JobDismiss { id: job_id(id) }).await?;
            }
            Some(_) => return Ok(()),
        }
        let (base_node, backing_file) = match stream.base {
            None => (None, None),
            Some(base) => {
                let node = names::named_node(id, &base.layer);
                let missing = || DiskError::NoLayer { disk: id.into(), layer: base.layer.clone() };
                let nodes = self.nodes().await?;
                let there = nodes.iter().any(|there| there.node_name.as_deref() == Some(&node));
                if !there || node == disk.node_name {
                    return Err(missing().into());
                }
                (Some(node), Some(base.backing_file))
            }
        };
        let job = BlockStream {
            job_id: job_id(id),
            device: disk.node_name,
            base_node,
            backing_file,
            speed: stream.bytes_per_second,
            auto_dismiss: false,
        };
        self.qmp.execute(&job).await?;
        Ok(())
    }

    /// Ends the job of a disk that is no longer there.
    pub(super) async fn end_stream(&self, id: &str) -> Result<()> {
        let after = self.machine.open_timeout;
        let ended = async {
            let mut signals = self.machine.signals();
            while let Some(job) = find_job(&self.qmp, id).await? {
                let ended = if job.status == JobStatus::Concluded {
                    self.qmp.execute(&JobDismiss { id: job.id }).await
                } else {
                    self.qmp.execute(&JobCancel { id: job.id }).await
                };
                match ended {
                    Ok(_) | Err(QmpError::Refused { .. }) => {}
                    Err(other) => return Err(other),
                }
                next_signal(&mut signals).await?;
            }
            Ok(())
        };
        Ok(timeout(after, ended)
            .await
            .unwrap_or(Err(QmpError::Timeout { command: JobCancel::NAME, after }))?)
    }
}
