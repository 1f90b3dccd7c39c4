//! What the database file holds. Everything that is SQL about the layout stands here.
//!
//! `history` has a row for every write. The row's id is the revision and the place within its transaction, so reading by
//! id is reading in the order of events, and the newest id tells the store's revision. `by_key` finds the versions of a
//! key, newest last, with all that a compare or a put needs. There is no table of current values: the current value is
//! the newest version, so that a put is one insert. A row with version 0 and no value is a deletion. The newest row is
//! never swept away, because it carries the revision.

use rusqlite::Connection;

use crate::{LeaseId, Revision};

/// In the file's header: "OSTL".
pub(super) const APPLICATION_ID: i32 = 0x4f53_544c;
/// Version of this layout, in the file's header (`user_version`). The schema version of the values is another matter.
pub(super) const LAYOUT_VERSION: i32 = 1;

pub(super) const CREATE: &str = "
    CREATE TABLE history(
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL,
        created INTEGER NOT NULL,
        version INTEGER NOT NULL,
        lease INTEGER,
        sum INTEGER NOT NULL,
        value BLOB
    );
    CREATE INDEX by_key ON history(key, id, created, version, lease);
    CREATE TABLE leases(id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_ms INTEGER NOT NULL);
    CREATE TABLE attached(lease INTEGER NOT NULL, key TEXT NOT NULL, PRIMARY KEY(lease, key)) WITHOUT ROWID;
    CREATE TABLE moments(unix_ms INTEGER PRIMARY KEY, revision INTEGER NOT NULL);
    CREATE TABLE meta(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO meta VALUES ('compacted', 0), ('swept', 0), ('schema', 0);
";

/// Bits of a row's id for the place within its transaction.
const PLACE_BITS: u32 = 20;
/// How many events one revision may have.
pub(super) const MAX_EVENTS: u64 = 1 << PLACE_BITS;

/// The id of a row of `history`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RowId(pub(super) i64);

impl RowId {
    pub(super) fn new(revision: u64, place: u64) -> Self {
        debug_assert!(place < MAX_EVENTS, "the place {place} fits");
        let id = (revision << PLACE_BITS) | place;
        Self(i64::try_from(id).expect("revisions stay below 2^43"))
    }

    /// Above all rows of this revision and below all rows of the next. Revisions that can never be are beyond all rows.
    pub(super) fn end(revision: u64) -> Self {
        if revision >= (1 << (63 - PLACE_BITS)) - 1 {
            return Self(i64::MAX);
        }
        Self::new(revision + 1, 0)
    }

    pub(super) fn revision(self) -> Revision {
        Revision(u64::try_from(self.0).expect("row ids are not negative") >> PLACE_BITS)
    }
}

/// What the index says about a version of a key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Version {
    pub(super) id: RowId,
    pub(super) created: u64,
    pub(super) version: u64,
    pub(super) lease: Option<LeaseId>,
}

impl Version {
    /// Over everything that the row holds, so that a damaged row is never taken for a true one.
    pub(super) fn checksum(&self, key: &str, value: Option<&[u8]>) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        sum.update(&self.id.0.to_le_bytes());
        sum.update(&self.created.to_le_bytes());
        sum.update(&self.version.to_le_bytes());
        sum.update(&self.lease.map_or(0, |lease| lease.0).to_le_bytes());
        sum.update(key.as_bytes());
        sum.update(value.unwrap_or_default());
        sum.finalize()
    }
}

/// The revision of the store, by its newest row.
pub(super) fn revision(connection: &Connection) -> rusqlite::Result<u64> {
    let newest: Option<i64> =
        connection.prepare_cached("SELECT max(id) FROM history")?.query_row([], |row| row.get(0))?;
    Ok(newest.map_or(0, |id| RowId(id).revision().0))
}

pub(super) fn meta(connection: &Connection, name: &str) -> rusqlite::Result<i64> {
    connection.prepare_cached("SELECT value FROM meta WHERE name = ?1")?.query_row([name], |row| row.get(0))
}

pub(super) fn set_meta(connection: &Connection, name: &str, value: i64) -> rusqlite::Result<()> {
    connection.prepare_cached("UPDATE meta SET value = ?2 WHERE name = ?1")?.execute((name, value))?;
    Ok(())
}
