//! What acts by itself. One instance in the cloud at a time: the one that holds the leader's lease.
//!
//! Each controller looks at the cache, does the next step and comes again when something changed; every write is
//! fenced by the leader's key, so that one who lost the lease without noticing changes nothing.

mod deadlines;
mod images;
mod janitor;
mod nodes;
mod placement;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ostler_api::ApiError;
use ostler_store::{LeaseId, Revision, Txn, TxnOutcome};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cloud::Cloud;
use crate::commit::{Change, store_error};
use crate::keys;

/// How long to wait after a failure before the next try.
const RETRY: Duration = Duration::from_secs(1);

/// Proof of leadership at the moment of a write.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Term {
    revision: Revision,
}

impl Term {
    /// Makes a change fail once another one leads.
    pub(crate) fn fence(self, change: &mut Change) {
        change.only_if(keys::LEADER.to_owned(), self.revision);
    }
}

/// Stands for election and acts while elected, until `shutdown`.
pub(crate) async fn run(cloud: Arc<Cloud>, shutdown: CancellationToken) {
    while !shutdown.is_cancelled() {
        let (lease, term) = tokio::select! {
            () = shutdown.cancelled() => return,
            elected = elect(&cloud) => match elected {
                Ok(elected) => elected,
                Err(error) => {
                    tracing::warn!(%error, internal = error.internal, "the election failed; trying again");
                    pause(&shutdown, RETRY).await;
                    continue;
                }
            },
        };
        tracing::info!("this server's controllers act");
        cloud.metrics.leads(true);
        let stop = shutdown.child_token();
        let mut work = JoinSet::new();
        work.spawn(placement::run(Arc::clone(&cloud), term, stop.clone()));
        work.spawn(nodes::run(Arc::clone(&cloud), term, stop.clone()));
        work.spawn(deadlines::run(Arc::clone(&cloud), term, stop.clone()));
        work.spawn(images::run(Arc::clone(&cloud), stop.clone()));
        work.spawn(janitor::run(Arc::clone(&cloud), term, stop.clone()));
        keep(&cloud, lease, &stop).await;
        cloud.metrics.leads(false);
        stop.cancel();
        while work.join_next().await.is_some() {}
        if shutdown.is_cancelled() {
            // The next one need not wait for the lease to run out.
            let _ = cloud.store.lease_revoke(lease).await;
        } else {
            tracing::warn!("this server's controllers have lost the lease and act no longer");
        }
    }
}

async fn elect(cloud: &Cloud) -> Result<(LeaseId, Term), ApiError> {
    let mut changed = cloud.cache.applied();
    loop {
        changed.borrow_and_update();
        if cloud.store.get(keys::LEADER, None).await.map_err(store_error)?.is_none() {
            let lease = cloud.store.lease_grant(cloud.config.leader_lease).await.map_err(store_error)?;
            let txn = Txn::new().absent(keys::LEADER).put_leased(keys::LEADER, Bytes::new(), lease);
            match cloud.store.txn(txn).await.map_err(store_error)? {
                TxnOutcome::Committed { revision } => return Ok((lease, Term { revision })),
                TxnOutcome::Conflict { .. } => {
                    let _ = cloud.store.lease_revoke(lease).await;
                }
            }
        }
        // Its end is a revision like any other.
        if changed.changed().await.is_err() {
            return Err(ApiError::internal("the cache is gone"));
        }
    }
}

/// Renews the lease until that fails or `stop`.
async fn keep(cloud: &Cloud, lease: LeaseId, stop: &CancellationToken) {
    let every = cloud.config.leader_lease / 3;
    loop {
        pause(stop, every).await;
        if stop.is_cancelled() {
            return;
        }
        if let Err(error) = cloud.store.lease_keep_alive(lease).await {
            tracing::warn!(%error, "the leader's lease cannot be renewed");
            return;
        }
    }
}

/// Sleeps, or wakes up early to stop.
async fn pause(stop: &CancellationToken, time: Duration) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = tokio::time::sleep(time) => {}
    }
}
