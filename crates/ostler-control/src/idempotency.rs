//! Idempotency keys: the same request twice is one change.
//!
//! The key is written in the transaction of the change it belongs to, so there is no moment at which one is there and
//! the other is not. The janitor drops keys after a day.

use bytes::Bytes;
use ostler_api::{ApiError, ErrorCode, OperationId, Time};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::{Change, store_error};
use crate::keys;

/// What a client sends to make a retry safe.
#[derive(Debug, Clone)]
pub struct Idempotency {
    pub key: String,
    /// A digest of method, path and body.
    pub fingerprint: [u8; 32],
}

/// What the key made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Made {
    fingerprint: String,
    pub(crate) id: Uuid,
    pub(crate) operation: Option<OperationId>,
    pub(crate) at: Time,
}

fn hex(bytes: &[u8; 32]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn key(caller: &Caller, idempotency: &Idempotency) -> String {
    format!("{}{}/{}", keys::IDEMPOTENCY, caller.tag(), idempotency.key)
}

impl Cloud {
    /// What this request has made before, if it was made before.
    pub(crate) async fn made_before(
        &self,
        caller: &Caller,
        idempotency: Option<&Idempotency>,
    ) -> Result<Option<Made>, ApiError> {
        let Some(idempotency) = idempotency else { return Ok(None) };
        let Some(kv) = self.store.get(&key(caller, idempotency), None).await.map_err(store_error)? else {
            return Ok(None);
        };
        let made: Made = serde_json::from_slice(&kv.value).map_err(ApiError::internal)?;
        if made.fingerprint != hex(&idempotency.fingerprint) {
            return Err(ApiError::new(
                ErrorCode::IdempotencyMismatch,
                "this idempotency key was used with another request",
            )
            .hint("use a new key for a new request"));
        }
        self.cache.reached(kv.modified).await;
        Ok(Some(made))
    }
}

/// Remembers in `change` what it makes.
pub(crate) fn remember(
    change: &mut Change,
    caller: &Caller,
    idempotency: Option<&Idempotency>,
    id: Uuid,
    operation: Option<OperationId>,
) -> Result<(), ApiError> {
    let Some(idempotency) = idempotency else { return Ok(()) };
    let made = Made { fingerprint: hex(&idempotency.fingerprint), id, operation, at: Time::now() };
    let value = serde_json::to_vec(&made).map_err(ApiError::internal)?;
    change.put_absent(key(caller, idempotency), Bytes::from(value));
    Ok(())
}
