//! Copies of the whole database, made while it is in use: backups, and what was before a schema upgrade.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::error::sql;
use crate::{Result, StoreError};

/// Writes a copy to the new file `to`: complete and durable, or not there at all. Never overwrites.
pub(super) fn copy(connection: &Connection, to: &Path) -> Result<()> {
    if to.exists() {
        return Err(exists(to));
    }
    let part = with_suffix(to, ".part");
    let result = write_part(connection, &part).and_then(|()| put_in_place(&part, to));
    // Also after success: the copy has been linked to its name.
    match std::fs::remove_file(&part) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(path = %part.display(), %error, "a temporary file stays behind");
        }
        Ok(()) | Err(_) => {}
    }
    result?;
    sync_directory(to)
}

fn write_part(connection: &Connection, part: &Path) -> Result<()> {
    let io = |error| StoreError::file("writing", part, error);
    match std::fs::remove_file(part) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(io(error)),
        Ok(()) | Err(_) => {}
    }
    // Made by us, so that its mode is right from the start; SQLite fills an empty file.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(part).map_err(io)?;
    let name =
        part.to_str().ok_or_else(|| StoreError::invalid(format!("{} is not valid UTF-8", part.display())))?;
    connection.execute("VACUUM INTO ?1", [name]).map_err(sql("copying the database to", part))?;
    file.sync_all().map_err(io)
}

fn put_in_place(part: &Path, to: &Path) -> Result<()> {
    match std::fs::hard_link(part, to) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(exists(to)),
        // A file system without hard links.
        Err(_) if !to.exists() => {
            std::fs::rename(part, to).map_err(|error| StoreError::file("writing", to, error))
        }
        Err(error) => Err(StoreError::file("writing", to, error)),
    }
}

fn exists(path: &Path) -> StoreError {
    StoreError::invalid(format!(
        "{} exists already and is not overwritten: choose another name",
        path.display()
    ))
}

/// Makes names in the directory of `path` durable.
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    let directory = directory(path);
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| StoreError::file("syncing", directory, error))
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// A name beside the database for the copy from before an upgrade that is not taken yet.
pub(super) fn schema_copy(database: &Path, schema: u32) -> PathBuf {
    let first = with_suffix(database, &format!(".schema-{schema}"));
    let others = (2..).map(|n: u32| with_suffix(database, &format!(".schema-{schema}.{n}")));
    std::iter::once(first).chain(others).find(|path| !path.exists()).expect("the names never run out")
}

/// The copies from before upgrades beside the database, newest last.
pub(super) fn copies_beside(database: &Path) -> Vec<PathBuf> {
    let Some(name) = database.file_name().and_then(|name| name.to_str()) else { return Vec::new() };
    let prefix = format!("{name}.schema-");
    let Ok(entries) = std::fs::read_dir(directory(database)) else { return Vec::new() };
    let mut copies: Vec<_> = entries
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.starts_with(&prefix) && !name.ends_with(".part"))
        })
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    copies.sort();
    copies.into_iter().map(|(_, path)| path).collect()
}
