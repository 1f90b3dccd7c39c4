//! One machine's directory below the run directory, and the record in it.
//!
//! The directory belongs to the agent and is closed to QEMU, which gets everything as descriptors: a QEMU that a guest
//! took over can neither put links in the agent's way nor forge its record. All files are reached relative to an open
//! directory, so the length of the path does not matter to socket addresses.
//!
//! | file | what it is |
//! |---|---|
//! | `lock` | held by the living QEMU; owned by the user QEMU runs as |
//! | `spec.json` | the [`Record`], written before QEMU is executed |
//! | `ready` | the machine was complete: everything plugged in, any saved state read |
//! | `qmp.sock`, `console.sock` | bound by us, listened on by QEMU |
//! | `qemu.log`, `console.log`, `qmp.log` | what QEMU, the guest's serial port and the monitor said |

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::disk::DiskPlaces;
use crate::error::{Error, Result};
use crate::process::lock;
use crate::process::pidfd::Pidfd;
use crate::spec::{Accelerator, MachineType};
use crate::text::{LAST_WORDS_MAX, last_words};

pub(crate) const QMP_SOCKET: &str = "qmp.sock";
pub(crate) const CONSOLE_SOCKET: &str = "console.sock";
pub(crate) const CONSOLE_LOG: &str = "console.log";
pub(crate) const QEMU_LOG: &str = "qemu.log";
const LOCK: &str = "lock";
const RECORD: &str = "spec.json";
const READY: &str = "ready";
const MAX_RECORD: u64 = 4 << 20;

/// What was started: enough to adopt it, and for a person to see how it was run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: Uuid,
    pub(crate) name: String,
    pub(crate) machine: MachineType,
    pub(crate) machine_version: String,
    pub(crate) accelerator: Accelerator,
    pub(crate) cpu_model: String,
    pub(crate) vnc: bool,
    #[serde(default)]
    pub(crate) disk_places: DiskPlaces,
    /// Since the epoch.
    pub(crate) started_at_ms: u64,
    pub(crate) argv: Vec<String>,
}

impl Record {
    pub(crate) fn started_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.started_at_ms)
    }
}

#[derive(Debug, Clone)]
pub(crate) struct RunDir {
    path: PathBuf,
    fd: Arc<OwnedFd>,
}

impl RunDir {
    pub(crate) fn path_of(run_dir: &Path, id: Uuid) -> PathBuf {
        run_dir.join(id.to_string())
    }

    /// None when there is no such directory.
    pub(crate) fn open(run_dir: &Path, id: Uuid) -> Result<Option<Self>> {
        let path = Self::path_of(run_dir, id);
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { path, fd: Arc::new(fd) })),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(Error::io("opening", path)(error.into())),
        }
    }

    /// Makes the directory if need be and locks it against other starts and `forget`. The lock goes with the last
    /// descriptor, a child's copy included.
    pub(crate) fn create_locked(run_dir: &Path, id: Uuid) -> Result<Self> {
        loop {
            let path = Self::path_of(run_dir, id);
            match rustix::fs::mkdir(&path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(Error::io("making", path)(error.into())),
            }
            if let Some(dir) = Self::open(run_dir, id)?
                && dir.lock_in_place()?
            {
                return Ok(dir);
            }
        }
    }

    /// Locks the directory; false when it was removed while we waited.
    pub(crate) fn lock_in_place(&self) -> Result<bool> {
        lock::lock_directory(&self.fd).map_err(Error::io("locking", &self.path))?;
        let ours = rustix::fs::fstat(&*self.fd).map_err(|error| self.io_error("reading", "", error))?;
        match rustix::fs::lstat(&self.path) {
            Ok(now) => Ok((now.st_dev, now.st_ino) == (ours.st_dev, ours.st_ino)),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(self.io_error("reading", "", error)),
        }
    }

    /// Lets others have the directory; also takes the lock from a child that has a copy of the descriptor.
    pub(crate) fn unlock(&self) {
        if let Err(error) = rustix::fs::flock(&*self.fd, rustix::fs::FlockOperation::Unlock) {
            tracing::error!(dir = %self.path.display(), %error, "a run directory cannot be unlocked");
        }
    }

    pub(crate) fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    fn io_error(&self, what: &'static str, name: &str, error: Errno) -> Error {
        Error::io(what, self.path.join(name))(error.into())
    }

    fn openat(&self, name: &str, flags: OFlags) -> Result<File, Errno> {
        openat(&*self.fd, name, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::RUSR | Mode::WUSR)
            .map(File::from)
    }

    /// The lock file, made if missing.
    pub(crate) fn lock_file(&self) -> Result<OwnedFd> {
        self.openat(LOCK, OFlags::RDWR | OFlags::CREATE)
            .map(OwnedFd::from)
            .map_err(|error| self.io_error("opening", LOCK, error))
    }

    /// The living QEMU of this machine.
    pub(crate) fn holder(&self) -> Result<Option<Pidfd>> {
        match self.openat(LOCK, OFlags::RDWR) {
            Ok(file) => {
                lock::holder(file.as_fd()).map_err(Error::io("looking for the holder of", self.file(LOCK)))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(self.io_error("opening", LOCK, error)),
        }
    }

    /// The user id that QEMU ran as, by the owner of its lock file.
    pub(crate) fn lock_owner(&self) -> Option<u32> {
        rustix::fs::statat(&*self.fd, LOCK, AtFlags::SYMLINK_NOFOLLOW).ok().map(|stat| stat.st_uid)
    }

    /// A log that only grows.
    pub(crate) fn append(&self, name: &str) -> Result<File> {
        self.openat(name, OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE)
            .map_err(|error| self.io_error("opening", name, error))
    }

    /// Puts the log of the run before aside.
    pub(crate) fn set_aside(&self, name: &str) -> Result<()> {
        match rustix::fs::renameat(&*self.fd, name, &*self.fd, format!("{name}.1")) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.io_error("renaming", name, error)),
        }
    }

    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        match unlinkat(&*self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(self.io_error("removing", name, error)),
        }
    }

    fn through_fd(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()))
    }

    /// A socket that listens already, so a client may connect before QEMU takes over.
    pub(crate) fn listen(&self, name: &str) -> Result<UnixListener> {
        self.remove(name)?;
        UnixListener::bind(self.through_fd(name)).map_err(Error::io("binding", self.file(name)))
    }

    /// Connects without waiting; fails when nobody listens.
    pub(crate) fn connect(&self, name: &str) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(self.through_fd(name))?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    }

    pub(crate) fn write_record(&self, record: &Record) -> Result<()> {
        let unfinished = "spec.json.partial";
        self.remove(unfinished)?;
        let text = serde_json::to_vec_pretty(record)
            .map_err(|error| Error::io("writing", self.file(RECORD))(error.into()))?;
        let mut file = self
            .openat(unfinished, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)
            .map_err(|error| self.io_error("making", unfinished, error))?;
        file.write_all(&text).map_err(Error::io("writing", self.file(unfinished)))?;
        rustix::fs::renameat(&*self.fd, unfinished, &*self.fd, RECORD)
            .map_err(|error| self.io_error("renaming", unfinished, error))
    }

    pub(crate) fn read_record(&self) -> Result<Record> {
        let file =
            self.openat(RECORD, OFlags::RDONLY).map_err(|error| self.io_error("opening", RECORD, error))?;
        serde_json::from_reader(file.take(MAX_RECORD))
            .map_err(|error| Error::io("reading", self.file(RECORD))(error.into()))
    }

    pub(crate) fn mark_ready(&self) -> Result<()> {
        self.openat(READY, OFlags::WRONLY | OFlags::CREATE)
            .map(drop)
            .map_err(|error| self.io_error("making", READY, error))
    }

    pub(crate) fn unmark_ready(&self) -> Result<()> {
        self.remove(READY)
    }

    pub(crate) fn is_ready(&self) -> bool {
        rustix::fs::statat(&*self.fd, READY, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// The end of QEMU's log.
    pub(crate) fn last_words(&self) -> String {
        let tail = || -> io::Result<Vec<u8>> {
            let mut file = self.openat(QEMU_LOG, OFlags::RDONLY)?;
            let length = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS_MAX as u64)))?;
            let mut bytes = Vec::new();
            file.take(LAST_WORDS_MAX as u64).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        last_words(&tail().unwrap_or_default())
    }

    /// When a log has grown past `limit`, its end becomes `NAME.1` and it begins anew. QEMU appends, so it goes on at
    /// the new end; what it writes in the instant between copy and cut may be lost.
    pub(crate) fn rotate(&self, name: &str, limit: u64) -> Result<()> {
        let mut log = match self.openat(name, OFlags::RDWR) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(self.io_error("opening", name, error)),
        };
        let failed = || Error::io("rotating", self.file(name));
        let length = log.seek(SeekFrom::End(0)).map_err(failed())?;
        if length <= limit {
            return Ok(());
        }
        let older = format!("{name}.1");
        self.remove(&older)?;
        let mut copy = self
            .openat(&older, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)
            .map_err(|error| self.io_error("making", &older, error))?;
        log.seek(SeekFrom::Start(length.saturating_sub(limit))).map_err(failed())?;
        io::copy(&mut (&mut log).take(limit.saturating_mul(2)), &mut copy).map_err(failed())?;
        log.set_len(0).map_err(failed())
    }

    /// Removes the directory and all in it. The caller holds its lock and knows that no QEMU lives.
    pub(crate) fn destroy(self) -> Result<()> {
        match std::fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("removing", &self.path)(error))
            }
            _ => Ok(()),
        }
    }
}

/// The machines that have a directory; anything else in there is left alone.
pub(crate) fn list(run_dir: &Path) -> Result<Vec<Uuid>> {
    let entries = match std::fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("listing", run_dir)(error)),
    };
    let mut ids = Vec::new();
    for entry in entries {
        let name = entry.map_err(Error::io("listing", run_dir))?.file_name();
        // Only the canonical spelling, so that one machine has one directory.
        if let Some(text) = name.to_str()
            && let Ok(id) = Uuid::parse_str(text)
            && id.to_string() == text
        {
            ids.push(id);
        }
    }
    ids.sort_unstable();
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Uuid = Uuid::from_u128(7);

    fn dir() -> (tempfile::TempDir, RunDir) {
        let parent = tempfile::tempdir().unwrap();
        let dir = RunDir::create_locked(parent.path(), ID).unwrap();
        (parent, dir)
    }

    #[test]
    fn records_round_trip_and_a_damaged_one_is_an_error() {
        let (_parent, dir) = dir();
        let record = Record {
            id: ID,
            name: "a".into(),
            machine: MachineType::Q35,
            machine_version: "pc-q35-7.2".into(),
            accelerator: Accelerator::Tcg,
            cpu_model: "max".into(),
            vnc: true,
            disk_places: DiskPlaces { virtio: 8, scsi: false },
            started_at_ms: 5,
            argv: vec!["-S".into()],
        };
        dir.write_record(&record).unwrap();
        assert_eq!(dir.read_record().unwrap(), record);
        std::fs::write(dir.file(RECORD), "{").unwrap();
        assert!(dir.read_record().is_err());
    }

    #[test]
    fn rotation_keeps_the_end_and_the_writer_goes_on() {
        let (_parent, dir) = dir();
        let mut writer = dir.append(CONSOLE_LOG).unwrap();
        writer.write_all(b"0123456789").unwrap();
        dir.rotate(CONSOLE_LOG, 10).unwrap();
        assert!(!dir.file("console.log.1").exists());
        dir.rotate(CONSOLE_LOG, 4).unwrap();
        writer.write_all(b"ab").unwrap();
        assert_eq!(std::fs::read(dir.file("console.log.1")).unwrap(), b"6789");
        assert_eq!(std::fs::read(dir.file(CONSOLE_LOG)).unwrap(), b"ab");
    }

    #[test]
    fn sockets_work_below_a_very_long_path() {
        let parent = tempfile::tempdir().unwrap();
        let long = parent.path().join("x".repeat(200));
        std::fs::create_dir(&long).unwrap();
        let dir = RunDir::create_locked(&long, ID).unwrap();
        let _listener = dir.listen(QMP_SOCKET).unwrap();
        dir.connect(QMP_SOCKET).unwrap();
    }

    #[test]
    fn only_machine_directories_are_listed() {
        let (parent, dir) = dir();
        for other in ["lost+found", "00000000000000000000000000000007"] {
            std::fs::create_dir(parent.path().join(other)).unwrap();
        }
        assert_eq!(list(parent.path()).unwrap(), [ID]);
        dir.destroy().unwrap();
        assert!(list(parent.path()).unwrap().is_empty());
        assert!(list(Path::new("/nonexistent")).unwrap().is_empty());
    }
}
