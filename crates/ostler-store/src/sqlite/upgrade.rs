//! Upgrades the stored values to a new schema version: a copy of before, then one transaction.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::apply::Group;
use super::error::sql;
use super::{copy, layout};
use crate::{Result, RewriteFn, StoreError};

/// Inside the open transaction of `group`. Everything is undone by rolling back.
pub(super) fn rewrite(group: &mut Group<'_>, to: u32, mut rewrite: RewriteFn) -> Result<()> {
    // All values at once are too much for the ring; watchers read them from the history.
    group.gather = false;
    group.rewrite(|key, value| {
        // A panic in the callers' code must not end the thread that writes.
        catch_unwind(AssertUnwindSafe(|| rewrite(key, value)))
            .unwrap_or_else(|_| Err("the rewrite panicked".to_owned()))
    })?;
    layout::set_meta(group.connection, "schema", to.into()).map_err(sql("upgrading", group.path))
}

/// Before the transaction: keeps a copy beside the database, unless there is nothing to keep. Returns its path.
pub(super) fn keep_copy(
    connection: &Connection,
    path: &Path,
    revision: u64,
    from: u32,
) -> Result<Option<PathBuf>> {
    if revision == 0 {
        return Ok(None);
    }
    let to = copy::schema_copy(path, from);
    copy::copy(connection, &to)?;
    tracing::info!(copy = %to.display(), schema = from, revision, "kept a copy of the database before its upgrade");
    Ok(Some(to))
}

/// After an upgrade that failed: the database is as it was, and a server that is started again and again must not fill
/// the disk with copies.
pub(super) fn drop_copy(copy: Option<PathBuf>) {
    if let Some(copy) = copy
        && let Err(error) = std::fs::remove_file(&copy)
    {
        tracing::warn!(copy = %copy.display(), %error, "a copy that is not needed stays behind");
    }
}

pub(super) fn check_version(found: u32, expected: u32) -> Result<()> {
    if found != expected {
        return Err(StoreError::SchemaMismatch { found, expected });
    }
    Ok(())
}
