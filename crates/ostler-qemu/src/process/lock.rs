//! The lock that tells whether a machine's QEMU lives.
//!
//! QEMU holds a POSIX record lock on `lock` in the machine's run directory. The child takes it between fork and exec, it
//! survives exec, and the kernel drops it when the process ends, however it ends. The kernel also names its holder, so a
//! pid is never read from a file. The agent itself never holds it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::pidfd::Pidfd;

/// The whole file, exclusively.
pub(crate) fn whole_file() -> libc::flock {
    // SAFETY: `flock` is a plain C struct of integers, for which zero is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

/// The pid of the process that holds the lock.
pub(crate) fn holder_pid(file: BorrowedFd<'_>) -> io::Result<Option<u32>> {
    let mut lock = whole_file();
    // SAFETY: the descriptor is open for the call, and `lock` is a valid struct that the kernel fills in.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) } == -1 {
        return Err(io::Error::last_os_error());
    }
    if i32::from(lock.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    match u32::try_from(lock.l_pid) {
        Ok(pid) if pid > 0 => Ok(Some(pid)),
        _ => Err(io::Error::other("the machine's lock is held by a process of another pid namespace")),
    }
}

/// The process that holds the lock, pinned: the pid cannot have passed to another process meanwhile.
pub(crate) fn holder(file: BorrowedFd<'_>) -> io::Result<Option<Pidfd>> {
    loop {
        let Some(pid) = holder_pid(file)? else { return Ok(None) };
        match Pidfd::open(pid) {
            // Still the holder now that the descriptor pins it: so the descriptor is of the holder.
            Ok(pidfd) if holder_pid(file)? == Some(pid) => return Ok(Some(pidfd)),
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Keeps two starts (or a start and a forget) of one machine apart, also between processes. Held on the run directory
/// itself by whoever prepares it, and by the child until it has the machine's lock. Blocks.
pub(crate) fn lock_directory(dir: &OwnedFd) -> io::Result<()> {
    Ok(rustix::fs::flock(dir, rustix::fs::FlockOperation::LockExclusive)?)
}
