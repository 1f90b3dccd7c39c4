//! Projects: whose things are whose.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Metadata;
use crate::resource::resource;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Project {
    pub metadata: Metadata,
}

resource!(Project, Project, project: false, phase: |_p| "", node: |_p| None);
