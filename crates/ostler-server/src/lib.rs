//! The HTTP side of Ostler: routes, watches, consoles, and the sockets they are served on.
//!
//! Who calls it: the binary binds a [`Server`] and runs it; tests and simulated agents use [`router`] within the process.
//! What always holds:
//!
//! - Handlers decode, call one service function of `ostler-control`, and encode. They decide nothing.
//! - Every route but the four public ones is answered only to an identified caller ([`identity`](crate::identity)); what
//!   the caller may do is decided by the services.
//! - Every error is a problem document, and nothing internal is in it.
//!
//! The way of a request: `listen` (sockets, limits) → `observe` (ids, deadline, log) → `identity` → `routes/*` → service.

mod app;
mod ask;
mod config;
mod extract;
mod file;
mod identity;
mod idle;
mod lines;
mod listen;
mod metrics;
mod observe;
mod openapi;
mod problem;
mod routes;
mod server;
mod socket;
mod tls;
mod wait;

pub use config::{Limits, ServerConfig, TlsIdentity, TlsListen};
pub use listen::BindError;
pub use routes::{openapi, openapi_json};
pub use server::{LocalAddrs, Server, router};
pub use tls::{TlsError, ca_fingerprint, ca_path};
