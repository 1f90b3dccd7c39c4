//! Nodes: what people see of them, and what their agents say and hear.

use ostler_api::StreamId;
use ostler_api::node::{Node, NodePatch, NodeRegister};
use ostler_api::work::{Heartbeat, Reports, ReportsTaken, WorkLine};
use serde_json::json;

use crate::body::Body;
use crate::call::Call;
use crate::{Client, Delete, Lines, Result, Socket};

/// All return the server's refusal as [`crate::ClientError::Api`].
impl Client {
    pub async fn node_get(&self, node: &str) -> Result<Node> {
        self.get(node).await
    }

    pub async fn node_patch(&self, node: &str, patch: &NodePatch, if_match: Option<u64>) -> Result<Node> {
        self.patch(node, patch, if_match).await
    }

    pub async fn node_delete(&self, node: &str, how: &Delete) -> Result<()> {
        self.bytes(self.deletion::<Node>(node, how)).await.map(drop)
    }

    /// The agent says what its host is and has.
    pub async fn node_register(&self, node: &str, register: &NodeRegister) -> Result<Node> {
        self.json(Call::put(&["nodes", node], register)?).await
    }

    pub async fn node_heartbeat(&self, node: &str) -> Result<Heartbeat> {
        self.json(Call::post(&["nodes", node, "heartbeat"], &json!({}))?).await
    }

    /// What is placed on the node, then every change. Reconnect when it ends.
    pub async fn node_work(&self, node: &str) -> Result<Lines<WorkLine>> {
        self.lines(Call::get(&["nodes", node, "work"]), "the node's work").await
    }

    pub async fn node_report(&self, node: &str, reports: &Reports) -> Result<ReportsTaken> {
        self.json(Call::post(&["nodes", node, "reports"], reports)?).await
    }

    /// A stored image from its byte `from` on, with the bytes that are left when the server says so.
    pub async fn node_image(&self, node: &str, sha256: &str, from: u64) -> Result<(Option<u64>, Body)> {
        let answer = self.stream_from(Call::get(&["nodes", node, "images", sha256]), from).await?;
        let left =
            answer.headers().get(http::header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
        Ok((left, answer.into_body()))
    }

    /// The agent's side of a console, display or log.
    pub async fn node_stream(&self, node: &str, stream: StreamId) -> Result<Socket> {
        self.socket(Call::get(&["nodes", node, "streams", &stream.to_string()])).await
    }
}
