//! Access tokens.

use ostler_api::token::{Token, TokenCreate, TokenCreated};

use crate::call::Call;
use crate::{Client, Delete, Result};

/// All return the server's refusal as [`crate::ClientError::Api`].
impl Client {
    /// Sent only once: the secret is in the first answer or lost.
    pub async fn token_create(&self, create: &TokenCreate) -> Result<TokenCreated> {
        self.json(Call::post(&["tokens"], create)?.once()).await
    }

    pub async fn token_get(&self, token: &str) -> Result<Token> {
        self.get(token).await
    }

    pub async fn token_delete(&self, token: &str, how: &Delete) -> Result<()> {
        self.bytes(self.deletion::<Token>(token, how)).await.map(drop)
    }
}
