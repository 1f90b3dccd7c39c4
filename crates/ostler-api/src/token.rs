//! Access tokens: who may call the API from elsewhere. Only a hash of the secret is kept.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::resource::{resource, words};
use crate::{Metadata, Name, Time};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    pub metadata: Metadata,
    pub spec: TokenSpec,
}

resource!(Token, Token, project: false, phase: |_t| "", node: |t| t.spec.node.as_ref().map(Name::as_str));

words! {
    /// What a token may do.
    Role {
        /// Everything, in every project.
        Admin => "admin",
        /// Everything within one project.
        Member => "member",
        /// Look, within one project.
        Reader => "reader",
        /// What a node's agent does, for one node.
        Node => "node",
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenSpec {
    pub role: Role,
    /// For `member` and `reader`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<Name>,
    /// For `node`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Name>,
    /// Refused after this moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Time>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenCreate {
    pub name: Name,
    #[serde(default = "TokenCreate::role_default")]
    pub role: Role,
    #[serde(default)]
    pub project: Option<Name>,
    #[serde(default)]
    pub node: Option<Name>,
    /// Seconds it is good for; without, until it is revoked.
    #[serde(default)]
    pub ttl: Option<u64>,
}

impl TokenCreate {
    const fn role_default() -> Role {
        Role::Admin
    }
}

/// The only time the secret is shown.
#[derive(Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TokenCreated {
    pub token: Token,
    /// `ostler_ID_SECRET`.
    pub secret: String,
}

impl std::fmt::Debug for TokenCreated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenCreated").field("token", &self.token).finish_non_exhaustive()
    }
}
