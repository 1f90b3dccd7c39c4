//! Events: what happened, for people. Kept for a set time.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Metadata;
use crate::operation::Target;
use crate::resource::{resource, words};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    pub metadata: Metadata,
    pub spec: EventSpec,
}

resource!(Event, Event, project: true, phase: |_e| "", node: |_e| None);

words! {
    Severity { Info => "info", Warning => "warning", Error => "error" }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EventSpec {
    /// Stable word, such as `vm.started` or `vm.died`.
    pub code: String,
    pub severity: Severity,
    pub message: String,
    pub target: Target,
}
