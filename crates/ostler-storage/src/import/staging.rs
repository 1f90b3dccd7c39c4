//! The files of one import under `incoming/`, all named after its id.
//!
//! | file | what |
//! |---|---|
//! | `<id>.lock` | held by whoever works on the import |
//! | `<id>.upload` | the bytes as they came |
//! | `<id>.mark` | how much of them is safe, and where they came from |
//! | `<id>.plain` | unpacked |
//! | `<id>.qcow2` | converted |
//! | `<id>.done` | the result, written before the stored file gets its name |

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::UploadSource;
use crate::{
    StorageError,
    files::{self, Context, Lock},
};

/// How long to wait for a holder that is about to let go, such as a request that was just cut off.
const PATIENCE: Duration = Duration::from_secs(2);
/// Everything but the lock.
const SUFFIXES: [&str; 6] = ["plain", "qcow2", "tmp", "mark", "upload", "done"];
/// What a killed import leaves and a new one makes again.
const INTERMEDIATE: [&str; 3] = ["plain", "qcow2", "tmp"];

/// The paths of one import.
#[derive(Debug, Clone)]
pub(super) struct Staging {
    incoming: PathBuf,
    id: String,
}

/// What is known about the upload beside its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mark {
    /// The boot of the machine in which this was written. In the same boot the file's length is right; after a crash of
    /// the machine only what was synced is.
    pub(super) boot: String,
    pub(super) synced: u64,
    pub(super) source: Option<UploadSource>,
}

impl Staging {
    pub(super) fn new(incoming: &Path, id: &str) -> Result<Self, StorageError> {
        let fine = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if id.is_empty() || id.len() > 64 || !id.bytes().all(fine) {
            return Err(StorageError::Invalid {
                what: "upload id",
                why: format!("{id:?} is not 1 to 64 letters, digits, '-' and '_'"),
            });
        }
        Ok(Self { incoming: incoming.to_owned(), id: id.to_owned() })
    }

    /// The ids of all files in `incoming`.
    pub(super) fn ids(incoming: &Path) -> Result<BTreeSet<String>, StorageError> {
        let mut ids = BTreeSet::new();
        for entry in fs::read_dir(incoming).context("list", incoming)? {
            let name = entry.context("list", incoming)?.file_name();
            if let Some((id, suffix)) = name.to_str().and_then(|name| name.split_once('.'))
                && (suffix == "lock" || SUFFIXES.contains(&suffix))
                && Self::new(incoming, id).is_ok()
            {
                ids.insert(id.to_owned());
            }
        }
        Ok(ids)
    }

    fn file(&self, suffix: &str) -> PathBuf {
        self.incoming.join(format!("{}.{suffix}", self.id))
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn incoming(&self) -> &Path {
        &self.incoming
    }

    pub(super) fn upload(&self) -> PathBuf {
        self.file("upload")
    }

    pub(super) fn plain(&self) -> PathBuf {
        self.file("plain")
    }

    pub(super) fn converted(&self) -> PathBuf {
        self.file("qcow2")
    }

    pub(super) fn done(&self) -> PathBuf {
        self.file("done")
    }

    fn mark(&self) -> PathBuf {
        self.file("mark")
    }

    /// Takes the import; `busy` when someone keeps it.
    pub(super) fn lock(&self) -> Result<Lock, StorageError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(lock) = self.try_lock()? {
                return Ok(lock);
            }
            if Instant::now() >= deadline {
                return Err(StorageError::Busy { what: format!("the upload {}", self.id) });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(super) fn try_lock(&self) -> Result<Option<Lock>, StorageError> {
        Lock::try_exclusive(&self.file("lock"))
    }

    /// Removes everything. The caller holds the lock, and the lock's file goes last.
    pub(super) fn remove_all(&self) -> Result<(), StorageError> {
        for suffix in SUFFIXES {
            files::remove(&self.file(suffix))?;
        }
        files::remove(&self.file("lock"))?;
        files::sync_dir(&self.incoming)
    }

    /// Removes what can be made again. The caller holds the lock.
    pub(super) fn remove_intermediate(&self) -> Result<(), StorageError> {
        for suffix in INTERMEDIATE {
            files::remove(&self.file(suffix))?;
        }
        Ok(())
    }

    /// Removes what is of no use once the result is stored; the result itself stays for whoever asks again.
    pub(super) fn remove_sources(&self) -> Result<(), StorageError> {
        self.remove_intermediate()?;
        files::remove(&self.upload())?;
        files::remove(&self.mark())?;
        Ok(())
    }

    /// Opens or creates the staging file and tells how many of its bytes are good.
    pub(super) fn open_upload(&self) -> Result<(File, u64, Mark), StorageError> {
        let path = self.upload();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .context("open", &path)?;
        let len = file.metadata().context("look at", &path)?.len();
        let boot = boot_id();
        let found: Option<Mark> = read_json(&self.mark())?;
        let (good, mark) = match found {
            Some(mark) if mark.boot == boot => (len, mark),
            Some(mark) => (mark.synced.min(len), Mark { boot, ..mark }),
            None => (0, Mark { boot, synced: 0, source: None }),
        };
        file.set_len(good).context("truncate", &path)?;
        self.write_mark(&mark)?;
        Ok((file, good, mark))
    }

    pub(super) fn write_mark(&self, mark: &Mark) -> Result<(), StorageError> {
        write_json(&self.mark(), mark)
    }
}

/// Reads a small file of ours; what is no longer readable counts as absent.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StorageError> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StorageError::io("read", path, error)),
    }
}

pub(super) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StorageError> {
    let bytes = serde_json::to_vec(value).expect("plain data can be written as JSON");
    files::write_atomic(path, &bytes)
}

/// Names this boot of the machine; where the kernel does not tell, every start counts as a new one.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| uuid::Uuid::new_v4().to_string(), |text| text.trim().to_owned())
}
