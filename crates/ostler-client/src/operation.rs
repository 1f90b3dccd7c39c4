//! Operations.

use std::time::Duration;

use ostler_api::operation::Operation;
use serde_json::json;

use crate::call::Call;
use crate::{Client, Result};

/// All return the server's refusal as [`crate::ClientError::Api`].
impl Client {
    pub async fn operation_get(&self, operation: &str) -> Result<Operation> {
        self.get(operation).await
    }

    pub async fn operation_cancel(&self, operation: &str) -> Result<Operation> {
        self.json(self.scoped::<Operation>(Call::post(&["operations", operation, "cancel"], &json!({}))?))
            .await
    }

    /// Follows it to its end, whichever that is; `seen` is shown each state.
    pub async fn operation_wait(
        &self,
        operation: &str,
        timeout: Duration,
        mut seen: impl FnMut(&Operation),
    ) -> Result<Operation> {
        self.wait_until(operation, timeout, |operation: Option<&Operation>| {
            let operation = operation?;
            seen(operation);
            operation.status.phase.is_final().then(|| operation.clone())
        })
        .await
    }
}
