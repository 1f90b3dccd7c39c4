//! Callers: authenticated identities, and what they ask of [`permission`](crate::permission).

use ostler_api::{ApiError, DEFAULT_PROJECT, ErrorCode, Kind, Name};

use crate::permission::{self, Denied, Identity, Owner, Verb};

/// Somebody whose identity is established. Only [`Cloud`](crate::Cloud) makes them.
#[derive(Debug, Clone)]
pub struct Caller {
    identity: Identity,
}

impl Caller {
    pub(crate) fn new(identity: Identity) -> Self {
        Self { identity }
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// A word for logs and for keys that belong to this caller.
    pub fn tag(&self) -> String {
        match &self.identity {
            Identity::Local => "local".to_owned(),
            Identity::Token { id, .. } => id.to_string(),
        }
    }

    /// The project a request is about: the one it names, else the caller's own, else `default`.
    pub(crate) fn project(&self, named: Option<&str>) -> Result<Name, ApiError> {
        let own = match &self.identity {
            Identity::Token { project, .. } => project.as_ref(),
            Identity::Local => None,
        };
        match (named, own) {
            (Some(named), _) => Name::new(named).map_err(|error| {
                ApiError::invalid("project", format!("the project's name is not valid: {error}"))
            }),
            (None, Some(own)) => Ok(own.clone()),
            (None, None) => Name::new(DEFAULT_PROJECT).map_err(ApiError::internal),
        }
    }

    /// Asks for permission; `what` names the thing in the answer to one who may not know of it.
    pub(crate) fn may(&self, verb: Verb, kind: Kind, owner: Owner<'_>, what: &str) -> Result<(), ApiError> {
        permission::decide(&self.identity, verb, kind, owner).map_err(|denied| match denied {
            Denied::Hidden => ApiError::not_found(kind, what),
            Denied::Forbidden => ApiError::new(
                ErrorCode::Forbidden,
                format!("this token may not do that with {}", kind.plural()),
            )
            .hint("use a token with a wider role: ostler token create --role admin"),
        })
    }
}
