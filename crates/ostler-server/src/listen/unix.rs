//! The local administrator's unix socket.
//!
//! What always holds: it is never open to others, not even for a moment; a socket on which somebody answers is never
//! taken away; what is removed at the end is the socket that was made at the start.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::UnixListener;

use super::{BindError, socket_error};

/// Longest path: `sun_path` without its final zero.
const PATH_MAX: usize = 107;

/// A listening unix socket and the file that stands for it.
#[derive(Debug)]
pub(crate) struct UnixSocket {
    /// Dropped first: as long as somebody listens nobody puts another socket in its place.
    pub(crate) file: SocketFile,
    pub(crate) listener: UnixListener,
}

/// Removes the socket's file when dropped, if it is still the one that was made.
#[derive(Debug)]
pub(crate) struct SocketFile {
    pub(crate) path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|meta| meta.ino() == self.inode)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the unix socket cannot be removed");
        }
    }
}

impl UnixSocket {
    pub(crate) fn bind(path: &Path) -> Result<Self, BindError> {
        let len = path.as_os_str().len();
        if len > PATH_MAX {
            return Err(BindError::SocketPathTooLong { path: path.to_owned(), len, max: PATH_MAX });
        }
        check_dir(path)?;
        remove_stale(path)?;
        let listener = listen(path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::SocketInUse { path: path.to_owned() },
            _ => BindError::Socket { what: "listen on", path: path.to_owned(), source },
        })?;
        let inode = std::fs::symlink_metadata(path).map_err(socket_error("look at", path))?.ino();
        Ok(Self { file: SocketFile { path: path.to_owned(), inode }, listener })
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode of the unbound socket, so it is private from its first moment on.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 1024)?;
    UnixListener::from_std(socket.into())
}

/// Whoever can rename things in the directory could put another socket there.
fn check_dir(path: &Path) -> Result<(), BindError> {
    let dir = match path.parent() {
        Some(dir) if dir.as_os_str().is_empty() => Path::new("."),
        Some(dir) => dir,
        None => Path::new("/"),
    };
    let refuse = |why| BindError::SocketDir { dir: dir.to_owned(), why };
    let meta = match std::fs::metadata(dir) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(refuse("does not exist: make it first"));
        }
        Err(source) => return Err(socket_error("look at", dir)(source)),
    };
    if !meta.is_dir() {
        return Err(refuse("is not a directory"));
    }
    let (others_write, sticky) = (meta.mode() & 0o022 != 0, meta.mode() & 0o1000 != 0);
    if others_write && !sticky {
        return Err(refuse(
            "may be written by other users, who could put a socket of theirs there: chmod go-w",
        ));
    }
    Ok(())
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(socket_error("look at", path)(source)),
    };
    if !meta.file_type().is_socket() {
        return Err(BindError::NotASocket { path: path.to_owned() });
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(BindError::SocketInUse { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "a socket that a server left behind is replaced");
            std::fs::remove_file(path).map_err(socket_error("remove", path))
        }
        // A full backlog, or a socket of another type: somebody is there.
        Err(_) => Err(BindError::SocketInUse { path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn private_replaced_when_stale_and_removed_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let first = UnixSocket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(UnixSocket::bind(&path), Err(BindError::SocketInUse { .. })));
        drop(first);
        assert!(!path.exists());
        // What kill -9 leaves: the file without a listener.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(UnixSocket::bind(&path).unwrap());
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn another_ones_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let first = UnixSocket::bind(&path).unwrap();
        // Moved and not removed, so that its inode is not given out again.
        std::fs::rename(&path, dir.path().join("old.sock")).unwrap();
        let second = UnixSocket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
    }

    #[tokio::test]
    async fn what_cannot_be_a_socket_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(matches!(UnixSocket::bind(&file), Err(BindError::NotASocket { .. })));
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        let long = dir.path().join("x".repeat(120));
        assert!(matches!(UnixSocket::bind(&long), Err(BindError::SocketPathTooLong { .. })));
        assert!(matches!(
            UnixSocket::bind(&dir.path().join("no/api.sock")),
            Err(BindError::SocketDir { .. })
        ));
        let open = dir.path().join("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(UnixSocket::bind(&open.join("api.sock")), Err(BindError::SocketDir { .. })));
    }
}
