//! A running SQLite store: the disk is full and is not any more, the past goes away, leases outlive a restart.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ostler_store::{ListQuery, Revision, SqliteOptions, SqliteStore, Store, StoreError, Txn, TxnOutcome};

const PATIENCE: Duration = Duration::from_secs(60);

async fn put(store: &SqliteStore, key: &str, size: usize) -> Result<Revision, StoreError> {
    match store.txn(Txn::new().put(key, vec![b'v'; size])).await? {
        TxnOutcome::Committed { revision } => Ok(revision),
        TxnOutcome::Conflict { .. } => unreachable!("nothing is compared"),
    }
}

/// Asks until the answer is `true`.
async fn eventually<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let start = Instant::now();
    while !ask().await {
        assert!(start.elapsed() < PATIENCE, "{what}: not in {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Writes until there is no room; returns how many keys were acknowledged.
async fn fill(store: &SqliteStore) -> usize {
    for n in 0.. {
        match put(store, &format!("fill/{n:06}"), 10_000).await {
            Ok(_) => {}
            Err(StoreError::Full { .. }) => return n,
            Err(error) => panic!("{error}"),
        }
    }
    unreachable!()
}

async fn count(store: &SqliteStore) -> usize {
    store.list(ListQuery::prefix("fill/")).await.unwrap().items.len()
}

#[tokio::test]
async fn a_full_database_refuses_writes_and_serves_reads() {
    let directory = tempfile::tempdir().unwrap();
    let options =
        SqliteOptions { max_bytes: Some(2_000_000), ..SqliteOptions::new(directory.path().join("state.db")) };
    let store = SqliteStore::open(options.clone()).unwrap();
    let lease = store.lease_grant(Duration::from_secs(600)).await.unwrap();
    let written = fill(&store).await;
    assert!(written > 50);
    assert_eq!(count(&store).await, written);
    let revision = store.revision().await.unwrap();
    // All of a group fail, and none of it is left.
    let writes = (0..20).map(|i| {
        let store = store.clone();
        async move { put(&store, &format!("fill/more-{i}"), 100_000).await }
    });
    for result in futures::future::join_all(writes).await {
        assert!(matches!(result, Err(StoreError::Full { .. })), "{result:?}");
    }
    assert_eq!(count(&store).await, written);
    assert_eq!(store.revision().await.unwrap(), revision);
    store.lease_keep_alive(lease).await.unwrap();
    drop(store);

    let store = SqliteStore::open(SqliteOptions { max_bytes: None, ..options }).unwrap();
    assert_eq!((count(&store).await, store.revision().await.unwrap()), (written, revision));
    assert_eq!(put(&store, "room", 100_000).await.unwrap(), revision.next());
}

/// A small file system of its own.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    /// `None` where mounting is not allowed.
    fn mount(at: &'a Path) -> Option<Self> {
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=6m", "ostler-test"]).arg(at).output();
        mount.is_ok_and(|output| output.status.success()).then_some(Self(at))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "{} stays mounted", self.0.display());
    }
}

#[tokio::test]
async fn a_full_disk_refuses_writes_until_there_is_room() {
    let directory = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(directory.path()) else {
        eprintln!("not tested: mounting a small file system needs root");
        return;
    };
    let options = SqliteOptions::new(disk.0.join("state.db"));
    let store = SqliteStore::open(options.clone()).unwrap();
    put(&store, "first", 10_000).await.unwrap();
    let ballast = disk.0.join("ballast");
    std::fs::write(&ballast, vec![0; 3_000_000]).unwrap();
    let written = fill(&store).await;
    let revision = store.revision().await.unwrap();
    for _ in 0..3 {
        let result = put(&store, "fill/more", 500_000).await;
        assert!(matches!(result, Err(StoreError::Full { .. })), "{result:?}");
        assert_eq!(count(&store).await, written);
    }
    assert_eq!(store.revision().await.unwrap(), revision);

    std::fs::remove_file(&ballast).unwrap();
    assert_eq!(put(&store, "fill/more", 500_000).await.unwrap(), revision.next());
    assert_eq!(count(&store).await, written + 1);
    drop(store);
    let store = SqliteStore::open(options).unwrap();
    assert_eq!(count(&store).await, written + 1);
}

#[tokio::test]
async fn the_past_goes_after_its_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.db");
    let options = SqliteOptions { history: Duration::from_millis(300), ..SqliteOptions::new(&path) };
    let store = SqliteStore::open(options.clone()).unwrap();
    let first = put(&store, "k", 10).await.unwrap();
    for i in 0..100 {
        put(&store, "k", i).await.unwrap();
        put(&store, &format!("gone/{i}"), i).await.unwrap();
        let deleted = store.txn(Txn::new().delete(format!("gone/{i}"))).await.unwrap();
        assert!(matches!(deleted, TxnOutcome::Committed { .. }));
    }
    let last = put(&store, "end", 1).await.unwrap();
    eventually("the first revision is too old", || async {
        matches!(store.get("k", Some(first)).await, Err(StoreError::TooOld { .. }))
    })
    .await;
    let rows = || {
        let connection = rusqlite::Connection::open(&path).unwrap();
        connection.query_row("SELECT count(*) FROM history", [], |row| row.get::<_, i64>(0)).unwrap()
    };
    eventually("only the current values are left", || async { rows() == 2 }).await;
    drop(store);

    // What is compacted stays so.
    let store = SqliteStore::open(options).unwrap();
    assert!(
        matches!(store.watch("", first).await, Err(StoreError::TooOld { compacted }) if compacted >= first)
    );
    assert_eq!(store.revision().await.unwrap(), last);
    assert_eq!(store.get("k", None).await.unwrap().unwrap().version, 101);
    // The newest row carries the revision even when it is a deletion.
    let deleted = store.txn(Txn::new().delete("end")).await.unwrap();
    assert_eq!(deleted, TxnOutcome::Committed { revision: last.next() });
    store.compact(last.next().next()).await.unwrap();
    drop(store);
    let store = SqliteStore::open(SqliteOptions::new(&path)).unwrap();
    assert_eq!(store.revision().await.unwrap(), last.next());
    put(&store, "k", 1).await.unwrap();
    store.compact(store.revision().await.unwrap().next()).await.unwrap();
    eventually("the deletion is swept away", || async { rows() == 1 }).await;
}

#[tokio::test]
async fn leases_have_their_full_time_again_after_a_restart() {
    const TTL: Duration = Duration::from_secs(2);
    let directory = tempfile::tempdir().unwrap();
    let options = SqliteOptions::new(directory.path().join("state.db"));
    let store = SqliteStore::open(options.clone()).unwrap();
    let lease = store.lease_grant(TTL).await.unwrap();
    let TxnOutcome::Committed { revision } = store.txn(Txn::new().put_leased("k", "v", lease)).await.unwrap()
    else {
        unreachable!("nothing is compared")
    };
    drop(store);
    // Its time passes while the store is closed.
    tokio::time::sleep(TTL + Duration::from_millis(200)).await;
    let opened = Instant::now();
    let store = SqliteStore::open(options.clone()).unwrap();
    let mut watch = store.watch("k", revision.next()).await.unwrap();
    let ended = tokio::time::timeout(PATIENCE, futures::StreamExt::next(&mut watch)).await;
    let batch = ended.expect("the lease ends").expect("the watch goes on").expect("the watch works");
    assert!(opened.elapsed() >= TTL);
    assert_eq!(store.revision().await.unwrap(), batch.revision);
    assert!(matches!(store.lease_keep_alive(lease).await, Err(StoreError::LeaseNotFound { .. })));
    drop(store);
    // No id is given twice.
    let store = SqliteStore::open(options).unwrap();
    assert!(store.lease_grant(TTL).await.unwrap() > lease);
}

#[tokio::test]
async fn dropping_the_store_finishes_what_was_accepted() {
    let directory = tempfile::tempdir().unwrap();
    let options = SqliteOptions::new(directory.path().join("state.db"));
    let store = SqliteStore::open(options.clone()).unwrap();
    let writes: Vec<_> = (0..200)
        .map(|i| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { put(&store, &format!("fill/{i}"), 100).await })
        })
        .collect();
    drop(store);
    for write in writes {
        write.await.unwrap().unwrap();
    }
    let store = SqliteStore::open(options).unwrap();
    assert_eq!(count(&store).await, 200);
}
