//! Opening a database file: only one that is ours, whole, and used by nobody else; or making a new one.
//!
//! What is checked: the file's header, application id and layout version; that no page is missing at its end; in files up
//! to [`FULL_CHECK_BYTES`] every page, index entry and row checksum. In larger ones each row's checksum is checked when
//! the row is read, which a server does with all current rows when it starts.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::error::{damaged, sql};
use super::layout::{self, APPLICATION_ID, LAYOUT_VERSION, RowId};
use super::{SqliteOptions, copy, lock::Lock, read};
use crate::leases::Leases;
use crate::{LeaseId, Result, StoreError};

const FULL_CHECK_BYTES: u64 = 32 * 1024 * 1024;
const PAGE_BYTES: u64 = 4096;
const MAGIC: &[u8] = b"SQLite format 3\0";
/// How long another program that looks into the file (a shell, a backup tool) may hold us up.
const BUSY: Duration = Duration::from_secs(10);

pub(super) struct Opened {
    pub(super) lock: Lock,
    pub(super) connection: Connection,
    pub(super) revision: u64,
    pub(super) compacted: u64,
    pub(super) swept: RowId,
    pub(super) schema: u32,
    pub(super) leases: Leases,
}

pub(super) fn open(options: &SqliteOptions) -> Result<Opened> {
    let path = &options.path;
    // First of all: reading and closing the file would drop the locks of a database that is open in this process.
    let lock = Lock::acquire(path)?;
    match check_header(path)? {
        Header::Ours => {}
        Header::Missing => create(path)?,
    }
    let connection = connect(options)?;
    check_content(path, &connection)?;
    load(lock, connection).map_err(sql("reading", path))?.check(path)
}

/// A connection with our settings, for writing or reading.
pub(super) fn connect(options: &SqliteOptions) -> Result<Connection> {
    let path = &options.path;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(path, flags)
        .and_then(|connection| {
            connection.busy_timeout(BUSY)?;
            // Otherwise SQLite plans a statement anew for each value that is bound, which costs more than running it.
            connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
            settings(&connection)?;
            if let Some(bytes) = options.max_bytes {
                let pages = i64::try_from(bytes / PAGE_BYTES).unwrap_or(i64::MAX);
                connection.pragma_update_and_check(None, "max_page_count", pages, |_| Ok(()))?;
            }
            connection.set_prepared_statement_cache_capacity(32);
            Ok(connection)
        })
        .map_err(sql("opening", path))
}

/// `synchronous = FULL` syncs the log at every commit. The log is taken into the file every 16 MiB rather than every
/// 4, since most pages are written many times in between.
fn settings(connection: &Connection) -> rusqlite::Result<()> {
    connection.execute_batch(
        "PRAGMA journal_mode = WAL;
         PRAGMA synchronous = FULL;
         PRAGMA wal_autocheckpoint = 4000;
         PRAGMA journal_size_limit = 67108864;
         PRAGMA cache_size = -4000;
         PRAGMA temp_store = MEMORY;
         PRAGMA trusted_schema = OFF;
         PRAGMA cell_size_check = ON;",
    )
}

enum Header {
    Missing,
    Ours,
}

fn check_header(path: &Path) -> Result<Header> {
    let mut header = Vec::new();
    match File::open(path) {
        Ok(file) => {
            file.take(100)
                .read_to_end(&mut header)
                .map_err(|error| StoreError::file("reading", path, error))?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let log = copy::with_suffix(path, "-wal");
            return match log.exists() {
                true => Err(damaged(
                    path,
                    format!("the file is missing, while its log {} is there", log.display()),
                )),
                false => Ok(Header::Missing),
            };
        }
        Err(error) => return Err(StoreError::file("reading", path, error)),
    }
    // A new file gets its name only when it is complete, so an empty one has lost its content.
    if header.iter().all(|byte| *byte == 0) {
        return Err(damaged(path, "the file is empty or begins with zeroes"));
    }
    let not_ours = |detail: String| StoreError::NotADatabase { path: path.to_owned(), detail };
    if !header.starts_with(MAGIC) {
        return Err(not_ours("it is not an SQLite file".to_owned()));
    }
    if header.len() < 100 {
        return Err(damaged(path, format!("the file ends after {} bytes", header.len())));
    }
    let field = |at: usize| i32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (layout, application) = (field(60), field(68));
    if application != APPLICATION_ID {
        return Err(not_ours(format!("an SQLite file of another program, application id {application:#x}")));
    }
    match u32::try_from(layout) {
        Ok(layout) if layout > LAYOUT_VERSION.unsigned_abs() => {
            Err(StoreError::SchemaTooNew { found: layout, supported: LAYOUT_VERSION.unsigned_abs() })
        }
        Ok(1..) => Ok(Header::Ours),
        Ok(0) | Err(_) => Err(damaged(path, format!("its layout version is {layout}"))),
    }
}

/// Makes a new database under another name, which becomes `path` when it is complete.
fn create(path: &Path) -> Result<()> {
    let new = copy::with_suffix(path, ".new");
    let io = |error| StoreError::file("creating", &new, error);
    for suffix in ["", "-wal", "-shm", "-journal"] {
        match std::fs::remove_file(copy::with_suffix(&new, suffix)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(io(error)),
            Ok(()) | Err(_) => {}
        }
    }
    // The modes of the log and its index follow the file's.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).map_err(io)?;
    Connection::open(&new)
        .and_then(|connection| {
            connection.execute_batch(&format!(
                "PRAGMA page_size = {PAGE_BYTES};
                 PRAGMA application_id = {APPLICATION_ID};
                 PRAGMA user_version = {LAYOUT_VERSION};
                 PRAGMA journal_mode = WAL;
                 BEGIN; {} COMMIT;",
                layout::CREATE
            ))?;
            connection.close().map_err(|(_, error)| error)
        })
        .map_err(sql("creating", &new))?;
    file.sync_all().map_err(io)?;
    std::fs::rename(&new, path).map_err(|error| StoreError::file("creating", path, error))?;
    copy::sync_directory(path)
}

fn check_content(path: &Path, connection: &Connection) -> Result<()> {
    let sql = sql("checking", path);
    // Whatever a crash left in the log is taken in first, so that the file's length says whether it is whole.
    connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).map_err(&sql)?;
    let pages: u64 = connection.query_row("PRAGMA page_count", [], |row| row.get(0)).map_err(&sql)?;
    let page: u64 = connection.query_row("PRAGMA page_size", [], |row| row.get(0)).map_err(&sql)?;
    let bytes = std::fs::metadata(path).map_err(|error| StoreError::file("checking", path, error))?.len();
    if bytes < pages * page {
        return Err(damaged(path, format!("it has {bytes} bytes of {}", pages * page)));
    }
    if bytes <= FULL_CHECK_BYTES {
        let found: String =
            connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(&sql)?;
        if found != "ok" {
            return Err(damaged(path, found));
        }
        read::check_all(connection, path)?;
    }
    Ok(())
}

struct Loaded {
    opened: Opened,
    meta: [i64; 3],
}

fn load(lock: Lock, connection: Connection) -> rusqlite::Result<Loaded> {
    let meta = [
        layout::meta(&connection, "compacted")?,
        layout::meta(&connection, "swept")?,
        layout::meta(&connection, "schema")?,
    ];
    let revision = layout::revision(&connection)?;
    let mut leases = Leases::default();
    let now = Instant::now();
    let mut statement = connection.prepare("SELECT id, ttl_ms FROM leases")?;
    let rows = statement.query_map([], |row| Ok((LeaseId(row.get(0)?), row.get(1)?)))?;
    for row in rows {
        let (id, ttl) = row?;
        leases.insert(id, Duration::from_millis(ttl), now);
    }
    drop(statement);
    let opened = Opened { lock, connection, revision, compacted: 0, swept: RowId(0), schema: 0, leases };
    Ok(Loaded { opened, meta })
}

impl Loaded {
    fn check(self, path: &Path) -> Result<Opened> {
        let [compacted, swept, schema] = self.meta;
        match (u64::try_from(compacted), u32::try_from(schema), swept) {
            (Ok(compacted), Ok(schema), 0..) if compacted <= self.opened.revision => {
                Ok(Opened { compacted, swept: RowId(swept), schema, ..self.opened })
            }
            _ => Err(damaged(
                path,
                format!(
                    "compacted up to {compacted}, swept up to {swept}, schema {schema} at revision {}",
                    self.opened.revision
                ),
            )),
        }
    }
}
