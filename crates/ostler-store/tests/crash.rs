//! kill -9 in the middle of commits, again and again on one database: nothing acknowledged is lost, nothing is half done.
//!
//! The child is this test binary, running `child` below; it tells on its standard output what was acknowledged to it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use ostler_store::{ListQuery, Revision, SqliteOptions, SqliteStore, Store, StoreError, Txn, TxnOutcome};

const PATH: &str = "OSTLER_STORE_CRASH_PATH";
const ROUND: &str = "OSTLER_STORE_CRASH_ROUND";
const WRITERS: usize = 16;
const ROUNDS: u64 = 20;

/// With a short history, so that compaction and sweeping go on meanwhile.
fn open(path: &Path) -> Result<Arc<SqliteStore>, StoreError> {
    SqliteStore::open(SqliteOptions { history: Duration::from_millis(100), ..SqliteOptions::new(path) })
}

/// Not a test of its own: what the parent runs and kills.
#[test]
#[ignore = "run by nothing_acknowledged_is_lost"]
fn child() {
    let (Ok(path), Ok(round)) = (std::env::var(PATH), std::env::var(ROUND)) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = open(Path::new(&path)).unwrap();
        let writers = (0..WRITERS).map(|writer| {
            let (store, round) = (store.clone(), round.clone());
            tokio::spawn(async move {
                for n in 0_u64.. {
                    // Two keys that only this transaction writes, and one that is written over and over.
                    let id = format!("{round}/{writer}/{n}");
                    let txn = Txn::new()
                        .put(format!("left/{id}"), id.clone())
                        .put(format!("last/{writer}"), format!("{round} {n}"))
                        .put(format!("right/{id}"), id.clone());
                    let TxnOutcome::Committed { revision } = store.txn(txn).await.unwrap() else {
                        unreachable!()
                    };
                    // One write call a line, so that a line is there whole or not at all.
                    std::io::stdout().write_all(format!("\nack {id} {revision}\n").as_bytes()).unwrap();
                }
            })
        });
        futures::future::join_all(writers).await;
    });
}

/// Runs the child until it has acknowledged `count` writes, kills it, and returns everything that it acknowledged.
fn run_and_kill(path: &Path, round: u64, count: usize) -> BTreeMap<String, Revision> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "child", "--nocapture"])
        .env(PATH, path)
        .env(ROUND, round.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut acknowledged = BTreeMap::new();
    let mut killed = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if let Some((id, revision)) = line.strip_prefix("ack ").and_then(|ack| ack.split_once(' ')) {
            acknowledged.insert(id.to_owned(), Revision(revision.parse().unwrap()));
        }
        if acknowledged.len() >= count && !killed {
            child.kill().unwrap();
            killed = true;
        }
    }
    let status = child.wait().unwrap();
    assert!(killed, "the child ended by itself with {status} after {} writes", acknowledged.len());
    acknowledged
}

#[test]
fn nothing_acknowledged_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.db");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut all = BTreeMap::new();
    for round in 0..ROUNDS {
        // From the first commits to some way into a run; a fixed scatter, so that a failure can be repeated.
        let count = 1 + (round.wrapping_mul(0x9e37_79b9) % 400) as usize;
        let acknowledged = run_and_kill(&path, round, count);
        all.extend(acknowledged.clone());
        runtime.block_on(async {
            let store = open(&path).expect("the database opens after a crash");
            check(store.as_ref(), &all, &acknowledged, round).await;
        });
    }
    let distinct: BTreeSet<_> = all.values().collect();
    assert_eq!(distinct.len(), all.len(), "no revision is given twice, also over crashes");
}

async fn check(
    store: &SqliteStore,
    all: &BTreeMap<String, Revision>,
    latest: &BTreeMap<String, Revision>,
    round: u64,
) {
    let list = |prefix: &str| store.list(ListQuery::prefix(prefix));
    let (left, right) = (list("left/").await.unwrap().items, list("right/").await.unwrap().items);
    let ids: BTreeMap<_, _> =
        left.iter().map(|kv| (kv.key.trim_start_matches("left/").to_owned(), kv.modified)).collect();
    let others: BTreeMap<_, _> =
        right.iter().map(|kv| (kv.key.trim_start_matches("right/").to_owned(), kv.modified)).collect();
    assert_eq!(ids, others, "transactions are whole");
    for (id, revision) in all {
        assert_eq!(ids.get(id), Some(revision), "{id} was acknowledged");
    }
    assert!(store.revision().await.unwrap() >= *latest.values().max().unwrap());
    for kv in list("last/").await.unwrap().items {
        let writer = kv.key.trim_start_matches("last/");
        let text = String::from_utf8(kv.value.to_vec()).unwrap();
        let (in_round, n) = text.split_once(' ').unwrap();
        if in_round.parse::<u64>().unwrap() == round {
            let id = format!("{round}/{writer}/{n}");
            assert_eq!(ids.get(&id), Some(&kv.modified), "the last write of writer {writer} goes with {id}");
            let next = format!("{round}/{writer}/{}", n.parse::<u64>().unwrap() + 1);
            assert!(!ids.contains_key(&next), "{next} is newer");
        }
    }
    // Writing and watching go on where they were.
    let TxnOutcome::Committed { revision } =
        store.txn(Txn::new().put(format!("check/{round}"), "x")).await.unwrap()
    else {
        unreachable!()
    };
    let mut watch = store.watch("check/", revision).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().revision, revision);
}
