//! One server per database: a lock file beside it, held as long as the process lives, with the holder's pid in it for
//! the one who comes second. The kernel gives the lock up when its holder dies, however it dies.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::{Result, StoreError};

/// How long a held lock is asked for again. A process that was killed while it started another one leaves its lock to
/// that child until the child executes its program, which is soon.
const HANDOVER: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    pub(super) fn acquire(database: &Path) -> Result<Self> {
        let path = super::copy::with_suffix(database, ".lock");
        let io = |error| StoreError::file("locking", &path, error);
        // Never truncated on opening: until the lock is ours the content belongs to its holder.
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        let began = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) if began.elapsed() < HANDOVER => std::thread::sleep(PAUSE),
                Err(Errno::WOULDBLOCK) => {
                    let mut holder = String::new();
                    let pid = file.read_to_string(&mut holder).ok().and_then(|_| holder.trim().parse().ok());
                    return Err(StoreError::Locked { path: database.to_owned(), pid });
                }
                Err(error) => return Err(io(error.into())),
            }
        }
        file.set_len(0).and_then(|()| file.rewind()).map_err(io)?;
        writeln!(file, "{}", std::process::id()).map_err(io)?;
        Ok(Self { _file: file })
    }
}
