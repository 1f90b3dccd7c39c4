//! Reading the history: one key, a page of keys, the events of a stretch of revisions. Runs on the reading threads; each
//! function reads one snapshot.
//!
//! Whether the history that was asked for is still complete is decided after it was read: see `Core::compacted`.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, Row};

use super::Core;
use super::error::{damaged, sql};
use super::layout::{self, RowId, Version};
use crate::feed::{Chunk, Collect};
use crate::limits::prefix_end;
use crate::{KeyValue, LeaseId, ListPage, ListQuery, Result, Revision, StoreError, WatchEvent};

/// How many rows a watcher's chunk looks through, so that one watcher does not keep a thread for itself.
const CHUNK_ROWS: usize = 8192;

/// A row of the history.
pub(super) struct Entry {
    pub(super) key: Arc<str>,
    pub(super) version: Version,
    /// `None` for a deletion.
    pub(super) value: Option<Bytes>,
}

/// Reads the columns `id, created, version, lease, sum, value, key`; an `Err` inside tells a row that is damaged.
fn entry(row: &Row<'_>, key: Option<&Arc<str>>) -> rusqlite::Result<Result<Entry, RowId>> {
    let version = version(row)?;
    let sum: i64 = row.get(4)?;
    let value = row.get_ref(5)?.as_blob_or_null()?;
    let key = match key {
        Some(key) => key.clone(),
        None => row.get_ref(6)?.as_str()?.into(),
    };
    if sum != i64::from(version.checksum(&key, value)) {
        return Ok(Err(version.id));
    }
    let value = value.filter(|_| version.version > 0).map(Bytes::copy_from_slice);
    Ok(Ok(Entry { key, version, value }))
}

/// The columns `id, created, version, lease`.
pub(super) fn version(row: &Row<'_>) -> rusqlite::Result<Version> {
    let lease: Option<i64> = row.get(3)?;
    Ok(Version {
        id: RowId(row.get(0)?),
        created: row.get(1)?,
        version: row.get(2)?,
        lease: lease.map(LeaseId),
    })
}

fn damaged_row(path: &Path, id: RowId) -> StoreError {
    damaged(path, format!("the row {} of revision {} does not match its checksum", id.0, id.revision()))
}

impl Entry {
    fn into_kv(self) -> Option<KeyValue> {
        let value = self.value?;
        Some(KeyValue {
            key: self.key,
            value,
            created: Revision(self.version.created),
            modified: self.version.id.revision(),
            version: self.version.version,
            lease: self.version.lease,
        })
    }

    fn into_event(self) -> WatchEvent {
        let key = self.key.clone();
        match self.into_kv() {
            Some(kv) => WatchEvent::Put { kv },
            None => WatchEvent::Delete { key },
        }
    }
}

/// The key as of all rows before `end`.
pub(super) fn key_before(
    connection: &Connection,
    path: &Path,
    key: &Arc<str>,
    end: RowId,
) -> Result<Option<KeyValue>> {
    let found = connection
        .prepare_cached(
            "SELECT id, created, version, lease, sum, value FROM history INDEXED BY by_key
             WHERE key = ?1 AND id < ?2 ORDER BY id DESC LIMIT 1",
        )
        .and_then(|mut statement| {
            statement.query_row((key.as_ref(), end.0), |row| entry(row, Some(key))).optional()
        })
        .map_err(sql("reading", path))?;
    match found {
        Some(Ok(entry)) => Ok(entry.into_kv()),
        Some(Err(id)) => Err(damaged_row(path, id)),
        None => Ok(None),
    }
}

/// The first key that has a history in the range.
pub(super) fn next_key(
    connection: &Connection,
    after: &str,
    inclusive: bool,
    end: Option<&str>,
) -> rusqlite::Result<Option<Arc<str>>> {
    let text = match (inclusive, end.is_some()) {
        (true, true) => "SELECT key FROM history WHERE key >= ?1 AND key < ?2 ORDER BY key LIMIT 1",
        (true, false) => "SELECT key FROM history WHERE key >= ?1 ORDER BY key LIMIT 1",
        (false, true) => "SELECT key FROM history WHERE key > ?1 AND key < ?2 ORDER BY key LIMIT 1",
        (false, false) => "SELECT key FROM history WHERE key > ?1 ORDER BY key LIMIT 1",
    };
    let mut statement = connection.prepare_cached(text)?;
    let key = |row: &Row<'_>| Ok(Arc::from(row.get_ref(0)?.as_str()?));
    match end {
        Some(end) => statement.query_row((after, end), key),
        None => statement.query_row([after], key),
    }
    .optional()
}

/// Refuses a revision that is not there yet. A revision that was read from the file counts as there, even before it is
/// announced.
fn check_future(connection: &Connection, core: &Core, at: Revision) -> Result<()> {
    if at.0 <= core.feed.revision() {
        return Ok(());
    }
    let current = layout::revision(connection).map_err(sql("reading", &core.path))?;
    if at.0 > current {
        return Err(StoreError::FutureRevision { asked: at, current: Revision(current) });
    }
    Ok(())
}

fn check_kept(core: &Core, at: Revision) -> Result<()> {
    let compacted = core.compacted();
    if at.0 < compacted {
        return Err(StoreError::TooOld { compacted: Revision(compacted) });
    }
    Ok(())
}

pub(super) fn get(
    connection: &Connection,
    core: &Core,
    key: &str,
    at: Option<Revision>,
) -> Result<Option<KeyValue>> {
    let key = Arc::from(key);
    let Some(at) = at else { return key_before(connection, &core.path, &key, RowId(i64::MAX)) };
    check_future(connection, core, at)?;
    let found = key_before(connection, &core.path, &key, RowId::end(at.0));
    check_kept(core, at)?;
    found
}

pub(super) fn list(connection: &Connection, core: &Core, query: &ListQuery) -> Result<ListPage> {
    if let Some(at) = query.at {
        check_future(connection, core, at)?;
        check_kept(core, at)?;
    }
    let snapshot = connection.unchecked_transaction().map_err(sql("reading", &core.path))?;
    let page = list_snapshot(&snapshot, core, query)?;
    check_kept(core, page.revision)?;
    Ok(page)
}

fn list_snapshot(snapshot: &Connection, core: &Core, query: &ListQuery) -> Result<ListPage> {
    let sql = sql("reading", &core.path);
    let revision = match query.at {
        Some(at) => at,
        None => Revision(layout::revision(snapshot).map_err(&sql)?),
    };
    let (end, limit) = (prefix_end(&query.prefix), query.limit.unwrap_or(usize::MAX));
    let mut items = Vec::new();
    let mut position: Arc<str> = match &query.after {
        Some(after) if after.as_str() >= query.prefix.as_str() => after.as_str().into(),
        Some(_) | None => query.prefix.as_str().into(),
    };
    let mut inclusive = query.after.as_ref().is_none_or(|after| after.as_str() < query.prefix.as_str());
    // From key to key by the index, since a key may have any number of versions.
    while let Some(key) = next_key(snapshot, &position, inclusive, end.as_deref()).map_err(&sql)? {
        if let Some(kv) = key_before(snapshot, &core.path, &key, RowId::end(revision.0))? {
            if items.len() >= limit {
                return Ok(ListPage { items, revision, more: true });
            }
            items.push(kv);
        }
        (position, inclusive) = (key, false);
    }
    Ok(ListPage { items, revision, more: false })
}

/// Events for a watcher, whole revisions only.
pub(super) fn chunk(connection: &Connection, core: &Core, prefix: &str, from: u64) -> Result<Chunk> {
    let chunk = read_chunk(connection, &core.path, prefix, from)?;
    let compacted = core.compacted();
    if from <= compacted {
        return Err(StoreError::TooOld { compacted: Revision(compacted) });
    }
    Ok(chunk)
}

fn read_chunk(connection: &Connection, path: &Path, prefix: &str, from: u64) -> Result<Chunk> {
    let sql = sql("reading", path);
    let mut statement = connection
        .prepare_cached(
            "SELECT id, created, version, lease, sum, value, key FROM history NOT INDEXED WHERE id >= ?1 ORDER BY id",
        )
        .map_err(&sql)?;
    let mut rows = statement.query([RowId::new(from, 0).0]).map_err(&sql)?;
    let mut collect = Collect::new(from);
    let (mut revision, mut events) = (from, Vec::new());
    for scanned in 0.. {
        let Some(row) = rows.next().map_err(&sql)? else { break };
        let id = RowId(row.get(0).map_err(&sql)?);
        if id.revision().0 != revision {
            collect.add(revision, std::mem::take(&mut events));
            revision = id.revision().0;
            if scanned >= CHUNK_ROWS || !collect.wants_more() {
                // Revisions without rows up to this one have nothing to tell.
                collect.chunk.next = revision;
                return Ok(collect.chunk);
            }
        }
        let matches = row.get_ref(6).and_then(|key| Ok(key.as_str()?.starts_with(prefix)));
        if matches.map_err(&sql)? {
            let entry = entry(row, None).map_err(&sql)?.map_err(|id| damaged_row(path, id))?;
            events.push(entry.into_event());
        }
    }
    collect.add(revision, events);
    Ok(collect.chunk)
}

/// Checks every row against its checksum.
pub(super) fn check_all(connection: &Connection, path: &Path) -> Result<()> {
    let sql = sql("checking", path);
    let mut statement = connection
        .prepare("SELECT id, created, version, lease, sum, value, key FROM history NOT INDEXED")
        .map_err(&sql)?;
    let mut rows = statement.query([]).map_err(&sql)?;
    while let Some(row) = rows.next().map_err(&sql)? {
        entry(row, None).map_err(&sql)?.map_err(|id| damaged_row(path, id))?;
    }
    Ok(())
}
