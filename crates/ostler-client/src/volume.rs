//! Volumes.

use ostler_api::operation::Accepted;
use ostler_api::volume::{Volume, VolumePatch};

use crate::{Client, Delete, Result};

/// All return the server's refusal as [`crate::ClientError::Api`].
impl Client {
    pub async fn volume_get(&self, volume: &str) -> Result<Volume> {
        self.get(volume).await
    }

    pub async fn volume_patch(
        &self,
        volume: &str,
        patch: &VolumePatch,
        if_match: Option<u64>,
    ) -> Result<Volume> {
        self.patch(volume, patch, if_match).await
    }

    pub async fn volume_delete(&self, volume: &str, how: &Delete) -> Result<Accepted<Volume>> {
        self.json(self.deletion::<Volume>(volume, how)).await
    }
}
