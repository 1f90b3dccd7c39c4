//! The server itself.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::call::Call;
use crate::{Client, Result};

/// What a server is. Anybody may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerVersion {
    pub version: String,
    pub cloud: Uuid,
    /// Of the resources it stores.
    pub schema: u32,
}

impl Client {
    /// # Errors
    /// No server there, or none of ours.
    pub async fn version(&self) -> Result<ServerVersion> {
        self.json(Call::get(&["version"])).await
    }

    /// Whether it serves: it answers, and has loaded its state.
    pub async fn ready(&self) -> Result<()> {
        self.bytes(Call::get(&[]).at("/readyz")).await.map(drop)
    }

    /// Prometheus text.
    pub async fn metrics(&self) -> Result<String> {
        let bytes = self.bytes(Call::get(&[]).at("/metrics")).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The API's description.
    pub async fn openapi(&self) -> Result<serde_json::Value> {
        self.json(Call::get(&["openapi.json"])).await
    }
}
