//! Upgrading what is stored.

use std::sync::Arc;
use std::time::Duration;

use super::{commit, next, put, value};
use crate::{Rewrite, Store, StoreError, Txn, check_schema};

pub async fn a_schema_upgrade_rewrites_at_once(store: Arc<dyn Store>) {
    assert_eq!(store.schema_version().await.unwrap(), 0);
    store.schema_upgrade(0, 1, Box::new(|key, _| panic!("nothing is stored at {key}"))).await.unwrap();
    assert_eq!(store.schema_version().await.unwrap(), 1);

    let lease = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    put(&store, "keep", "k").await;
    put(&store, "drop", "d").await;
    let old = put(&store, "turn", "t").await;
    let before = commit(&store, Txn::new().put_leased("leased", "l", lease)).await;
    let mut watch = store.watch("", before.next()).await.unwrap();
    let rewrite = |key: &str, value: &[u8]| {
        Ok(match key {
            "keep" => Rewrite::Keep,
            "drop" => Rewrite::Delete,
            _ => Rewrite::Replace([value, b"2"].concat()),
        })
    };
    store.schema_upgrade(1, 4, Box::new(rewrite)).await.unwrap();
    assert_eq!(store.schema_version().await.unwrap(), 4);
    for (key, expected) in [("keep", Some("k")), ("drop", None), ("turn", Some("t2")), ("leased", Some("l2"))]
    {
        assert_eq!(value(&store, key, None).await.as_deref(), expected, "{key}");
    }
    let kv = store.get("turn", None).await.unwrap().unwrap();
    assert_eq!((kv.created, kv.version), (old, 2));
    assert_eq!(value(&store, "turn", Some(before)).await.as_deref(), Some("t"), "the past stays");

    let batch = next(&mut watch).await;
    assert_eq!((batch.revision, batch.events.len()), (kv.modified, 3));
    assert_eq!(store.revision().await.unwrap(), kv.modified);
    let new = put(&store, "new", "n").await;
    assert_eq!(next(&mut watch).await.revision, new);
    store.lease_revoke(lease).await.unwrap();
    assert_eq!(value(&store, "leased", None).await, None, "keys keep their leases");
}

pub async fn a_schema_upgrade_that_fails_changes_nothing(store: Arc<dyn Store>) {
    put(&store, "a", "1").await;
    let before = put(&store, "b", "1").await;
    let rewrite = |key: &str, _: &[u8]| match key {
        "a" => Ok(Rewrite::Replace(b"2".to_vec())),
        _ => Err("does not parse".to_owned()),
    };
    let error = store.schema_upgrade(0, 1, Box::new(rewrite)).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Upgrade { key, reason } if key == "b" && reason == "does not parse")
    );
    let error = store.schema_upgrade(2, 3, Box::new(|_, _| Ok(Rewrite::Delete))).await.unwrap_err();
    assert!(matches!(error, StoreError::SchemaMismatch { found: 0, expected: 2 }));
    assert_eq!(store.schema_version().await.unwrap(), 0);
    assert_eq!(store.revision().await.unwrap(), before);
    assert_eq!(value(&store, "a", None).await.as_deref(), Some("1"));
    put(&store, "a", "still writable").await;
}

pub async fn newer_schemas_are_refused(store: Arc<dyn Store>) {
    assert_eq!(check_schema(store.as_ref(), 3).await.unwrap(), 0);
    store.schema_upgrade(0, 4, Box::new(|_, _| Ok(Rewrite::Keep))).await.unwrap();
    let error = check_schema(store.as_ref(), 3).await.unwrap_err();
    assert!(matches!(error, StoreError::SchemaTooNew { found: 4, supported: 3 }), "{error}");
    assert_eq!(check_schema(store.as_ref(), 4).await.unwrap(), 4);
}
