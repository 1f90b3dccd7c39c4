//! What every resource carries.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::{Name, Time};

/// Labels: free words for people and selectors.
pub type Labels = BTreeMap<String, String>;

/// Most labels on one resource.
pub const LABELS_MAX: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Metadata {
    /// UUIDv7; never changes, never used again.
    pub id: Uuid,
    /// Unique among the resources of this kind in the project.
    pub name: Name,
    /// The project that owns it; absent on what belongs to the whole cloud (nodes, tokens).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<Name>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: Labels,
    /// The store's revision of its last change; quoted it is the `ETag`, and what `If-Match` compares.
    #[serde(default)]
    pub revision: u64,
    pub created: Time,
    /// Set when its deletion was asked for; it is gone once everything it held is given back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<Time>,
}

impl Metadata {
    pub fn new(id: Uuid, name: Name, project: Option<Name>) -> Self {
        Self { id, name, project, labels: Labels::new(), revision: 0, created: Time::now(), deleted: None }
    }
}

/// Keys are 1–63 of letters, digits, `-_./`; values up to 255 characters without control characters.
pub fn labels_check(labels: &Labels) -> Result<(), String> {
    if labels.len() > LABELS_MAX {
        return Err(format!("at most {LABELS_MAX} labels; there are {}", labels.len()));
    }
    for (key, value) in labels {
        let good_key = !key.is_empty()
            && key.len() <= 63
            && key.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
        if !good_key {
            return Err(format!("label key {key:?} is not 1-63 of letters, digits, '-', '_', '.', '/'"));
        }
        if value.chars().count() > 255 || value.chars().any(char::is_control) {
            return Err(format!(
                "the value of label {key:?} is over 255 characters or has control characters"
            ));
        }
    }
    Ok(())
}
