//! File helpers shared by the store and the pools: locks that die with their holder, files that appear whole, digests.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, FlockOperation, RenameFlags};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use crate::{ImageRef, StorageError};

/// Unit of reading, hashing and looking for holes.
pub(crate) const CHUNK: usize = 1 << 20;
/// Zero runs are turned into holes in this granularity.
const HOLE: usize = 64 << 10;

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

/// Attaches what was done to which path to an I/O error.
pub(crate) trait Context<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, StorageError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, StorageError> {
        self.map_err(|source| StorageError::io(action, path, source))
    }
}

/// Creates a directory for our eyes only, and its parents.
pub(crate) fn create_dir(path: &Path) -> Result<(), StorageError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).context("create the directory", path)
}

/// Makes renames and removals in a directory survive a crash of the machine.
pub(crate) fn sync_dir(path: &Path) -> Result<(), StorageError> {
    File::open(path).and_then(|dir| dir.sync_all()).context("sync the directory", path)
}

/// Removes a file; true if it was there.
pub(crate) fn remove(path: &Path) -> Result<bool, StorageError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(StorageError::io("remove", path, error)),
    }
}

/// Opens a regular file for reading and follows no link.
pub(crate) fn open_regular(path: &Path) -> Result<File, StorageError> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
        .context("open", path)?;
    if !file.metadata().context("look at", path)?.is_file() {
        return Err(StorageError::Damaged {
            path: path.to_owned(),
            why: "it is not a regular file".to_owned(),
        });
    }
    Ok(file)
}

/// Creates a file that did not exist, readable by us only.
pub(crate) fn create_new(path: &Path) -> Result<File, StorageError> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).context("create", path)
}

/// Replaces the content of a small file in one step, durably.
pub(crate) fn write_atomic(path: &Path, content: &[u8]) -> Result<(), StorageError> {
    let scratch = Scratch::create(path.with_extension("tmp"))?;
    io::Write::write_all(&mut &scratch.file, content).context("write", &scratch.path)?;
    scratch.replace(path)
}

/// A file that is removed again unless it is kept or published.
#[derive(Debug)]
pub(crate) struct Scratch {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    kept: bool,
}

impl Scratch {
    /// Creates the file, over what a killed process may have left.
    pub(crate) fn create(path: PathBuf) -> Result<Self, StorageError> {
        remove(&path)?;
        let file = create_new(&path)?;
        Ok(Self { path, file, kept: false })
    }

    pub(crate) fn keep(mut self) {
        self.kept = true;
    }

    /// Syncs the file and gives it its final name and mode. False if a file of that name was there already.
    pub(crate) fn publish(self, to: &Path, mode: u32) -> Result<bool, StorageError> {
        set_mode(&self.file, &self.path, mode)?;
        self.file.sync_all().context("sync", &self.path)?;
        let fresh = rename_new(&self.path, to)?;
        if fresh {
            self.keep();
        }
        sync_dir(to.parent().expect("a file has a folder"))?;
        Ok(fresh)
    }

    /// Syncs the file and gives it its final name, in place of a file that has it.
    pub(crate) fn replace(self, to: &Path) -> Result<(), StorageError> {
        self.file.sync_all().context("sync", &self.path)?;
        fs::rename(&self.path, to).context("rename", to)?;
        self.keep();
        sync_dir(to.parent().expect("a file has a folder"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.kept {
            // What cannot be removed now is swept at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

pub(crate) fn set_mode(file: &File, path: &Path, mode: u32) -> Result<(), StorageError> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(mode)).context("set the mode of", path)
}

/// Renames without ever replacing a file. False if `to` exists.
pub(crate) fn rename_new(from: &Path, to: &Path) -> Result<bool, StorageError> {
    let cwd = rustix::fs::CWD;
    match rustix::fs::renameat_with(cwd, from, cwd, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Ok(false),
        // Some network file systems know no such flag.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
            match fs::hard_link(from, to) {
                Ok(()) => remove(from).map(|_| true),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
                Err(error) => Err(StorageError::io("rename", to, error)),
            }
        }
        Err(error) => Err(StorageError::io("rename", to, error.into())),
    }
}

/// How a lock is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LockKind {
    Shared,
    Exclusive,
}

/// A lock on a file of its own, given back when dropped or when the process dies.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone would not do: a process that another thread has just forked has a copy of the descriptor until it
        // executes its program, and would hold the lock as long.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

impl Lock {
    /// Waits for the lock.
    pub(crate) fn wait(path: &Path, kind: LockKind) -> Result<Self, StorageError> {
        let operation = match kind {
            LockKind::Shared => FlockOperation::LockShared,
            LockKind::Exclusive => FlockOperation::LockExclusive,
        };
        Ok(Self::take(path, operation)?.expect("a waiting lock is always granted"))
    }

    /// Takes the exclusive lock if nobody has it.
    pub(crate) fn try_exclusive(path: &Path) -> Result<Option<Self>, StorageError> {
        Self::take(path, FlockOperation::NonBlockingLockExclusive)
    }

    /// Takes the shared lock unless someone has the exclusive one.
    pub(crate) fn try_shared(path: &Path) -> Result<Option<Self>, StorageError> {
        Self::take(path, FlockOperation::NonBlockingLockShared)
    }

    fn take(path: &Path, operation: FlockOperation) -> Result<Option<Self>, StorageError> {
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .context("open the lock", path)?;
            match rustix::io::retry_on_intr(|| rustix::fs::flock(&file, operation)) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(StorageError::io("lock", path, error.into())),
            }
            // The holder before may have removed the file, and then this lock would guard nothing.
            let mine = file.metadata().context("look at", path)?;
            if fs::metadata(path).is_ok_and(|now| now.ino() == mine.ino() && now.dev() == mine.dev()) {
                return Ok(Some(Self { file }));
            }
        }
    }
}

/// Reads the whole file for its SHA-256, and turns runs of zeroes into holes when `dig` is set.
/// `progress` hears the bytes done.
pub(crate) fn digest(
    file: &File,
    path: &Path,
    dig: bool,
    cancel: &CancellationToken,
    mut progress: impl FnMut(u64),
) -> Result<String, StorageError> {
    let mut hasher = Sha256::new();
    let mut buf = vec![0u8; CHUNK];
    let mut reader = file;
    reader.seek(SeekFrom::Start(0)).context("read", path)?;
    let mut done = 0u64;
    loop {
        if cancel.is_cancelled() {
            return Err(StorageError::Cancelled);
        }
        let read = read_full(&mut reader, &mut buf).context("read", path)?;
        if read == 0 {
            break;
        }
        hasher.update(&buf[..read]);
        if dig {
            for (index, piece) in buf[..read].chunks(HOLE).enumerate() {
                if piece.len() == HOLE && is_zero(piece) {
                    // Only saves room; where the file system cannot, nothing is lost.
                    let _ = rustix::fs::fallocate(
                        file,
                        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                        done + (index * HOLE) as u64,
                        HOLE as u64,
                    );
                }
            }
        }
        done += read as u64;
        progress(done);
    }
    Ok(hex(&hasher.finalize()))
}

/// Copies `from` to the empty file `to`, leaving holes for zeroes.
pub(crate) fn copy_sparse(
    mut from: &File,
    from_path: &Path,
    to: &File,
    to_path: &Path,
    cancel: &CancellationToken,
    mut progress: impl FnMut(u64),
) -> Result<u64, StorageError> {
    from.seek(SeekFrom::Start(0)).context("read", from_path)?;
    let mut buf = vec![0u8; CHUNK];
    let mut done = 0u64;
    loop {
        if cancel.is_cancelled() {
            return Err(StorageError::Cancelled);
        }
        let read = read_full(&mut from, &mut buf).context("read", from_path)?;
        if read == 0 {
            break;
        }
        write_sparse(to, done, &buf[..read]).context("write", to_path)?;
        done += read as u64;
        progress(done);
    }
    to.set_len(done).context("write", to_path)?;
    Ok(done)
}

/// Shares the blocks of `from` with the empty file `to` where the file system can.
pub(crate) fn reflink(from: &File, to: &File) -> bool {
    rustix::fs::ioctl_ficlone(to, from).is_ok()
}

/// Writes at an offset and leaves a hole for each run of zeroes; the caller sets the length at the end.
pub(crate) fn write_sparse(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    for (index, piece) in bytes.chunks(HOLE).enumerate() {
        if !is_zero(piece) {
            file.write_all_at(piece, offset + (index * HOLE) as u64)?;
        }
    }
    Ok(())
}

/// Fills the buffer as far as the reader has bytes.
pub(crate) fn read_full(reader: &mut dyn Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match reader.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// The images among the files of a directory.
pub(crate) fn list_images(dir: &Path) -> Result<Vec<ImageRef>, StorageError> {
    let mut images = Vec::new();
    for entry in fs::read_dir(dir).context("list", dir)? {
        let name = entry.context("list", dir)?.file_name();
        images.extend(name.to_str().and_then(ImageRef::from_file_name));
    }
    images.sort();
    Ok(images)
}
