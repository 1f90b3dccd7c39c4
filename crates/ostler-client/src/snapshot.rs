//! Snapshots.

use ostler_api::operation::Accepted;
use ostler_api::snapshot::{Snapshot, SnapshotCreate, SnapshotPatch};
use serde_json::json;

use crate::call::Call;
use crate::{Client, Delete, Result, Wait};

/// All return the server's refusal as [`crate::ClientError::Api`].
impl Client {
    pub async fn snapshot_create(
        &self,
        create: &SnapshotCreate,
        wait: Option<&Wait>,
    ) -> Result<Accepted<Snapshot>> {
        self.json(self.scoped::<Snapshot>(Call::post(&["snapshots"], create)?.wait(wait))).await
    }

    pub async fn snapshot_get(&self, snapshot: &str) -> Result<Snapshot> {
        self.get(snapshot).await
    }

    pub async fn snapshot_patch(
        &self,
        snapshot: &str,
        patch: &SnapshotPatch,
        if_match: Option<u64>,
    ) -> Result<Snapshot> {
        self.patch(snapshot, patch, if_match).await
    }

    /// With `force` also one that has linked copies.
    pub async fn snapshot_delete(&self, snapshot: &str, how: &Delete) -> Result<Accepted<Snapshot>> {
        self.json(self.deletion::<Snapshot>(snapshot, how)).await
    }

    /// Puts its disks back to what they held.
    pub async fn snapshot_revert(&self, snapshot: &str) -> Result<Accepted<Snapshot>> {
        let call = Call::post(&["snapshots", snapshot, "actions", "revert"], &json!({}))?;
        self.json(self.scoped::<Snapshot>(call)).await
    }
}
