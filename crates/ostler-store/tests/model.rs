//! Random operations give the same answers from SQLite, also over reopening, as from the memory store.

use std::time::Duration;

use futures::StreamExt;
use ostler_store::{
    Compare, LeaseId, ListQuery, MemoryStore, Op, Revision, SqliteOptions, SqliteStore, Store, Txn,
    WatchBatch,
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Txn(Txn),
    Get(String, Option<u64>),
    List(ListQuery),
    Compact(u64),
    Grant,
    Revoke(i64),
    Reopen,
}

fn key() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "a/", "a/1", "a/2", "a0", "b", "ü"]).prop_map(str::to_owned)
}

/// Revisions around those that a short run reaches.
fn revision() -> impl Strategy<Value = u64> {
    0_u64..40
}

fn txn() -> impl Strategy<Value = Txn> {
    let compare = prop_oneof![
        key().prop_map(|key| Compare::Absent { key }),
        key().prop_map(|key| Compare::Present { key }),
        (key(), revision()).prop_map(|(key, at)| Compare::Modified { key, at: Revision(at) }),
    ];
    let lease = prop_oneof![3 => Just(None), 1 => (1_i64..4).prop_map(|id| Some(LeaseId(id)))];
    let op = prop_oneof![
        3 => (key(), prop::collection::vec(any::<u8>(), 0..40), lease)
            .prop_map(|(key, value, lease)| Op::Put { key, value: value.into(), lease }),
        1 => key().prop_map(|key| Op::Delete { key }),
    ];
    // Rarely more than one compare, or no transaction would ever commit.
    (prop::collection::vec(compare, 0..2), prop::collection::vec(op, 0..4))
        .prop_map(|(compares, ops)| Txn { compares, ops })
}

fn list() -> impl Strategy<Value = ListQuery> {
    let prefix = prop::sample::select(vec!["", "a", "a/", "b", "z"]).prop_map(str::to_owned);
    (prefix, prop::option::of(key()), prop::option::of(0_usize..4), prop::option::of(revision()))
        .prop_map(|(prefix, after, limit, at)| ListQuery { prefix, after, limit, at: at.map(Revision) })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => txn().prop_map(Step::Txn),
        4 => (key(), prop::option::of(revision())).prop_map(|(key, at)| Step::Get(key, at)),
        4 => list().prop_map(Step::List),
        1 => revision().prop_map(Step::Compact),
        1 => Just(Step::Grant),
        1 => (1_i64..4).prop_map(Step::Revoke),
        1 => Just(Step::Reopen),
    ]
}

/// What a store answers, as text.
async fn answer(store: &dyn Store, step: &Step) -> String {
    match step.clone() {
        Step::Txn(txn) => format!("{:?}", store.txn(txn).await),
        Step::Get(key, at) => format!("{:?}", store.get(&key, at.map(Revision)).await),
        Step::List(query) => format!("{:?}", store.list(query).await),
        Step::Compact(before) => format!("{:?}", store.compact(Revision(before)).await),
        Step::Grant => format!("{:?}", store.lease_grant(Duration::from_secs(600)).await),
        Step::Revoke(id) => format!("{:?}", store.lease_revoke(LeaseId(id)).await),
        Step::Reopen => format!("{:?}", store.revision().await),
    }
}

/// Everything that can still be watched.
async fn events(store: &dyn Store) -> Vec<WatchBatch> {
    let last = store.revision().await.unwrap();
    let from = match store.watch("", Revision(1)).await {
        Ok(_) => Revision(1),
        Err(ostler_store::StoreError::TooOld { compacted }) => compacted.next(),
        Err(error) => panic!("{error}"),
    };
    let mut watch = store.watch("", from).await.unwrap();
    let mut seen: Vec<WatchBatch> = Vec::new();
    while from <= last && seen.last().is_none_or(|batch| batch.revision < last) {
        let batch = tokio::time::timeout(Duration::from_secs(60), watch.next()).await;
        seen.push(
            batch.expect("a batch comes in time").expect("the watch goes on").expect("the watch works"),
        );
    }
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn sqlite_answers_like_memory(steps in prop::collection::vec(step(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let options = SqliteOptions::new(directory.path().join("state.db"));
        runtime.block_on(async {
            let memory = MemoryStore::new();
            let mut sqlite = SqliteStore::open(options.clone()).unwrap();
            for step in &steps {
                if matches!(step, Step::Reopen) {
                    drop(sqlite);
                    sqlite = SqliteStore::open(options.clone()).unwrap();
                }
                prop_assert_eq!(answer(sqlite.as_ref(), step).await, answer(&memory, step).await, "{:?}", step);
            }
            prop_assert_eq!(events(sqlite.as_ref()).await, events(&memory).await);
            // And from the file alone.
            drop(sqlite);
            let sqlite = SqliteStore::open(options.clone()).unwrap();
            prop_assert_eq!(events(sqlite.as_ref()).await, events(&memory).await);
            let everything = Step::List(ListQuery::default());
            prop_assert_eq!(answer(sqlite.as_ref(), &everything).await, answer(&memory, &everything).await);
            Ok(())
        })?;
    }
}
