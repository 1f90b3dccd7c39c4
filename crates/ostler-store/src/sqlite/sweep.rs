//! Lets the past go: notes which revision was current when, compacts what is older than the history to keep, and sweeps
//! the rows away in small steps, inside the transactions of the writer.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::Connection;

use super::apply::Group;
use super::error::sql;
use super::layout::{self, RowId};
use crate::Result;

/// How far the rows are swept, and how long history is kept.
#[derive(Clone, Debug)]
pub(super) struct Sweep {
    /// The last row that was looked at; those before are what they must be at `compacted`, or are newer than it.
    swept: RowId,
    history: Duration,
    /// The newest revision whose moment is noted.
    noted: u64,
    /// Whether rows may be left to sweep.
    pub(super) pending: bool,
}

impl Sweep {
    pub(super) fn new(swept: RowId, history: Duration) -> Self {
        Self { swept, history, noted: 0, pending: true }
    }

    /// How often [`Sweep::tick`] is to be called.
    pub(super) fn interval(&self) -> Duration {
        (self.history / 32).clamp(Duration::from_millis(20), Duration::from_secs(60))
    }

    /// Notes the current moment and compacts what is too old.
    pub(super) fn tick(&mut self, group: &mut Group<'_>) -> Result<()> {
        let sql = sql("compacting", group.path);
        // The wall clock, since it goes on over restarts. A clock set back keeps history longer.
        let now = millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
        let revision = group.effects.revision;
        if revision > self.noted {
            group
                .connection
                .prepare_cached("INSERT OR REPLACE INTO moments(unix_ms, revision) VALUES (?1, ?2)")
                .and_then(|mut statement| statement.execute((now, revision)))
                .map_err(&sql)?;
            self.noted = revision;
        }
        let past: Option<u64> = group
            .connection
            .prepare_cached("SELECT max(revision) FROM moments WHERE unix_ms <= ?1")
            .and_then(|mut statement| statement.query_row([now - millis(self.history)], |row| row.get(0)))
            .map_err(&sql)?;
        if let Some(past) = past.filter(|past| *past > group.effects.compacted) {
            group.compact_to(past)?;
            group
                .connection
                .prepare_cached("DELETE FROM moments WHERE revision < ?1")
                .and_then(|mut statement| statement.execute([past]))
                .map_err(&sql)?;
        }
        Ok(())
    }

    /// Looks at up to `most` rows that are compacted: of each key, everything before such a row goes, and the row itself
    /// if it is a deletion. So each row is looked at once, and keys that do not change cost nothing.
    pub(super) fn step(&mut self, group: &Group<'_>, most: usize) -> Result<()> {
        self.sweep(group.connection, group.effects.compacted, most).map_err(sql("compacting", group.path))
    }

    fn sweep(&mut self, connection: &Connection, compacted: u64, most: usize) -> rusqlite::Result<()> {
        let newest: Option<i64> =
            connection.prepare_cached("SELECT max(id) FROM history")?.query_row([], |row| row.get(0))?;
        let newest = newest.unwrap_or(0);
        let end = RowId::end(compacted).0;
        let rows: Vec<(i64, String, i64)> = connection
            .prepare_cached(
                "SELECT id, key, version FROM history NOT INDEXED WHERE id > ?1 AND id < ?2 ORDER BY id LIMIT ?3",
            )?
            .query_map((self.swept.0, end, most), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
            .collect::<rusqlite::Result<_>>()?;
        let mut before =
            connection.prepare_cached("DELETE FROM history INDEXED BY by_key WHERE key = ?1 AND id < ?2")?;
        let mut itself = connection.prepare_cached("DELETE FROM history WHERE id = ?1")?;
        let mut swept = self.swept;
        for (id, key, version) in &rows {
            before.execute((key, id))?;
            if *version == 0 {
                if *id == newest {
                    // It carries the revision. Looked at again when it is no longer the newest.
                    break;
                }
                itself.execute([id])?;
            }
            swept = RowId(*id);
        }
        if swept != self.swept {
            self.swept = swept;
            layout::set_meta(connection, "swept", swept.0)?;
        }
        self.pending = rows.len() == most;
        Ok(())
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
