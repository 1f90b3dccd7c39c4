//! A typed client of the API, for the command line, the node agent and tests.
//!
//! [`Client`] speaks HTTP/1.1 over a unix socket, TLS, loopback TCP, or straight to a service in the same process
//! ([`Target`]). Connections are pooled and opened when they are needed; a clone of a client is cheap and shares them.
//! One noun, one file: `vm`, `image`, `volume`, `snapshot`, `node`, `operation`, `event`, `token`.
//!
//! What always holds: a request has a time limit, a stream has an idle limit where the server promises a sign of life,
//! and a body has a size limit. Requests that begin something carry an idempotency key, so a connection that breaks
//! in the middle is tried again without doing anything twice.

pub mod body;
mod call;
mod client;
mod dial;
mod error;
mod event;
mod image;
mod lines;
mod local;
mod node;
mod operation;
mod project;
mod query;
mod resource;
mod server;
mod snapshot;
mod socket;
mod target;
mod tls;
mod token;
mod transport;
mod vm;
mod volume;
mod wait;

pub use body::{Body, BodyError};
pub use client::{Client, Options, Retry};
pub use error::{ClientError, Result};
pub use image::ExportFormat;
pub use lines::Lines;
pub use local::LocalService;
pub use resource::Delete;
pub use server::ServerVersion;
pub use socket::{Socket, SocketReceiver, SocketSender};
pub use target::{Ca, Credentials, Secret, Target, TargetError};
pub use wait::Wait;
