//! Why something is not as it should be, in a form that a status can carry.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Time;

/// A reason a person can act on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fault {
    /// Stable word for scripts, such as `qemu_died` or `no_node_fits`.
    pub code: String,
    /// What failed, with its values, and what to do.
    pub message: String,
    pub at: Time,
}

impl Fault {
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into(), at: Time::now() }
    }
}
