//! Projects.

use ostler_api::list::ListParams;
use ostler_api::project::Project;

use crate::{Client, Result};

impl Client {
    /// Those that the caller may see.
    ///
    /// # Errors
    /// The server's refusal, or no server.
    pub async fn projects(&self) -> Result<Vec<Project>> {
        Ok(self.list_all(&ListParams::default()).await?.0)
    }
}
