//! What every back end must do, as tests. [`conformance_tests!`](crate::conformance_tests) makes a test of each case for
//! one back end.
//!
//! A case gets a fresh, empty store that nobody else writes to, and assumes nothing about the back end beyond the
//! contract at [`crate::Store`]: revisions may begin anywhere and need not follow each other without gaps. Time limits
//! are there to end a test that hangs, not to measure.

mod history;
mod leases;
mod schema;
mod transactions;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;

pub use history::*;
pub use leases::*;
pub use schema::*;
pub use transactions::*;
pub use watches::*;

use crate::{Revision, Store, Txn, TxnOutcome, Watch, WatchBatch};

/// Makes one `#[tokio::test]` of each case. The argument is a function that makes a fresh store: it is called without
/// arguments, awaited, and returns `(Arc<dyn Store>, guard)`; the guard lives as long as the test.
#[macro_export]
macro_rules! conformance_tests {
    ($fresh:path) => {
        $crate::conformance_tests! { @each $fresh:
            every_change_has_its_revision
            a_key_tells_its_life
            concurrent_writes_have_distinct_revisions
            compares_over_several_keys_hold_or_nothing_happens
            conflicts_report_the_current_value
            a_counter_of_100_writers_loses_nothing
            limits_are_refused_clearly
            a_watch_sees_one_batch_per_revision_under_its_prefix
            a_watch_begins_in_the_past
            a_watch_begins_in_the_future
            a_watch_continues_over_reconnects_under_concurrent_writers
            a_slow_watcher_misses_nothing
            the_past_can_be_read
            a_list_is_ordered_and_keeps_to_its_prefix
            pages_show_one_revision
            compaction_refuses_what_is_gone
            a_watcher_overtaken_by_compaction_is_told
            a_lease_ends_unless_kept_alive
            a_revoked_lease_takes_its_keys_in_one_revision
            a_key_hangs_on_the_lease_of_its_last_put
            a_schema_upgrade_rewrites_at_once
            a_schema_upgrade_that_fails_changes_nothing
            newer_schemas_are_refused
        }
    };
    (@each $fresh:path: $($case:ident)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $case() {
            let (store, _guard) = $fresh().await;
            $crate::conformance::$case(store).await;
        }
    )*};
}

/// Ends a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// Commits, expecting no conflict.
async fn commit(store: &Arc<dyn Store>, txn: Txn) -> Revision {
    match store.txn(txn).await.expect("the transaction is accepted") {
        TxnOutcome::Committed { revision } => revision,
        TxnOutcome::Conflict { key, current } => panic!("conflict on {key}: {current:?}"),
    }
}

async fn put(store: &Arc<dyn Store>, key: &str, value: &str) -> Revision {
    commit(store, Txn::new().put(key, value.to_owned())).await
}

/// The value of a key as text.
async fn value(store: &Arc<dyn Store>, key: &str, at: Option<Revision>) -> Option<String> {
    let kv = store.get(key, at).await.expect("the key can be read")?;
    Some(String::from_utf8(kv.value.to_vec()).expect("the tests write text"))
}

/// The next batch, which is expected to come.
async fn next(watch: &mut Watch) -> WatchBatch {
    match tokio::time::timeout(PATIENCE, watch.next()).await {
        Ok(Some(Ok(batch))) => batch,
        Ok(Some(Err(error))) => panic!("the watch failed: {error}"),
        Ok(None) => panic!("the watch ended"),
        Err(_) => panic!("no batch came in {PATIENCE:?}"),
    }
}

/// All batches up to the one of revision `last`, inclusive.
async fn until(watch: &mut Watch, last: Revision) -> Vec<WatchBatch> {
    let mut batches = Vec::new();
    while batches.last().is_none_or(|batch: &WatchBatch| batch.revision < last) {
        batches.push(next(watch).await);
    }
    batches
}

/// Revisions strictly grow: none repeated, none out of order.
fn assert_in_order(batches: &[WatchBatch]) {
    for pair in batches.windows(2) {
        assert!(pair[0].revision < pair[1].revision, "{} before {}", pair[0].revision, pair[1].revision);
    }
}
