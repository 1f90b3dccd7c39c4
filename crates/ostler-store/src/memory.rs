//! The back end for tests: everything in memory, lost with the store. Passes the same conformance suite as the others,
//! and is the reference that the property test compares SQLite with.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::{Condvar, Mutex};

use crate::feed::{Change, Chunk, Collect, Feed, Past};
use crate::leases::{Leases, check_ttl};
use crate::limits::check_txn;
use crate::{
    KeyValue, LeaseId, ListPage, ListQuery, Op, Result, Revision, Rewrite, RewriteFn, Store, StoreError, Txn,
    TxnOutcome, Watch, WatchEvent,
};

const RING_CHANGES: usize = 256;
const RING_BYTES: usize = 1024 * 1024;

/// A store in memory.
pub struct MemoryStore {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Wakes the thread that ends leases.
    wake: Condvar,
    feed: Arc<Feed>,
}

#[derive(Default)]
struct State {
    revision: u64,
    compacted: u64,
    /// All versions of a key that are kept, in the order of their revisions.
    keys: BTreeMap<Arc<str>, Vec<Version>>,
    log: BTreeMap<u64, Vec<WatchEvent>>,
    leases: Leases,
    attached: HashMap<LeaseId, BTreeSet<Arc<str>>>,
    last_lease: i64,
    schema: u32,
    /// Whether the thread that ends leases runs.
    timer: bool,
    closed: bool,
}

struct Version {
    revision: u64,
    /// `None` where the key was deleted.
    kv: Option<KeyValue>,
}

impl MemoryStore {
    pub fn new() -> Self {
        let shared = Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            feed: Arc::new(Feed::new(0, RING_CHANGES, RING_BYTES)),
        };
        Self { shared: Arc::new(shared) }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("revision", &self.shared.feed.revision()).finish_non_exhaustive()
    }
}

impl Drop for MemoryStore {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.wake.notify_all();
        self.shared.feed.close();
    }
}

impl State {
    fn current(&self, key: &str) -> Option<&KeyValue> {
        self.keys.get(key)?.last()?.kv.as_ref()
    }

    fn check_readable(&self, at: Option<Revision>) -> Result<u64> {
        let Some(Revision(at)) = at else { return Ok(self.revision) };
        if at > self.revision {
            return Err(StoreError::FutureRevision { asked: Revision(at), current: Revision(self.revision) });
        }
        if at < self.compacted {
            return Err(StoreError::TooOld { compacted: Revision(self.compacted) });
        }
        Ok(at)
    }

    /// Applies changes as the next revision; makes none when nothing changes.
    fn apply<K: AsRef<str>>(&mut self, ops: impl IntoIterator<Item = (K, Step)>) -> Option<Change> {
        let revision = self.revision + 1;
        let mut events = Vec::new();
        for (key, change) in ops {
            let key = key.as_ref();
            let before = self.current(key).cloned();
            if let Some(KeyValue { key, lease: Some(lease), .. }) = &before
                && let Some(keys) = self.attached.get_mut(lease)
            {
                keys.remove(key);
            }
            let (key, kv) = match (change, before) {
                (Step::Delete, None) => continue,
                (Step::Delete, Some(before)) => (before.key, None),
                (Step::Put(value, lease), before) => {
                    let key = before.as_ref().map_or_else(|| key.into(), |kv| kv.key.clone());
                    let kv = KeyValue {
                        key: Arc::clone(&key),
                        value,
                        created: before.as_ref().map_or(Revision(revision), |kv| kv.created),
                        modified: Revision(revision),
                        version: before.as_ref().map_or(1, |kv| kv.version + 1),
                        lease,
                    };
                    (key, Some(kv))
                }
            };
            if let Some(lease) = kv.as_ref().and_then(|kv| kv.lease) {
                self.attached.entry(lease).or_default().insert(key.clone());
            }
            events.push(match &kv {
                Some(kv) => WatchEvent::Put { kv: kv.clone() },
                None => WatchEvent::Delete { key: key.clone() },
            });
            self.keys.entry(key).or_default().push(Version { revision, kv });
        }
        if events.is_empty() {
            return None;
        }
        self.revision = revision;
        self.log.insert(revision, events.clone());
        Some(Change { revision, events })
    }

    fn end_lease(&mut self, id: LeaseId) -> Result<Option<Change>> {
        self.leases.remove(id)?;
        let keys = self.attached.remove(&id).unwrap_or_default();
        Ok(self.apply(keys.into_iter().map(|key| (key, Step::Delete))))
    }

    fn compact(&mut self, compacted: u64) {
        self.compacted = compacted;
        self.log = self.log.split_off(&(compacted + 1));
        self.keys.retain(|_, versions| {
            let kept = versions.partition_point(|version| version.revision <= compacted).saturating_sub(1);
            versions.drain(..kept);
            let gone = |version: &Version| version.kv.is_none() && version.revision <= compacted;
            if versions.first().is_some_and(gone) {
                versions.remove(0);
            }
            !versions.is_empty()
        });
    }
}

/// What happens to one key.
enum Step {
    Put(bytes::Bytes, Option<LeaseId>),
    Delete,
}

impl Shared {
    /// Publishes under the lock of the state, so that changes are published in order.
    fn publish(&self, change: Option<Change>) {
        self.feed.publish(change);
    }

    fn end_leases(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            for id in state.leases.ended(Instant::now()) {
                if let Ok(change) = state.end_lease(id) {
                    self.publish(change);
                }
            }
            match state.leases.next_deadline() {
                Some(deadline) => {
                    self.wake.wait_until(&mut state, deadline);
                }
                None => self.wake.wait(&mut state),
            }
        }
    }
}

#[async_trait]
impl Past for Shared {
    async fn chunk(&self, prefix: &str, from: u64) -> Result<Chunk> {
        let state = self.state.lock();
        if from <= state.compacted {
            return Err(StoreError::TooOld { compacted: Revision(state.compacted) });
        }
        let mut collect = Collect::new(from);
        for (revision, events) in state.log.range(from..) {
            if !collect.wants_more() {
                break;
            }
            let matching = events.iter().filter(|event| event.key().starts_with(prefix)).cloned().collect();
            collect.add(*revision, matching);
        }
        Ok(collect.chunk)
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &str, at: Option<Revision>) -> Result<Option<KeyValue>> {
        let state = self.shared.state.lock();
        let at = state.check_readable(at)?;
        Ok(state.keys.get(key).and_then(|versions| as_of(versions, at)).cloned())
    }

    async fn list(&self, query: ListQuery) -> Result<ListPage> {
        let state = self.shared.state.lock();
        let at = state.check_readable(query.at)?;
        let start = match &query.after {
            Some(after) if after.as_str() >= query.prefix.as_str() => Bound::Excluded(after.as_str()),
            Some(_) | None => Bound::Included(query.prefix.as_str()),
        };
        let mut found = state
            .keys
            .range::<str, _>((start, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(&query.prefix))
            .filter_map(|(_, versions)| as_of(versions, at));
        let items: Vec<_> = found.by_ref().take(query.limit.unwrap_or(usize::MAX)).cloned().collect();
        let more = found.next().is_some();
        Ok(ListPage { items, revision: Revision(at), more })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        check_txn(&txn)?;
        let mut state = self.shared.state.lock();
        for compare in &txn.compares {
            let current = state.current(compare.key());
            if !compare.holds(current.map(|kv| kv.modified)) {
                return Ok(TxnOutcome::Conflict { key: compare.key().to_owned(), current: current.cloned() });
            }
        }
        let now = Instant::now();
        for op in &txn.ops {
            if let Op::Put { lease: Some(lease), .. } = op {
                state.leases.check(*lease, now)?;
            }
        }
        let change = state.apply(txn.ops.iter().map(|op| match op {
            Op::Put { key, value, lease } => (key.as_str(), Step::Put(value.clone(), *lease)),
            Op::Delete { key } => (key.as_str(), Step::Delete),
        }));
        self.shared.publish(change);
        Ok(TxnOutcome::Committed { revision: Revision(state.revision) })
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch> {
        let from = from.0.max(1);
        let compacted = self.shared.state.lock().compacted;
        if from <= compacted {
            return Err(StoreError::TooOld { compacted: Revision(compacted) });
        }
        Ok(self.shared.feed.watch(self.shared.clone(), prefix, from))
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        check_ttl(ttl)?;
        let mut state = self.shared.state.lock();
        state.last_lease += 1;
        let id = LeaseId(state.last_lease);
        state.leases.insert(id, ttl, Instant::now());
        if !state.timer {
            let shared = self.shared.clone();
            std::thread::Builder::new()
                .name("store-leases".to_owned())
                .spawn(move || shared.end_leases())
                .map_err(|error| StoreError::io("starting the thread that ends leases", error))?;
            state.timer = true;
        }
        self.shared.wake.notify_all();
        Ok(id)
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<()> {
        self.shared.state.lock().leases.keep_alive(id, Instant::now())
    }

    async fn lease_revoke(&self, id: LeaseId) -> Result<()> {
        let mut state = self.shared.state.lock();
        let change = state.end_lease(id)?;
        self.shared.publish(change);
        Ok(())
    }

    async fn compact(&self, before: Revision) -> Result<()> {
        let mut state = self.shared.state.lock();
        if before.0 > state.revision + 1 {
            return Err(StoreError::FutureRevision { asked: before, current: Revision(state.revision) });
        }
        let compacted = before.0.saturating_sub(1);
        if compacted > state.compacted {
            state.compact(compacted);
        }
        Ok(())
    }

    async fn revision(&self) -> Result<Revision> {
        Ok(Revision(self.shared.feed.revision()))
    }

    async fn schema_version(&self) -> Result<u32> {
        Ok(self.shared.state.lock().schema)
    }

    async fn schema_upgrade(&self, from: u32, to: u32, mut rewrite: RewriteFn) -> Result<()> {
        let mut state = self.shared.state.lock();
        if state.schema != from {
            return Err(StoreError::SchemaMismatch { found: state.schema, expected: from });
        }
        let mut changes = Vec::new();
        for kv in state.keys.values().filter_map(|versions| versions.last()?.kv.as_ref()) {
            match rewrite(&kv.key, &kv.value) {
                Ok(Rewrite::Keep) => {}
                Ok(Rewrite::Replace(value)) => {
                    changes.push((kv.key.clone(), Step::Put(value.into(), kv.lease)));
                }
                Ok(Rewrite::Delete) => changes.push((kv.key.clone(), Step::Delete)),
                Err(reason) => return Err(StoreError::Upgrade { key: kv.key.to_string(), reason }),
            }
        }
        let change = state.apply(changes);
        state.schema = to;
        self.shared.publish(change);
        Ok(())
    }
}

fn as_of(versions: &[Version], at: u64) -> Option<&KeyValue> {
    let known = versions.partition_point(|version| version.revision <= at);
    versions[..known].last()?.kv.as_ref()
}
