//! Evaluates requests inside the open SQLite transaction of a group. Each sees what those before it in the group did.
//!
//! Two kinds of failure are kept apart: an answer `Err` concerns one request, which has changed nothing; an outer `Err`
//! means that the whole group is to be rolled back. Whatever a group changes in memory is in [`Effects`], applied when
//! the commit is durable.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension};

use super::error::sql;
use super::layout::{self, MAX_EVENTS, RowId, Version};
use super::read;
use crate::feed::Change;
use crate::leases::{Lease, Leases};
use crate::{KeyValue, LeaseId, Op, Result, Revision, StoreError, Txn, TxnOutcome, WatchEvent};

pub(super) struct Group<'a> {
    pub(super) connection: &'a Connection,
    pub(super) path: &'a Path,
    leases: &'a Mutex<Leases>,
    pub(super) effects: Effects,
    /// Whether events are gathered for the ring.
    pub(super) gather: bool,
}

/// What a group changes in memory.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub(super) revision: u64,
    pub(super) changes: Vec<Change>,
    pub(super) compacted: u64,
    pub(super) granted: Vec<(LeaseId, Duration)>,
    /// Taken out of the table already; to be put back when the group fails.
    pub(super) ended: Vec<(LeaseId, Lease)>,
}

/// The writing of one revision.
struct Writing {
    revision: u64,
    place: u64,
    events: Vec<WatchEvent>,
}

impl<'a> Group<'a> {
    pub(super) fn new(
        connection: &'a Connection,
        path: &'a Path,
        leases: &'a Mutex<Leases>,
        revision: u64,
        compacted: u64,
    ) -> Self {
        let effects = Effects { revision, compacted, ..Effects::default() };
        Self { connection, path, leases, effects, gather: true }
    }

    fn sql(&self) -> impl Fn(rusqlite::Error) -> StoreError {
        sql("writing to", self.path)
    }

    /// The newest version of the key, unless it is deleted.
    fn current(&self, key: &str) -> Result<Option<Version>> {
        let newest = self
            .connection
            .prepare_cached(
                "SELECT id, created, version, lease FROM history INDEXED BY by_key
                 WHERE key = ?1 ORDER BY id DESC LIMIT 1",
            )
            .and_then(|mut statement| statement.query_row([key], read::version).optional())
            .map_err(self.sql())?;
        Ok(newest.filter(|version| version.version > 0))
    }

    pub(super) fn txn(&mut self, txn: &Txn) -> Result<Result<TxnOutcome>> {
        // A compare and an operation on the same key are the rule.
        let mut known: Vec<(&str, Option<Version>)> = Vec::with_capacity(txn.compares.len());
        for compare in &txn.compares {
            let key = compare.key();
            let current = self.current(key)?;
            if !compare.holds(current.map(|version| version.id.revision())) {
                let current = read::key_before(self.connection, self.path, &key.into(), RowId(i64::MAX))?;
                return Ok(Ok(TxnOutcome::Conflict { key: key.to_owned(), current }));
            }
            known.push((key, current));
        }
        if let Err(error) = self.check_leases(txn) {
            return Ok(Err(error));
        }
        let mut writing = self.begin();
        for op in &txn.ops {
            let key = op.key();
            let before = match known.iter().find(|(known, _)| *known == key) {
                Some((_, version)) => *version,
                None => self.current(key)?,
            };
            match op {
                Op::Put { value, lease, .. } => {
                    self.put(&mut writing, key.into(), before, value.clone(), *lease)?
                }
                Op::Delete { .. } => {
                    if let Some(before) = before {
                        self.delete(&mut writing, key.into(), before)?;
                    }
                }
            }
        }
        self.end(writing);
        Ok(Ok(TxnOutcome::Committed { revision: Revision(self.effects.revision) }))
    }

    fn check_leases(&self, txn: &Txn) -> Result<()> {
        let mut leases = txn.ops.iter().filter_map(|op| match op {
            Op::Put { lease, .. } => *lease,
            Op::Delete { .. } => None,
        });
        let Some(first) = leases.next() else { return Ok(()) };
        let (table, now) = (self.leases.lock(), Instant::now());
        std::iter::once(first).chain(leases).try_for_each(|lease| table.check(lease, now))
    }

    fn begin(&self) -> Writing {
        Writing { revision: self.effects.revision + 1, place: 0, events: Vec::new() }
    }

    /// The revision comes into being when something was written.
    fn end(&mut self, writing: Writing) {
        if writing.place > 0 {
            self.effects.revision = writing.revision;
            if self.gather {
                self.effects.changes.push(Change { revision: writing.revision, events: writing.events });
            }
        }
    }

    fn put(
        &self,
        writing: &mut Writing,
        key: Arc<str>,
        before: Option<Version>,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<()> {
        let old_lease = before.and_then(|before| before.lease);
        if old_lease != lease {
            self.detach(old_lease, &key)?;
            self.attach(lease, &key)?;
        }
        let version = Version {
            id: self.place(writing)?,
            created: before.map_or(writing.revision, |before| before.created),
            version: before.map_or(1, |before| before.version + 1),
            lease,
        };
        self.insert(&key, version, Some(&value))?;
        if self.gather {
            let kv = KeyValue {
                key,
                value,
                created: Revision(version.created),
                modified: Revision(writing.revision),
                version: version.version,
                lease,
            };
            writing.events.push(WatchEvent::Put { kv });
        }
        Ok(())
    }

    fn delete(&self, writing: &mut Writing, key: Arc<str>, before: Version) -> Result<()> {
        self.detach(before.lease, &key)?;
        let version = Version { id: self.place(writing)?, created: 0, version: 0, lease: None };
        self.insert(&key, version, None)?;
        if self.gather {
            writing.events.push(WatchEvent::Delete { key });
        }
        Ok(())
    }

    fn place(&self, writing: &mut Writing) -> Result<RowId> {
        if writing.place >= MAX_EVENTS {
            let limit = usize::try_from(MAX_EVENTS).unwrap_or(usize::MAX);
            let what = "the number of changes of one revision".to_owned();
            return Err(StoreError::TooLarge { what, size: limit + 1, limit });
        }
        let id = RowId::new(writing.revision, writing.place);
        writing.place += 1;
        Ok(id)
    }

    fn insert(&self, key: &str, version: Version, value: Option<&[u8]>) -> Result<()> {
        let sum = version.checksum(key, value);
        self.connection
            .prepare_cached(
                "INSERT INTO history(id, key, created, version, lease, sum, value) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )
            .and_then(|mut statement| {
                let lease = version.lease.map(|lease| lease.0);
                statement.execute((version.id.0, key, version.created, version.version, lease, sum, value))
            })
            .map_err(self.sql())?;
        Ok(())
    }

    fn attach(&self, lease: Option<LeaseId>, key: &str) -> Result<()> {
        self.execute_on(lease, key, "INSERT INTO attached(lease, key) VALUES (?1, ?2)")
    }

    fn detach(&self, lease: Option<LeaseId>, key: &str) -> Result<()> {
        self.execute_on(lease, key, "DELETE FROM attached WHERE lease = ?1 AND key = ?2")
    }

    fn execute_on(&self, lease: Option<LeaseId>, key: &str, text: &str) -> Result<()> {
        let Some(LeaseId(lease)) = lease else { return Ok(()) };
        self.connection
            .prepare_cached(text)
            .and_then(|mut statement| statement.execute((lease, key)))
            .map_err(self.sql())?;
        Ok(())
    }

    pub(super) fn grant(&mut self, ttl: Duration) -> Result<LeaseId> {
        // Rounded up: a lease never ends early.
        let ttl_ms = i64::try_from(ttl.as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX);
        self.connection
            .prepare_cached("INSERT INTO leases(ttl_ms) VALUES (?1)")
            .and_then(|mut statement| statement.insert([ttl_ms]))
            .map(|id| {
                self.effects.granted.push((LeaseId(id), ttl));
                LeaseId(id)
            })
            .map_err(self.sql())
    }

    /// Ends a lease, by wish or because its time is over.
    pub(super) fn end_lease(&mut self, id: LeaseId) -> Result<Result<()>> {
        // A statement of its own, so that the table is not locked meanwhile.
        let removed = self.leases.lock().remove(id);
        match removed {
            Ok(lease) => self.effects.ended.push((id, lease)),
            Err(error) => return Ok(Err(error)),
        }
        let keys = self.attached_keys(id).map_err(self.sql())?;
        let mut writing = self.begin();
        for key in keys {
            if let Some(before) = self.current(&key)? {
                self.delete(&mut writing, key, before)?;
            }
        }
        self.end(writing);
        self.connection
            .prepare_cached("DELETE FROM leases WHERE id = ?1")
            .and_then(|mut statement| statement.execute([id.0]))
            .map_err(self.sql())?;
        Ok(Ok(()))
    }

    fn attached_keys(&self, id: LeaseId) -> rusqlite::Result<Vec<Arc<str>>> {
        let mut statement =
            self.connection.prepare_cached("SELECT key FROM attached WHERE lease = ?1 ORDER BY key")?;
        let keys = statement.query_map([id.0], |row| Ok(Arc::from(row.get_ref(0)?.as_str()?)))?;
        keys.collect()
    }

    pub(super) fn compact(&mut self, before: Revision) -> Result<Result<()>> {
        let current = self.effects.revision;
        if before.0 > current + 1 {
            return Ok(Err(StoreError::FutureRevision { asked: before, current: Revision(current) }));
        }
        self.compact_to(before.0.saturating_sub(1)).map(Ok)
    }

    /// Gives up the history up to this revision. The rows go later, in small steps.
    pub(super) fn compact_to(&mut self, compacted: u64) -> Result<()> {
        if compacted > self.effects.compacted {
            let value = i64::try_from(compacted).expect("revisions stay below 2^43");
            layout::set_meta(self.connection, "compacted", value).map_err(self.sql())?;
            self.effects.compacted = compacted;
        }
        Ok(())
    }

    /// Rewrites every value, as one revision.
    pub(super) fn rewrite(
        &mut self,
        mut decide: impl FnMut(&str, &[u8]) -> Result<crate::Rewrite, String>,
    ) -> Result<()> {
        let mut writing = self.begin();
        let end = RowId::new(writing.revision, 0);
        let mut position: Arc<str> = "".into();
        while let Some(key) = read::next_key(self.connection, &position, false, None).map_err(self.sql())? {
            position = key.clone();
            let Some(kv) = read::key_before(self.connection, self.path, &key, end)? else { continue };
            let decided = decide(&key, &kv.value)
                .map_err(|reason| StoreError::Upgrade { key: key.to_string(), reason })?;
            let before = Version {
                id: RowId::new(kv.modified.0, 0),
                created: kv.created.0,
                version: kv.version,
                lease: kv.lease,
            };
            match decided {
                crate::Rewrite::Keep => {}
                crate::Rewrite::Replace(value) => {
                    self.put(&mut writing, key, Some(before), value.into(), kv.lease)?;
                }
                crate::Rewrite::Delete => self.delete(&mut writing, key, before)?,
            }
        }
        self.end(writing);
        Ok(())
    }
}
