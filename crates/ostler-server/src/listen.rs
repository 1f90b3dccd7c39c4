//! Sockets that accept connections. Called by `Server::bind`; everything that can be refused is refused here, before
//! anything is served.

mod connections;
mod serve;
mod unix;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, TcpSocket};

pub(crate) use connections::{Connections, Held};
pub(crate) use serve::{Acceptor, Shutdown, accept_tcp, accept_unix};
pub(crate) use unix::UnixSocket;

use crate::tls::TlsError;

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error(
        "{addr} is in use by another program: end that one, or choose another address (--listen ADDR:PORT)"
    )]
    AddressInUse { addr: SocketAddr },
    #[error("cannot listen on {addr}: this host does not have that address")]
    NoSuchAddress { addr: SocketAddr },
    #[error("cannot listen on {addr}")]
    Listen {
        addr: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("HTTP without TLS is served on loopback addresses only, and {addr} is none: use TLS there")]
    NotLoopback { addr: SocketAddr },
    #[error("another server answers on {path}: end that one, or choose another socket")]
    SocketInUse { path: PathBuf },
    #[error(
        "the socket's path {path} has {len} bytes and at most {max} are possible: choose a shorter data directory"
    )]
    SocketPathTooLong { path: PathBuf, len: usize, max: usize },
    #[error("{path} is there and is not a socket; it is left alone: remove it, or choose another path")]
    NotASocket { path: PathBuf },
    #[error("{dir}, where the socket goes, {why}")]
    SocketDir { dir: PathBuf, why: &'static str },
    #[error("cannot {what} {path}")]
    Socket {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("there is nothing to listen on: name a unix socket, a TLS address or both")]
    Nothing,
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Listens on a TCP address.
pub(crate) fn bind_tcp(addr: SocketAddr) -> Result<TcpListener, BindError> {
    let listen = || {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        // Accepted connections inherit both.
        socket.set_keepalive(true)?;
        socket.set_nodelay(true)?;
        socket.bind(addr)?;
        socket.listen(1024)
    };
    listen().map_err(|source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::AddressInUse { addr },
        io::ErrorKind::AddrNotAvailable => BindError::NoSuchAddress { addr },
        _ => BindError::Listen { addr, source },
    })
}

/// Listens without TLS, on loopback only.
pub(crate) fn bind_plain(addr: SocketAddr) -> Result<TcpListener, BindError> {
    if !addr.ip().is_loopback() {
        return Err(BindError::NotLoopback { addr });
    }
    bind_tcp(addr)
}

fn socket_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BindError {
    let path = path.to_owned();
    move |source| BindError::Socket { what, path, source }
}
