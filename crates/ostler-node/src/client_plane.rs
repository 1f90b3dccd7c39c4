//! The control plane over the typed client: the one place where the agent meets HTTP.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{SinkExt, StreamExt, TryStreamExt};
use http_body_util::BodyExt;
use ostler_api::node::NodeRegister;
use ostler_api::work::{Heartbeat, Reports, ReportsTaken};
use ostler_api::{ErrorCode, Name, StreamId};
use ostler_client::{Client, ClientError};
use tokio::io::AsyncRead;
use tokio_util::io::StreamReader;

use crate::control_plane::{ControlPlane, PlaneError, Wire, WorkStream};
use crate::fault::chain;

/// The public API, with the node's identity.
pub struct ClientPlane {
    client: Client,
}

impl std::fmt::Debug for ClientPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientPlane").field("target", &self.client.target()).finish()
    }
}

impl ClientPlane {
    pub fn new(client: Client) -> Arc<Self> {
        Arc::new(Self { client })
    }
}

fn plane_error(error: ClientError) -> PlaneError {
    let text = chain(&error);
    match error.code() {
        None => PlaneError::Unreachable(text),
        Some(ErrorCode::NotFound) => PlaneError::UnknownNode(text),
        Some(
            ErrorCode::Invalid
            | ErrorCode::TooLarge
            | ErrorCode::AlreadyExists
            | ErrorCode::IdempotencyMismatch,
        ) => PlaneError::Refused(text),
        // A token that is being renewed, a store that is busy, a server that starts: all pass.
        Some(
            ErrorCode::Unauthenticated
            | ErrorCode::Forbidden
            | ErrorCode::Conflict
            | ErrorCode::InUse
            | ErrorCode::RevisionMismatch
            | ErrorCode::RevisionTooOld
            | ErrorCode::TimedOut
            | ErrorCode::NoCapacity
            | ErrorCode::NoSpace
            | ErrorCode::NodeUnavailable
            | ErrorCode::Unavailable
            | ErrorCode::Internal,
        ) => PlaneError::Unreachable(text),
    }
}

fn io_error(error: ClientError) -> io::Error {
    io::Error::other(chain(&error))
}

#[async_trait]
impl ControlPlane for ClientPlane {
    async fn register(&self, node: &Name, register: NodeRegister) -> Result<(), PlaneError> {
        self.client.node_register(node.as_str(), &register).await.map(drop).map_err(plane_error)
    }

    async fn heartbeat(&self, node: &Name) -> Result<Heartbeat, PlaneError> {
        self.client.node_heartbeat(node.as_str()).await.map_err(plane_error)
    }

    async fn work(&self, node: &Name) -> Result<WorkStream, PlaneError> {
        let lines = self.client.node_work(node.as_str()).await.map_err(plane_error)?;
        let lines = futures::stream::unfold(Some(lines), |lines| async move {
            let mut lines = lines?;
            match lines.next().await {
                Ok(Some(line)) => Some((Ok(line), Some(lines))),
                Ok(None) => None,
                Err(error) => Some((Err(plane_error(error)), None)),
            }
        });
        Ok(lines.boxed())
    }

    async fn report(&self, node: &Name, reports: Reports) -> Result<ReportsTaken, PlaneError> {
        self.client.node_report(node.as_str(), &reports).await.map_err(plane_error)
    }

    async fn image(
        &self,
        node: &Name,
        sha256: &str,
    ) -> Result<Box<dyn AsyncRead + Send + Unpin>, PlaneError> {
        let (_, body) = self.client.node_image(node.as_str(), sha256, 0).await.map_err(plane_error)?;
        let chunks = body.into_data_stream().map_err(io::Error::other);
        // A body is read by one task only.
        Ok(Box::new(StreamReader::new(chunks)))
    }

    async fn stream(&self, node: &Name, stream: StreamId) -> Result<Wire, PlaneError> {
        let socket = self.client.node_stream(node.as_str(), stream).await.map_err(plane_error)?;
        let (sender, receiver) = socket.split();
        let tx = futures::sink::unfold(sender, |mut sender, bytes: Bytes| async move {
            sender.send(bytes).await.map_err(io_error)?;
            Ok::<_, io::Error>(sender)
        });
        let rx = futures::stream::unfold(Some(receiver), |receiver| async move {
            let mut receiver = receiver?;
            match receiver.recv().await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some(receiver))),
                Ok(None) => None,
                Err(error) => Some((Err(io_error(error)), None)),
            }
        });
        Ok(Wire { tx: Box::pin(tx.sink_map_err(|error| error)), rx: rx.boxed() })
    }
}
