//! From SQLite's errors to ours.

use std::path::Path;

use rusqlite::ErrorCode;

use crate::StoreError;

/// Below this much free space a failed write is taken for a full disk, whatever SQLite called it.
const NO_ROOM: u64 = 256 * 1024;

/// For `map_err`: what was done to which database.
pub(super) fn sql(doing: &'static str, path: &Path) -> impl Fn(rusqlite::Error) -> StoreError {
    move |error| translate(doing, path, error)
}

fn translate(doing: &str, path: &Path, error: rusqlite::Error) -> StoreError {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => StoreError::Full { path: path.to_owned() },
        Some(ErrorCode::SystemIoFailure) if no_room(path) => StoreError::Full { path: path.to_owned() },
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => damaged(path, error.to_string()),
        // Numbers out of range and text that is not valid: what we did not write.
        None if is_conversion(&error) => damaged(path, error.to_string()),
        Some(_) | None => StoreError::io(format!("{doing} {}", path.display()), error),
    }
}

fn is_conversion(error: &rusqlite::Error) -> bool {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, Utf8Error};
    matches!(
        error,
        FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) | Utf8Error(..)
    )
}

fn no_room(path: &Path) -> bool {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    rustix::fs::statvfs(directory).is_ok_and(|space| space.f_bavail * space.f_frsize < NO_ROOM)
}

/// Says how to get the data back, naming the newest copy that lies beside the file.
pub(super) fn damaged(path: &Path, detail: impl Into<String>) -> StoreError {
    let copy = super::copy::copies_beside(path).pop();
    let copy = copy.map_or_else(
        || "a backup".to_owned(),
        |copy| format!("a backup (or {}, made before an upgrade)", copy.display()),
    );
    let file = path.display();
    let restore = format!(
        "with the server stopped, move {file}, {file}-wal and {file}-shm to another place (keep them), copy {copy} to \
         {file}, and start again"
    );
    StoreError::Damaged { path: path.to_owned(), detail: detail.into(), restore }
}
