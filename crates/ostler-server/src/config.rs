//! What the server is told: where it listens and what it allows. Read by `Server::bind`; pure values.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Where the server listens, and its limits. Nothing listens that is not named here.
#[derive(Debug, Clone, Default)]
pub struct ServerConfig {
    /// Unix socket for the local administrator (peer credentials).
    pub unix_socket: Option<PathBuf>,
    pub tls: Option<TlsListen>,
    /// HTTP without TLS, for tests and proxies on the same host. Refused unless it is a loopback address.
    pub plain_http: Option<SocketAddr>,
    pub limits: Limits,
}

/// The one TLS port.
#[derive(Debug, Clone)]
pub struct TlsListen {
    pub addr: SocketAddr,
    pub identity: TlsIdentity,
}

/// Where the server's certificate comes from.
#[derive(Debug, Clone)]
pub enum TlsIdentity {
    /// An authority of our own, kept in `dir` and made there at the first start.
    Own {
        dir: PathBuf,
        /// Further DNS names and addresses that clients use for this server.
        names: Vec<String>,
    },
    /// A certificate chain and its key as PEM files, made elsewhere.
    Files { certificate: PathBuf, key: PathBuf },
}

/// What one client may take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest JSON body, in bytes.
    pub body_bytes: usize,
    /// Time for a TLS handshake.
    pub handshake_timeout: Duration,
    /// Time for the head of a request, and for an idle HTTP/1 connection until its next one.
    pub header_timeout: Duration,
    /// Time until the head of the answer. `wait` adds its own; uploads, exports and streams have none.
    pub request_timeout: Duration,
    /// Longest silence in the middle of an upload.
    pub upload_idle: Duration,
    /// Most connections over TCP; the unix socket has as many of its own. One address may hold half of them.
    pub max_connections: usize,
    /// An HTTP/2 connection without a request is closed after this long; half of it is the interval of pings.
    pub keepalive: Duration,
    /// How long running requests may go on when the server stops.
    pub grace: Duration,
    /// Interval of bookmarks on watches.
    pub bookmark: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 1 << 20,
            handshake_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(60),
            upload_idle: Duration::from_secs(60),
            max_connections: 8192,
            keepalive: Duration::from_secs(120),
            grace: Duration::from_secs(10),
            bookmark: Duration::from_secs(5),
        }
    }
}
