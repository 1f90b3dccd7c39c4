//! Making a chain shorter while the guest runs: a stream copies into the top layer what lies below it, a commit merges
//! layers in the middle into one further down; then those layers are let go.
//!
//! A disk has one job at a time. The job in QEMU goes on by itself and is not dismissed by itself, so that whoever asks next (a restarted agent too)
//! learns how it ended.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::timeout;

use super::{Desk, next_signal};
use crate::args::names;
use crate::disk::{Commit, Stream};
use crate::error::{DiskError, QmpError, Result};
use crate::machine::Progress;
use crate::qemu::machine::QemuMachine;
use crate::qmp::Connection;
use crate::qmp::block::{BlockNodeInfo, JobInfo, JobStatus};
use crate::qmp::commands::{AddFd, BlockCommit, BlockStream, Command, JobCancel, JobDismiss, QueryJobs};
use crate::text::clean;

#[derive(Debug, Clone, Copy)]
enum Work {
    Stream,
    Commit,
}

impl Work {
    fn job(self, disk: &str) -> String {
        match self {
            Self::Stream => format!("stream-{disk}"),
            Self::Commit => format!("commit-{disk}"),
        }
    }
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
        self.finish(Work::Stream, id, progress, cancel).await
    }

    pub(in crate::qemu) async fn commit_disk(
        &self,
        id: &str,
        commit: Commit,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()> {
        {
            let desk = self.desk().await?;
            if desk.begin_commit(id, commit).await? == Begun::NothingToDo {
                return Ok(());
            }
        }
        self.finish(Work::Commit, id, progress, cancel).await
    }

    /// Sees a job through. The other disks are not kept waiting.
    async fn finish(
        &self,
        work: Work,
        id: &str,
        progress: watch::Sender<Progress>,
        cancel: watch::Receiver<bool>,
    ) -> Result<()> {
        let outcome = self.follow(work, id, &progress, cancel).await?;
        let desk = self.desk().await?;
        // Unknown when somebody else waited for it too.
        match desk.qmp.execute(&JobDismiss { id: work.job(id) }).await {
            Ok(_) | Err(QmpError::Refused { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        desk.sweep(id).await?;
        outcome.map_err(Into::into)
    }

    /// Follows the job to its end.
    async fn follow(
        &self,
        work: Work,
        id: &str,
        progress: &watch::Sender<Progress>,
        mut cancel: watch::Receiver<bool>,
    ) -> Result<Result<(), DiskError>> {
        let mut signals = self.signals();
        let mut cancelled = false;
        loop {
            let qmp = self.qmp().await?;
            let Some(job) = find_job(&qmp, &work.job(id)).await? else {
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
                match qmp.execute(&JobCancel { id: work.job(id) }).await {
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
    find_any_job(qmp, &[id.to_owned()]).await
}

async fn find_any_job(qmp: &Connection, ids: &[String]) -> Result<Option<JobInfo>, QmpError> {
    Ok(qmp.execute(&QueryJobs {}).await?.into_iter().find(|job| ids.contains(&job.id)))
}

#[derive(Debug, PartialEq, Eq)]
enum Begun {
    Job,
    NothingToDo,
}

impl Desk<'_> {
    /// Begins the job, unless it is there already.
    async fn begin_stream(&self, id: &str, stream: Stream) -> Result<()> {
        let disk = self.disk(id).await?;
        if disk.top.ro {
            return Err(DiskError::ReadOnly { disk: id.into() }.into());
        }
        if self.under_way(Work::Stream, id).await? {
            return Ok(());
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
            job_id: Work::Stream.job(id),
            device: disk.node_name,
            base_node,
            backing_file,
            speed: stream.bytes_per_second,
            auto_dismiss: false,
        };
        self.qmp.execute(&job).await?;
        Ok(())
    }

    /// Whether the job is there already, under way or well ended.
    async fn under_way(&self, work: Work, id: &str) -> Result<bool, QmpError> {
        match find_job(&self.qmp, &work.job(id)).await? {
            None => self.sweep(id).await?,
            // An earlier attempt that failed while nobody looked; this is a new one.
            Some(JobInfo { status: JobStatus::Concluded, error: Some(_), .. }) => {
                self.qmp.execute(&JobDismiss { id: work.job(id) }).await?;
            }
            Some(_) => return Ok(true),
        }
        Ok(false)
    }

    async fn begin_commit(&self, id: &str, commit: Commit) -> Result<Begun> {
        let disk = self.disk(id).await?;
        if disk.top.ro {
            return Err(DiskError::ReadOnly { disk: id.into() }.into());
        }
        if self.under_way(Work::Commit, id).await? {
            return Ok(Begun::Job);
        }
        let nodes = self.nodes().await?;
        let find = |name: &str| nodes.iter().find(|node| node.node_name.as_deref() == Some(name));
        let into = commit.into.name.clone().unwrap_or_default();
        let (top_node, base_node) = (names::named_node(id, &commit.layer), names::named_node(id, &into));
        let missing = |layer: &str| DiskError::NoLayer { disk: id.into(), layer: layer.into() };
        let base_file = find(&names::file_of(&base_node)).and_then(BlockNodeInfo::fdset);
        let base_set = base_file.ok_or_else(|| missing(&into))?;
        if find(&top_node).is_none() {
            // Merged before.
            return Ok(Begun::NothingToDo);
        }
        if top_node == disk.node_name || top_node == base_node {
            return Err(missing(&commit.layer).into());
        }
        // A layer below the top was opened for reading; QEMU takes what it needs from the same set. Without the one above it
        // could not write that one's header at the end, and 7.2 dies of that.
        let mut writable = vec![(base_set, commit.into.path)];
        if let Some(above) = commit.above {
            let name = above.name.unwrap_or_default();
            let file = find(&names::file_of(&names::named_node(id, &name))).and_then(BlockNodeInfo::fdset);
            writable.push((file.ok_or_else(|| missing(&name))?, above.path));
        }
        for (fdset_id, path) in writable {
            let file = self.open(id, vec![(path, true)]).await?.remove(0);
            self.qmp.submit_fd(&AddFd { fdset_id }, Arc::new(file)).answer().await?;
        }
        let job = BlockCommit {
            job_id: Work::Commit.job(id),
            device: disk.node_name,
            top_node,
            base_node,
            backing_file: commit.backing_file,
            speed: commit.bytes_per_second,
            auto_dismiss: false,
        };
        self.qmp.execute(&job).await?;
        Ok(Begun::Job)
    }

    /// Ends the jobs of a disk that is no longer there.
    pub(super) async fn end_stream(&self, id: &str) -> Result<()> {
        let after = self.machine.open_timeout;
        let ended = async {
            let mut signals = self.machine.signals();
            let jobs = [Work::Stream.job(id), Work::Commit.job(id)];
            while let Some(job) = find_any_job(&self.qmp, &jobs).await? {
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
