//! Watches: nothing missed, nothing repeated, nothing out of order.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;

use super::{assert_in_order, commit, next, put, until};
use crate::{KeyValue, Revision, Store, Txn, WatchBatch, WatchEvent};

fn keys(batch: &WatchBatch) -> Vec<&str> {
    batch.events.iter().map(|event| event.key().as_ref()).collect()
}

pub async fn a_watch_sees_one_batch_per_revision_under_its_prefix(store: Arc<dyn Store>) {
    let start = store.revision().await.unwrap().next();
    let mut narrow = store.watch("/vms/", start).await.unwrap();
    let mut wide = store.watch("", start).await.unwrap();
    let mixed = commit(&store, Txn::new().put("/vms/b", "1").put("/nodes/a", "1").put("/vms/a", "1")).await;
    let other = put(&store, "/vms", "not below /vms/").await;
    let last = commit(&store, Txn::new().delete("/vms/a").put("/vms/b", "2")).await;

    let seen = until(&mut narrow, last).await;
    assert_eq!(seen.iter().map(|batch| batch.revision).collect::<Vec<_>>(), [mixed, last]);
    assert_eq!(keys(&seen[0]), ["/vms/b", "/vms/a"]);
    assert_eq!(seen[1].events[0], WatchEvent::Delete { key: "/vms/a".into() });
    let b = store.get("/vms/b", None).await.unwrap().unwrap();
    let expected = KeyValue {
        value: "2".into(),
        created: mixed,
        modified: last,
        version: 2,
        lease: None,
        key: b.key.clone(),
    };
    assert_eq!(b, expected);
    assert_eq!(seen[1].events[1], WatchEvent::Put { kv: b });

    let seen = until(&mut wide, last).await;
    assert_eq!(seen.iter().map(|batch| batch.revision).collect::<Vec<_>>(), [mixed, other, last]);
    assert_eq!(keys(&seen[0]), ["/vms/b", "/nodes/a", "/vms/a"]);
}

pub async fn a_watch_begins_in_the_past(store: Arc<dyn Store>) {
    let mut revisions = Vec::new();
    for i in 0..50 {
        let key = format!("{}/{i}", if i % 2 == 0 { "even" } else { "odd" });
        revisions.push(put(&store, &key, "x").await);
    }
    let mut watch = store.watch("even/", revisions[10]).await.unwrap();
    let seen = until(&mut watch, revisions[48]).await;
    let expected: Vec<_> = revisions[10..=48].iter().step_by(2).copied().collect();
    assert_eq!(seen.iter().map(|batch| batch.revision).collect::<Vec<_>>(), expected);
    // And goes on into the present.
    let new = put(&store, "even/new", "x").await;
    assert_eq!(next(&mut watch).await.revision, new);

    // From the very beginning.
    let mut watch = store.watch("", Revision(0)).await.unwrap();
    assert_eq!(until(&mut watch, new).await.len(), 51);
}

pub async fn a_watch_begins_in_the_future(store: Arc<dyn Store>) {
    let now = put(&store, "k", "0").await;
    let from = Revision(now.0 + 3);
    let mut watch = store.watch("", from).await.unwrap();
    let mut revisions = Vec::new();
    for i in 1..10 {
        revisions.push(put(&store, "k", &i.to_string()).await);
    }
    let expected: Vec<_> = revisions.iter().filter(|revision| **revision >= from).copied().collect();
    let seen = until(&mut watch, *revisions.last().unwrap()).await;
    assert_eq!(seen.iter().map(|batch| batch.revision).collect::<Vec<_>>(), expected);
}

pub async fn a_watch_continues_over_reconnects_under_concurrent_writers(store: Arc<dyn Store>) {
    const WRITERS: usize = 8;
    const EACH: usize = 60;
    let start = store.revision().await.unwrap().next();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                let mut written = Vec::new();
                for i in 0..EACH {
                    // Some of the writes touch the prefix twice, some not at all.
                    let txn = match i % 3 {
                        0 => Txn::new().put(format!("w/{writer}/a"), "x").put(format!("w/{writer}/b"), "x"),
                        1 => Txn::new().put(format!("other/{writer}"), "x"),
                        _ => Txn::new().delete(format!("w/{writer}/a")).put(format!("other/{writer}"), "x"),
                    };
                    let expected = txn.ops.iter().filter(|op| op.key().starts_with("w/")).count();
                    let revision = commit(&store, txn).await;
                    if expected > 0 {
                        written.push((revision, expected));
                    }
                }
                written
            })
        })
        .collect();

    // Watchers that each drop their connection after a different number of batches.
    let total = WRITERS * EACH / 3 * 2;
    let watchers: Vec<_> = (1..5)
        .map(|patience| {
            let store = store.clone();
            tokio::spawn(async move {
                let (mut from, mut seen) = (start, Vec::new());
                while seen.len() < total {
                    let mut watch = store.watch("w/", from).await.unwrap();
                    for _ in 0..(patience * 7).min(total - seen.len()) {
                        let batch = next(&mut watch).await;
                        from = batch.revision.next();
                        seen.push(batch);
                    }
                }
                seen
            })
        })
        .collect();
    let written: BTreeMap<Revision, usize> =
        join_all(writers).await.into_iter().flat_map(|writer| writer.unwrap()).collect();
    for watcher in join_all(watchers).await {
        let seen = watcher.unwrap();
        assert_in_order(&seen);
        let seen: BTreeMap<_, _> = seen.iter().map(|batch| (batch.revision, batch.events.len())).collect();
        assert_eq!(seen, written);
    }
}

pub async fn a_slow_watcher_misses_nothing(store: Arc<dyn Store>) {
    // More than a back end may be expected to hold in memory for one watcher.
    const WRITES: usize = 3000;
    let value = Bytes::from(vec![b'v'; 8 * 1024]);
    let start = store.revision().await.unwrap().next();
    let mut watch = store.watch("k/", start).await.unwrap();
    put(&store, "k/first", "x").await;
    assert_eq!(keys(&next(&mut watch).await), ["k/first"]);

    let mut last = start;
    for chunk in (0..WRITES).collect::<Vec<_>>().chunks(100) {
        let writes =
            chunk.iter().map(|i| commit(&store, Txn::new().put(format!("k/{}", i % 50), value.clone())));
        last = last.max(join_all(writes).await.into_iter().max().unwrap());
    }
    let seen = until(&mut watch, last).await;
    assert_in_order(&seen);
    assert_eq!(seen.len(), WRITES);
    // Caught up, it goes on.
    let new = put(&store, "k/new", "x").await;
    assert_eq!(next(&mut watch).await.revision, new);
}
