//! Leases.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{commit, next, put};
use crate::{Store, StoreError, Txn, WatchEvent};

const LONG: Duration = Duration::from_secs(600);

fn not_found<T: std::fmt::Debug>(result: Result<T, StoreError>) -> bool {
    matches!(result, Err(StoreError::LeaseNotFound { .. }))
}

pub async fn a_lease_ends_unless_kept_alive(store: Arc<dyn Store>) {
    // A machine so slow that the keeping alive itself came late proves nothing: try again.
    for attempt in 0..10 {
        if lease_ends_unless_kept_alive(&store, &format!("{attempt}/")).await {
            return;
        }
    }
    panic!("no attempt kept a lease alive in time");
}

async fn lease_ends_unless_kept_alive(store: &Arc<dyn Store>, prefix: &str) -> bool {
    const TTL: Duration = Duration::from_secs(2);
    let kept = store.lease_grant(TTL).await.unwrap();
    let granted = Instant::now();
    let left = store.lease_grant(TTL).await.unwrap();
    assert_ne!(kept, left);
    let (kept_key, left_key) = (format!("{prefix}kept"), format!("{prefix}left"));
    let written =
        commit(store, Txn::new().put_leased(&kept_key, "x", kept).put_leased(&left_key, "x", left)).await;
    let mut watch = store.watch(prefix, written.next()).await.unwrap();

    let mut ended = Box::pin(next(&mut watch));
    let (mut last, mut longest) = (granted, Duration::ZERO);
    let batch = loop {
        tokio::select! {
            batch = &mut ended => break batch,
            () = tokio::time::sleep(TTL / 10) => {
                let alive = store.lease_keep_alive(kept).await;
                longest = longest.max(last.elapsed());
                last = Instant::now();
                if longest >= TTL {
                    return false;
                }
                alive.expect("a lease that is kept alive lives");
            }
        }
    };
    drop(ended);
    if longest.max(last.elapsed()) >= TTL {
        return false;
    }
    assert!(granted.elapsed() >= TTL, "a lease never ends early");
    assert!(batch.revision > written);
    assert_eq!(batch.events, [WatchEvent::Delete { key: left_key.as_str().into() }]);
    assert_eq!(store.get(&left_key, None).await.unwrap(), None);
    assert!(store.get(&left_key, Some(written)).await.unwrap().is_some(), "the past stays");
    assert!(not_found(store.lease_keep_alive(left).await));
    assert!(not_found(store.lease_revoke(left).await));
    assert!(not_found(store.txn(Txn::new().put_leased("new", "x", left)).await));
    assert!(store.get(&kept_key, None).await.unwrap().is_some());
    // Left alone, it ends too.
    assert_eq!(next(&mut watch).await.events, [WatchEvent::Delete { key: kept_key.as_str().into() }]);
    true
}

pub async fn a_revoked_lease_takes_its_keys_in_one_revision(store: Arc<dyn Store>) {
    let lease = store.lease_grant(LONG).await.unwrap();
    let other = store.lease_grant(LONG).await.unwrap();
    for key in ["a", "b", "c"] {
        commit(&store, Txn::new().put_leased(key, "x", lease)).await;
    }
    commit(&store, Txn::new().put_leased("other", "x", other)).await;
    let deleted = commit(&store, Txn::new().delete("b")).await;
    let mut watch = store.watch("", deleted.next()).await.unwrap();

    store.lease_revoke(lease).await.unwrap();
    let after = store.revision().await.unwrap();
    assert!(after > deleted);
    let batch = next(&mut watch).await;
    assert_eq!(batch.revision, after);
    let mut keys: Vec<_> = batch.events.iter().map(|event| event.key().to_string()).collect();
    keys.sort();
    assert_eq!(keys, ["a", "c"]);
    assert!(batch.events.iter().all(|event| matches!(event, WatchEvent::Delete { .. })));
    assert!(store.get("other", None).await.unwrap().is_some());

    assert!(not_found(store.lease_revoke(lease).await));
    assert!(not_found(store.lease_keep_alive(lease).await));
    assert!(not_found(store.txn(Txn::new().put_leased("a", "x", lease)).await));
    store.lease_keep_alive(other).await.unwrap();

    // A lease without keys ends without a revision.
    let empty = store.lease_grant(LONG).await.unwrap();
    assert!(empty != lease && empty != other);
    store.lease_revoke(empty).await.unwrap();
    assert_eq!(store.revision().await.unwrap(), after);
    assert!(matches!(store.lease_grant(Duration::ZERO).await, Err(StoreError::Invalid { .. })));
}

pub async fn a_key_hangs_on_the_lease_of_its_last_put(store: Arc<dyn Store>) {
    let first = store.lease_grant(LONG).await.unwrap();
    let second = store.lease_grant(LONG).await.unwrap();
    commit(&store, Txn::new().put_leased("freed", "x", first).put_leased("moved", "x", first)).await;
    commit(&store, Txn::new().put_leased("again", "x", first)).await;
    commit(&store, Txn::new().put_leased("again", "y", first).put_leased("moved", "y", second)).await;
    put(&store, "freed", "y").await;
    put(&store, "bound", "x").await;
    commit(&store, Txn::new().put_leased("bound", "y", first)).await;
    assert_eq!(store.get("freed", None).await.unwrap().unwrap().lease, None);
    assert_eq!(store.get("moved", None).await.unwrap().unwrap().lease, Some(second));

    store.lease_revoke(first).await.unwrap();
    for (key, there) in [("freed", true), ("moved", true), ("again", false), ("bound", false)] {
        assert_eq!(store.get(key, None).await.unwrap().is_some(), there, "{key}");
    }
    store.lease_revoke(second).await.unwrap();
    assert_eq!(store.get("moved", None).await.unwrap(), None);
}
