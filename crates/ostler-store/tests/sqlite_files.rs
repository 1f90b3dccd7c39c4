//! Which files are opened and which are refused; copies.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ostler_store::{ListQuery, Rewrite, SqliteOptions, SqliteStore, Store, StoreError, Txn};
use tempfile::TempDir;

fn open(path: &Path) -> Result<Arc<SqliteStore>, StoreError> {
    SqliteStore::open(SqliteOptions::new(path))
}

fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.db");
    (directory, path)
}

async fn put(store: &SqliteStore, key: &str, value: impl Into<bytes::Bytes>) {
    let outcome = store.txn(Txn::new().put(key, value)).await.unwrap();
    assert!(matches!(outcome, ostler_store::TxnOutcome::Committed { .. }));
}

async fn content(store: &SqliteStore) -> Vec<ostler_store::KeyValue> {
    store.list(ListQuery::default()).await.unwrap().items
}

/// A closed database with some keys, and what they hold.
async fn filled(path: &Path, keys: usize) -> Vec<ostler_store::KeyValue> {
    let store = open(path).unwrap();
    for i in 0..keys {
        put(&store, &format!("key/{i}"), vec![b'x'; i * 40]).await;
    }
    content(&store).await
}

#[tokio::test]
async fn state_is_there_after_reopening() {
    let (_directory, path) = place();
    let before = filled(&path, 50).await;
    let store = open(&path).unwrap();
    assert_eq!(content(&store).await, before);
    let kv = before.last().unwrap();
    assert!(store.revision().await.unwrap() >= kv.modified);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

/// Whoever copies the file of a server that has stopped has everything.
#[tokio::test]
async fn a_closed_store_is_one_file() {
    for _ in 0..30 {
        let (directory, path) = place();
        filled(&path, 3).await;
        let names = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.collect();
        names.sort();
        assert_eq!(names, ["state.db", "state.db.lock"]);
    }
}

#[tokio::test]
async fn a_second_opener_is_refused_and_told_by_whom() {
    let (_directory, path) = place();
    let store = open(&path).unwrap();
    let error = open(&path).unwrap_err();
    assert!(
        matches!(&error, StoreError::Locked { pid: Some(pid), .. } if *pid == std::process::id()),
        "{error}"
    );
    put(&store, "still", "works").await;
    drop(store);
    open(&path).unwrap();
}

/// A server that was killed while it started another process leaves its lock to that one for a moment.
#[test]
fn a_lock_that_is_just_being_given_up_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.db");
    drop(SqliteStore::open(SqliteOptions::new(&path)).unwrap());
    let heir = File::open(directory.path().join("state.db.lock")).unwrap();
    rustix::fs::flock(&heir, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let opening = std::thread::spawn(move || SqliteStore::open(SqliteOptions::new(&path)).map(drop));
    std::thread::sleep(std::time::Duration::from_millis(100));
    drop(heir);
    opening.join().unwrap().unwrap();
}

#[tokio::test]
async fn a_watch_does_not_keep_the_file_locked() {
    let (_directory, path) = place();
    let store = open(&path).unwrap();
    let mut watch = store.watch("", ostler_store::Revision(1)).await.unwrap();
    drop(store);
    let store = open(&path).unwrap();
    put(&store, "k", "v").await;
    let ended = futures::StreamExt::next(&mut watch).await;
    assert!(matches!(ended, Some(Err(StoreError::Closed))), "{ended:?}");
}

#[tokio::test]
async fn a_damaged_file_is_refused_with_the_way_out() {
    let (directory, path) = place();
    let before = filled(&path, 120).await;
    let length = std::fs::metadata(&path).unwrap().len();
    let mut refused = 0;
    let offsets: Vec<u64> = (0..60).map(|i| 100 + i * (length - 200) / 60).collect();
    for offset in &offsets {
        let copy = directory.path().join(format!("damaged-{offset}.db"));
        std::fs::copy(&path, &copy).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&copy).unwrap();
        let mut bytes = [0; 24];
        file.read_exact_at(&mut bytes, *offset).unwrap();
        file.write_all_at(&bytes.map(|byte| byte ^ 0x55), *offset).unwrap();
        match open(&copy) {
            Err(StoreError::Damaged { restore, .. }) => {
                assert!(restore.contains("copy a backup"), "{restore}");
                refused += 1;
            }
            Err(error) => panic!("bytes from {offset} changed: {error}"),
            // The bytes belong to no page in use.
            Ok(store) => assert!(content(&store).await == before, "bytes from {offset} changed"),
        }
    }
    assert!(refused > offsets.len() / 2, "{refused} of {} damaged files were refused", offsets.len());
}

#[tokio::test]
async fn a_truncated_file_is_refused() {
    let (directory, path) = place();
    filled(&path, 120).await;
    let length = std::fs::metadata(&path).unwrap().len();
    for keep in [0, 15, 50, 100, 4096, length / 2, length - 4096, length - 1] {
        let copy = directory.path().join(format!("truncated-{keep}.db"));
        std::fs::copy(&path, &copy).unwrap();
        File::options().write(true).open(&copy).unwrap().set_len(keep).unwrap();
        let error = open(&copy).unwrap_err();
        let expected = match error {
            StoreError::NotADatabase { .. } => keep < 16,
            StoreError::Damaged { .. } => true,
            _ => false,
        };
        assert!(expected, "{keep} of {length} bytes: {error}");
    }
}

#[tokio::test]
async fn a_log_without_its_file_is_refused() {
    let (_directory, path) = place();
    std::fs::write(path.with_file_name("state.db-wal"), "the log").unwrap();
    let error = open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    assert!(!path.exists());
}

#[tokio::test]
async fn other_files_are_refused_and_left_alone() {
    let (_directory, path) = place();
    std::fs::write(&path, "shopping list".repeat(100)).unwrap();
    let error = open(&path).unwrap_err();
    assert!(matches!(error, StoreError::NotADatabase { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), "shopping list".repeat(100).as_bytes());

    std::fs::remove_file(&path).unwrap();
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("CREATE TABLE songs(title); PRAGMA application_id = 7").unwrap();
    drop(other);
    let before = std::fs::read(&path).unwrap();
    let error = open(&path).unwrap_err();
    assert!(matches!(&error, StoreError::NotADatabase { detail, .. } if detail.contains("0x7")), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn a_newer_layout_is_refused() {
    let (_directory, path) = place();
    filled(&path, 1).await;
    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 2).unwrap();
    let error = open(&path).unwrap_err();
    assert!(matches!(error, StoreError::SchemaTooNew { found: 2, supported: 1 }), "{error}");
}

#[tokio::test]
async fn a_backup_is_consistent_while_writing_goes_on() {
    let (directory, path) = place();
    let store = open(&path).unwrap();
    let writer = tokio::spawn({
        let store = store.clone();
        async move {
            for i in 0..400 {
                let txn = Txn::new().put("left", format!("{i}")).put("right", format!("{i}"));
                assert!(store.txn(txn.put(format!("fill/{i}"), vec![0; 1000])).await.is_ok());
            }
        }
    });
    let mut copies = Vec::new();
    while !writer.is_finished() || copies.is_empty() {
        let to = directory.path().join(format!("backup-{}.db", copies.len()));
        store.backup_to(&to).await.unwrap();
        copies.push(to);
    }
    writer.await.unwrap();
    let error = store.backup_to(&copies[0]).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid { .. }), "{error}");
    for copy in &copies {
        let copy = open(copy).unwrap();
        let (left, right) = (copy.get("left", None).await.unwrap(), copy.get("right", None).await.unwrap());
        assert_eq!(left.map(|kv| kv.value), right.map(|kv| kv.value));
    }
    let names = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.filter(|name| name.to_str().unwrap().ends_with(".part")).count(), 0);
}

#[tokio::test]
async fn a_schema_upgrade_keeps_what_was_before() {
    let (directory, path) = place();
    let before = filled(&path, 20).await;
    let copies = || {
        let names = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.retain(|name| name.contains("schema"));
        names.sort();
        names
    };
    let store = open(&path).unwrap();
    let fails = |key: &str, _: &[u8]| match key {
        "key/9" => Err("no".to_owned()),
        _ => Ok(Rewrite::Replace(b"half done".to_vec())),
    };
    store.schema_upgrade(0, 1, Box::new(fails)).await.unwrap_err();
    let panics = |_: &str, _: &[u8]| -> Result<Rewrite, String> { panic!("a bug in an upgrade") };
    store.schema_upgrade(0, 1, Box::new(panics)).await.unwrap_err();
    assert_eq!(content(&store).await, before);
    assert_eq!(copies(), [""; 0], "an upgrade that fails leaves no copy");

    let replace = |_: &str, _: &[u8]| Ok(Rewrite::Replace(b"new".to_vec()));
    store.schema_upgrade(0, 1, Box::new(replace)).await.unwrap();
    drop(store);
    let store = open(&path).unwrap();
    assert_eq!(store.schema_version().await.unwrap(), 1);
    assert!(content(&store).await.iter().all(|kv| kv.value == "new"));
    assert_eq!(copies(), ["state.db.schema-0"]);

    // A copy is never overwritten.
    store.schema_upgrade(1, 0, Box::new(|_, _| Ok(Rewrite::Keep))).await.unwrap();
    store.schema_upgrade(0, 1, Box::new(|_, _| Ok(Rewrite::Keep))).await.unwrap();
    assert_eq!(copies(), ["state.db.schema-0", "state.db.schema-0.2", "state.db.schema-1"]);
    drop(store);

    // The copy is offered to whoever finds the database damaged, and is what was before.
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let error = open(&path).unwrap_err();
    assert!(error.to_string().contains("state.db.schema-0.2"), "{error}");
    std::fs::copy(directory.path().join("state.db.schema-0"), &path).unwrap();
    let store = open(&path).unwrap();
    assert_eq!(content(&store).await, before);
    assert_eq!(store.schema_version().await.unwrap(), 0);
}
