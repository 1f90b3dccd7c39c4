//! Revisions and compare-and-set.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;

use super::{commit, put, value};
use crate::{
    LeaseId, MAX_KEY_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES, Revision, Store, StoreError, Txn, TxnOutcome,
};

pub async fn every_change_has_its_revision(store: Arc<dyn Store>) {
    let start = store.revision().await.unwrap();
    let first = put(&store, "a", "1").await;
    assert!(first > start);
    let second = commit(&store, Txn::new().put("a", "2").put("b", "1")).await;
    assert!(second > first);
    assert_eq!(store.revision().await.unwrap(), second);

    // What changes nothing makes no revision.
    assert_eq!(commit(&store, Txn::new()).await, second);
    assert_eq!(commit(&store, Txn::new().present("a").absent("c")).await, second);
    assert_eq!(commit(&store, Txn::new().delete("never")).await, second);
    assert_eq!(store.revision().await.unwrap(), second);

    // Writing the same value is a change.
    assert!(commit(&store, Txn::new().put("a", "2")).await > second);
    let deleted = commit(&store, Txn::new().delete("a").delete("never")).await;
    assert_eq!(store.revision().await.unwrap(), deleted);
}

pub async fn a_key_tells_its_life(store: Arc<dyn Store>) {
    assert_eq!(store.get("k", None).await.unwrap(), None);
    let created = put(&store, "k", "1").await;
    let modified = put(&store, "k", "2").await;
    let kv = store.get("k", None).await.unwrap().unwrap();
    assert_eq!((kv.key.as_ref(), kv.value.as_ref()), ("k", b"2".as_slice()));
    assert_eq!((kv.created, kv.modified, kv.version, kv.lease), (created, modified, 2, None));

    commit(&store, Txn::new().delete("k")).await;
    assert_eq!(store.get("k", None).await.unwrap(), None);
    let again = put(&store, "k", "").await;
    let kv = store.get("k", None).await.unwrap().unwrap();
    assert_eq!((kv.value.len(), kv.created, kv.modified, kv.version), (0, again, again, 1));
}

pub async fn concurrent_writes_have_distinct_revisions(store: Arc<dyn Store>) {
    let writers = (0..32).map(|writer| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut revisions = Vec::new();
            for i in 0..20 {
                let key = format!("{writer}/{i}");
                let revision = put(&store, &key, "x").await;
                // One's own writes are read.
                let kv = store.get(&key, None).await.unwrap().expect("what was acknowledged is there");
                assert_eq!(kv.modified, revision);
                revisions.push(revision);
            }
            assert!(revisions.is_sorted(), "a later write has a later revision: {revisions:?}");
            revisions
        })
    });
    let all: Vec<Revision> = join_all(writers).await.into_iter().flat_map(|writer| writer.unwrap()).collect();
    let distinct: BTreeSet<_> = all.iter().collect();
    assert_eq!(distinct.len(), all.len());
    assert_eq!(store.revision().await.unwrap(), **distinct.last().unwrap());
}

pub async fn compares_over_several_keys_hold_or_nothing_happens(store: Arc<dyn Store>) {
    let a = put(&store, "a", "1").await;
    let b = put(&store, "b", "1").await;
    let good = || Txn::new().modified("a", a).modified("b", b).present("a").absent("c");
    let bad = [
        good().absent("a"),
        good().present("c"),
        good().modified("c", a),
        Txn::new().modified("a", b),
        Txn::new().modified("a", a).modified("b", Revision(b.0 + 1)),
    ];
    for txn in bad {
        let txn = txn.put("a", "bad").put("d", "bad").delete("b");
        let outcome = store.txn(txn.clone()).await.unwrap();
        assert!(matches!(outcome, TxnOutcome::Conflict { .. }), "{txn:?} gave {outcome:?}");
    }
    assert_eq!(store.revision().await.unwrap(), b, "a conflict changes nothing");

    let done = commit(&store, good().put("a", "2").put("c", "2").delete("b")).await;
    assert_eq!(value(&store, "a", None).await.as_deref(), Some("2"));
    assert_eq!(value(&store, "b", None).await, None);
    assert_eq!(store.get("c", None).await.unwrap().unwrap().modified, done);
}

pub async fn conflicts_report_the_current_value(store: Arc<dyn Store>) {
    let old = put(&store, "k", "old").await;
    let lease = store.lease_grant(std::time::Duration::from_secs(60)).await.unwrap();
    commit(&store, Txn::new().put_leased("k", "new", lease)).await;
    let now = store.get("k", None).await.unwrap();
    assert_eq!(now.as_ref().unwrap().lease, Some(lease));

    let conflict = |key: &str, current| TxnOutcome::Conflict { key: key.to_owned(), current };
    let stale = Txn::new().modified("k", old).put("k", "mine");
    assert_eq!(store.txn(stale).await.unwrap(), conflict("k", now.clone()));
    let create = Txn::new().absent("k").put("k", "mine");
    assert_eq!(store.txn(create).await.unwrap(), conflict("k", now));
    // The first that does not hold, and a key that does not exist.
    let gone = Txn::new().present("k").modified("x", old).absent("k");
    assert_eq!(store.txn(gone).await.unwrap(), conflict("x", None));
}

pub async fn a_counter_of_100_writers_loses_nothing(store: Arc<dyn Store>) {
    const WRITERS: u64 = 100;
    const EACH: u64 = 3;
    put(&store, "counter", "0").await;
    let writers = (0..WRITERS).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            let mut current = store.get("counter", None).await.unwrap();
            for _ in 0..EACH {
                current = increment(&store, current).await;
            }
        })
    });
    join_all(writers).await.into_iter().for_each(|writer| writer.unwrap());
    assert_eq!(value(&store, "counter", None).await, Some((WRITERS * EACH).to_string()));
    assert_eq!(store.get("counter", None).await.unwrap().unwrap().version, WRITERS * EACH + 1);
}

/// Tries until it succeeds; returns the value to try the next increment on, which may be stale.
async fn increment(store: &Arc<dyn Store>, mut current: Option<crate::KeyValue>) -> Option<crate::KeyValue> {
    loop {
        let kv = current.expect("nobody deletes the counter");
        let count: u64 = std::str::from_utf8(&kv.value).unwrap().parse().unwrap();
        let txn = Txn::new().modified("counter", kv.modified).put("counter", (count + 1).to_string());
        match store.txn(txn).await.unwrap() {
            TxnOutcome::Committed { .. } => return Some(kv),
            TxnOutcome::Conflict { current: now, .. } => current = now,
        }
    }
}

pub async fn limits_are_refused_clearly(store: Arc<dyn Store>) {
    let start = store.revision().await.unwrap();
    let value = Bytes::from(vec![0; MAX_VALUE_BYTES + 1]);
    let half = value.slice(..MAX_VALUE_BYTES / 2 + 1);
    let many = (0..=MAX_TXN_OPS).fold(Txn::new(), |txn, i| txn.put(format!("k{i}"), "x"));
    let too_large = [
        Txn::new().put("k", value),
        Txn::new().put("a", half.clone()).put("b", half),
        Txn::new().put("k".repeat(MAX_KEY_BYTES + 1), "x"),
        many,
    ];
    for txn in too_large {
        let error = store.txn(txn).await.unwrap_err();
        assert!(matches!(error, StoreError::TooLarge { .. }), "{error}");
    }
    let invalid = [Txn::new().put("", "x"), Txn::new().put("k", "1").delete("k"), Txn::new().present("")];
    for txn in invalid {
        let error = store.txn(txn).await.unwrap_err();
        assert!(matches!(error, StoreError::Invalid { .. }), "{error}");
    }
    let no_lease = Txn::new().put("k", "x").put_leased("l", "x", LeaseId(i64::MAX));
    let error = store.txn(no_lease).await.unwrap_err();
    assert!(matches!(error, StoreError::LeaseNotFound { id: LeaseId(i64::MAX) }), "{error}");
    assert_eq!(store.revision().await.unwrap(), start);

    let large = Bytes::from(vec![7; MAX_VALUE_BYTES - 1]);
    commit(&store, Txn::new().put("k", large.clone())).await;
    assert_eq!(store.get("k", None).await.unwrap().unwrap().value, large);
}
