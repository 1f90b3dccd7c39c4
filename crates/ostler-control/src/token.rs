//! Access tokens.

use bytes::Bytes;
use ostler_api::token::{Role, Token, TokenCreate, TokenCreated, TokenSpec};
use ostler_api::{ApiError, Kind, Metadata, Time, TokenId};
use rand::TryRng;

use crate::caller::Caller;
use crate::cloud::{Cloud, token_hash};
use crate::permission::{Owner, Verb};

/// 256 bits of the system's randomness, in hex.
fn fresh_secret() -> Result<String, ApiError> {
    use std::fmt::Write;
    let mut bytes = [0u8; 32];
    rand::rngs::SysRng.try_fill_bytes(&mut bytes).map_err(ApiError::internal)?;
    Ok(bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

fn check(request: &TokenCreate) -> Result<(), ApiError> {
    match request.role {
        Role::Admin => {
            if request.project.is_some() || request.node.is_some() {
                return Err(ApiError::invalid(
                    "role",
                    "an admin token is for everything: leave out project and node",
                ));
            }
        }
        Role::Member | Role::Reader => {
            if request.project.is_none() {
                return Err(ApiError::invalid(
                    "project",
                    format!("a {} token needs a project", request.role),
                )
                .hint("name one: --project default"));
            }
            if request.node.is_some() {
                return Err(ApiError::invalid("node", "only a node token has a node"));
            }
        }
        Role::Node => {
            if request.node.is_none() {
                return Err(ApiError::invalid("node", "a node token needs a node"));
            }
            if request.project.is_some() {
                return Err(ApiError::invalid("project", "a node token has no project"));
            }
        }
    }
    match request.ttl {
        Some(0) => Err(ApiError::invalid("ttl", "a token must live for a second at least")),
        Some(_) | None => Ok(()),
    }
}

impl Cloud {
    /// A new token. Its secret is in the answer and nowhere else.
    pub async fn token_create(
        &self,
        caller: &Caller,
        request: TokenCreate,
    ) -> Result<TokenCreated, ApiError> {
        caller.may(Verb::Create, Kind::Token, Owner::Cloud, "")?;
        check(&request)?;
        let id = TokenId::new();
        let secret = fresh_secret()?;
        let token = Token {
            metadata: Metadata::new(id.into(), request.name.clone(), None),
            spec: TokenSpec {
                role: request.role,
                project: request.project.clone(),
                node: request.node.clone(),
                expires: request.ttl.map(|ttl| Time::now().after(std::time::Duration::from_secs(ttl))),
            },
        };
        self.commit(|tables, change| {
            if let Some(project) = &token.spec.project
                && tables.projects.named(None, project).is_none()
            {
                return Err(ApiError::not_found(Kind::Project, project.as_str()));
            }
            if tables.tokens.named(None, &token.metadata.name).is_some() {
                return Err(crate::vm_create::taken(Kind::Token, &token.metadata.name));
            }
            let mut stored = serde_json::to_value(&token).map_err(ApiError::internal)?;
            stored["hash"] = token_hash(&secret).into();
            change.create_as(&token, Bytes::from(serde_json::to_vec(&stored).map_err(ApiError::internal)?));
            Ok(())
        })
        .await?;
        let token = self.get::<Token>(caller, None, &id.to_string())?;
        Ok(TokenCreated { token: Token::clone(&token), secret: format!("ostler_{}_{secret}", id.0.simple()) })
    }

    /// Revokes a token: from now on it opens nothing.
    pub async fn token_delete(&self, caller: &Caller, name: &str) -> Result<(), ApiError> {
        self.commit(|tables, change| {
            let token = self.find::<Token>(tables, caller, Verb::Delete, None, name)?;
            change.delete(token.as_ref());
            Ok(())
        })
        .await
    }
}
