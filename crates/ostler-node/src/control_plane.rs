//! What the agent needs of the control plane: six calls of the public API. Implemented over the typed client in
//! [`crate::client_plane`], and in memory by tests.

use std::fmt::Debug;
use std::io;
use std::pin::Pin;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Sink, Stream};
use ostler_api::node::NodeRegister;
use ostler_api::work::{Heartbeat, Reports, ReportsTaken, WorkLine};
use ostler_api::{Name, StreamId};
use tokio::io::AsyncRead;

/// A call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaneError {
    /// Not reached, overloaded, broken off: the same again may work.
    #[error("the control plane cannot be reached: {0}")]
    Unreachable(String),
    /// It does not know this node (any more): register again.
    #[error("the control plane does not know this node: {0}")]
    UnknownNode(String),
    /// It refuses what was sent; the same again is refused again.
    #[error("the control plane refused: {0}")]
    Refused(String),
}

/// The agent's side of a user's stream: chunks both ways. Dropping it closes it.
pub struct Wire {
    pub tx: Pin<Box<dyn Sink<Bytes, Error = io::Error> + Send>>,
    pub rx: Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>,
}

impl Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Wire")
    }
}

pub type WorkStream = BoxStream<'static, Result<WorkLine, PlaneError>>;

#[async_trait]
pub trait ControlPlane: Send + Sync + Debug {
    async fn register(&self, node: &Name, register: NodeRegister) -> Result<(), PlaneError>;

    async fn heartbeat(&self, node: &Name) -> Result<Heartbeat, PlaneError>;

    async fn work(&self, node: &Name) -> Result<WorkStream, PlaneError>;

    /// All reports of the batch are durably taken, or none.
    async fn report(&self, node: &Name, reports: Reports) -> Result<ReportsTaken, PlaneError>;

    /// The bytes of a stored image.
    async fn image(&self, node: &Name, sha256: &str)
    -> Result<Box<dyn AsyncRead + Send + Unpin>, PlaneError>;

    async fn stream(&self, node: &Name, stream: StreamId) -> Result<Wire, PlaneError>;
}
