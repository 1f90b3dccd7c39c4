//! Events: `list`, `list_all` and `watch` with [`Event`] are all there is to do with them.

use ostler_api::event::Event;
use ostler_api::list::{ListParams, WatchLine};

use crate::{Client, Lines, Result};

impl Client {
    /// Events as they come, from a revision or from now on with those of the past first.
    ///
    /// # Errors
    /// The server's refusal, or no server.
    pub async fn event_watch(&self, params: &ListParams) -> Result<Lines<WatchLine<Event>>> {
        self.watch(params).await
    }
}
