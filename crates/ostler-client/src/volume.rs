//! Volumes.

use ostler_api::ByteSize;
use ostler_api::operation::Accepted;
use ostler_api::volume::{Volume, VolumeCreate, VolumePatch};
use serde_json::json;

use crate::call::Call;
use crate::{Client, Delete, Result, Wait};

/// All return the server's refusal as [`crate::ClientError::Api`].
impl Client {
    pub async fn volume_create(
        &self,
        create: &VolumeCreate,
        wait: Option<&Wait>,
    ) -> Result<Accepted<Volume>> {
        self.json(self.scoped::<Volume>(Call::post(&["volumes"], create)?.wait(wait))).await
    }

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

    /// Makes it larger, also while it is in use.
    pub async fn volume_resize(&self, volume: &str, size: ByteSize) -> Result<Accepted<Volume>> {
        let body = json!({ "size": size });
        self.json(self.scoped::<Volume>(Call::post(&["volumes", volume, "actions", "resize"], &body)?)).await
    }

    /// Makes it stand on nothing but itself.
    pub async fn volume_flatten(&self, volume: &str) -> Result<Accepted<Volume>> {
        let call = Call::post(&["volumes", volume, "actions", "flatten"], &json!({}))?;
        self.json(self.scoped::<Volume>(call)).await
    }

    pub async fn volume_delete(&self, volume: &str, how: &Delete) -> Result<Accepted<Volume>> {
        self.json(self.deletion::<Volume>(volume, how)).await
    }
}
