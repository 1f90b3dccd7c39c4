//! Reading the past, paging through it, and letting it go.

use std::sync::Arc;

use futures::StreamExt;

use super::{PATIENCE, commit, put, until, value};
use crate::{ListQuery, Revision, Store, StoreError, Txn, WatchBatch};

fn keys(items: &[crate::KeyValue]) -> Vec<&str> {
    items.iter().map(|kv| kv.key.as_ref()).collect()
}

pub async fn the_past_can_be_read(store: Arc<dyn Store>) {
    let before = put(&store, "other", "x").await;
    let one = put(&store, "k", "1").await;
    let two = put(&store, "k", "2").await;
    let gone = commit(&store, Txn::new().delete("k")).await;
    let three = put(&store, "k", "3").await;
    let expected = [(before, None), (one, Some("1")), (two, Some("2")), (gone, None), (three, Some("3"))];
    for (at, expected) in expected {
        assert_eq!(value(&store, "k", Some(at)).await.as_deref(), expected, "at {at}");
        let page = store.list(ListQuery { at: Some(at), ..ListQuery::prefix("k") }).await.unwrap();
        assert_eq!(page.items.first().cloned(), store.get("k", Some(at)).await.unwrap());
        assert_eq!(page.revision, at);
    }
    let kv = store.get("k", Some(two)).await.unwrap().unwrap();
    assert_eq!((kv.created, kv.modified, kv.version), (one, two, 2));

    let future = Revision(three.0 + 1);
    let is_future = |error| matches!(error, StoreError::FutureRevision { asked, .. } if asked == future);
    assert!(is_future(store.get("k", Some(future)).await.unwrap_err()));
    let query = ListQuery { at: Some(future), ..ListQuery::default() };
    assert!(is_future(store.list(query).await.unwrap_err()));
}

pub async fn a_list_is_ordered_and_keeps_to_its_prefix(store: Arc<dyn Store>) {
    let page = store.list(ListQuery::default()).await.unwrap();
    assert_eq!((page.items.len(), page.more), (0, false));
    for key in ["b", "a/2", "a/10", "a", "a/", "a0", "ä", "a/\u{10ffff}"] {
        put(&store, key, "x").await;
    }
    let last = commit(&store, Txn::new().put("a/gone", "x")).await;
    let last = commit(&store, Txn::new().delete("a/gone").modified("a/gone", last)).await;

    let all = store.list(ListQuery::default()).await.unwrap();
    assert_eq!(keys(&all.items), ["a", "a/", "a/10", "a/2", "a/\u{10ffff}", "a0", "b", "ä"]);
    assert_eq!((all.revision, all.more), (last, false));
    let below = store.list(ListQuery::prefix("a/")).await.unwrap();
    assert_eq!(keys(&below.items), ["a/", "a/10", "a/2", "a/\u{10ffff}"]);
    assert_eq!(below.revision, last, "the revision is the store's");
    assert!(store.list(ListQuery::prefix("c")).await.unwrap().items.is_empty());
    // A position before the prefix, and one behind it.
    let after = |after: &str| ListQuery { after: Some(after.to_owned()), ..ListQuery::prefix("a/") };
    assert_eq!(store.list(after("A")).await.unwrap().items, below.items);
    assert_eq!(keys(&store.list(after("a/")).await.unwrap().items), keys(&below.items)[1..]);
    assert!(store.list(after("b")).await.unwrap().items.is_empty());
}

pub async fn pages_show_one_revision(store: Arc<dyn Store>) {
    for i in 0..25 {
        put(&store, &format!("k/{i:02}"), "old").await;
    }
    put(&store, "l", "behind").await;
    let mut query = ListQuery { limit: Some(10), ..ListQuery::prefix("k/") };
    let mut found = Vec::new();
    loop {
        let page = store.list(query.clone()).await.unwrap();
        assert_eq!(*query.at.get_or_insert(page.revision), page.revision);
        query.after = page.items.last().map(|kv| kv.key.to_string());
        found.extend(page.items);
        // What happens between the pages does not show in them.
        put(&store, &format!("k/{:02}", found.len()), "new").await;
        put(&store, &format!("k/{:02}x", found.len()), "new").await;
        commit(&store, Txn::new().delete("k/24")).await;
        if !page.more {
            break;
        }
    }
    let expected: Vec<_> = (0..25).map(|i| format!("k/{i:02}")).collect();
    assert_eq!(keys(&found), expected);
    assert!(found.iter().all(|kv| kv.value == "old"));

    // A page that ends with the last key says so.
    let page = store.list(ListQuery { limit: Some(1), ..ListQuery::prefix("l") }).await.unwrap();
    assert_eq!((page.items.len(), page.more), (1, false));
}

pub async fn compaction_refuses_what_is_gone(store: Arc<dyn Store>) {
    let mut revisions = vec![put(&store, "still", "here").await];
    for i in 0..20 {
        revisions.push(put(&store, "k", &i.to_string()).await);
    }
    revisions.push(commit(&store, Txn::new().put("gone", "x")).await);
    revisions.push(commit(&store, Txn::new().delete("gone")).await);
    revisions.push(put(&store, "k", "last").await);
    let (middle, last) = (revisions[11], *revisions.last().unwrap());

    let error = store.compact(Revision(last.0 + 2)).await.unwrap_err();
    assert!(matches!(error, StoreError::FutureRevision { .. }), "{error}");
    store.compact(middle).await.unwrap();
    store.compact(revisions[3]).await.unwrap();
    for old in &revisions[..9] {
        let error = store.get("k", Some(*old)).await.unwrap_err();
        assert!(matches!(error, StoreError::TooOld { compacted } if compacted < middle), "{error}");
        let query = ListQuery { at: Some(*old), ..ListQuery::default() };
        assert!(matches!(store.list(query).await.unwrap_err(), StoreError::TooOld { .. }));
        assert!(matches!(store.watch("k", *old).await.unwrap_err(), StoreError::TooOld { .. }));
    }
    assert_eq!(value(&store, "k", Some(middle)).await.as_deref(), Some("10"));
    assert_eq!(value(&store, "still", Some(middle)).await.as_deref(), Some("here"));
    let mut watch = store.watch("", middle).await.unwrap();
    let seen = until(&mut watch, last).await;
    assert_eq!(seen.iter().map(|batch| batch.revision).collect::<Vec<_>>(), revisions[11..]);

    // Everything that is past.
    store.compact(last.next()).await.unwrap();
    assert_eq!(value(&store, "k", None).await.as_deref(), Some("last"));
    assert_eq!(value(&store, "still", None).await.as_deref(), Some("here"));
    assert_eq!(value(&store, "gone", None).await, None);
    assert_eq!(store.revision().await.unwrap(), last);
    let new = put(&store, "k", "new").await;
    let kv = store.get("k", None).await.unwrap().unwrap();
    assert_eq!((kv.created, kv.modified, kv.version), (revisions[1], new, 22));
}

pub async fn a_watcher_overtaken_by_compaction_is_told(store: Arc<dyn Store>) {
    const WRITES: usize = 2000;
    let start = store.revision().await.unwrap().next();
    let mut watch = store.watch("", start).await.unwrap();
    let mut last = start;
    let value = bytes::Bytes::from(vec![b'v'; 8 * 1024]);
    for chunk in (0..WRITES).collect::<Vec<_>>().chunks(100) {
        let writes =
            chunk.iter().map(|i| commit(&store, Txn::new().put(format!("{}", i % 10), value.clone())));
        last = last.max(futures::future::join_all(writes).await.into_iter().max().unwrap());
    }
    store.compact(last).await.unwrap();
    // It gets all or learns that it has not got all.
    let mut seen: Vec<WatchBatch> = Vec::new();
    while seen.last().is_none_or(|batch| batch.revision < last) {
        match tokio::time::timeout(PATIENCE, watch.next()).await.expect("the watcher hears something") {
            Some(Ok(batch)) => seen.push(batch),
            Some(Err(StoreError::TooOld { compacted })) => {
                assert!(compacted < last);
                assert!(watch.next().await.is_none(), "a watch ends after its error");
                return;
            }
            Some(Err(error)) => panic!("{error}"),
            None => panic!("the watch ended without a word"),
        }
    }
    assert_eq!(seen.len(), WRITES);
}
