//! Waiting for a phase.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::{ApiError, ErrorCode, Kind};
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use crate::cache::Cached;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::list::owner;
use crate::permission::Verb;

/// The word that means: until it is no longer there.
const GONE: &str = "gone";

impl Cloud {
    /// Waits until the resource is in one of the phases. `error` ends the wait too, and so does its end (`None`).
    pub async fn wait<T: Cached>(
        &self,
        caller: &Caller,
        id: Uuid,
        phases: &[String],
        timeout: Duration,
    ) -> Result<Option<Arc<T>>, ApiError> {
        let mut last = String::new();
        match tokio::time::timeout(timeout, self.wait_for::<T>(caller, id, phases, &mut last)).await {
            Ok(result) => result,
            Err(_) => Err(ApiError::new(
                ErrorCode::TimedOut,
                format!(
                    "waited {} s for {}; the {} is {last}",
                    timeout.as_secs(),
                    phases.join(" or "),
                    T::KIND
                ),
            )
            .hint("the work goes on: look again, or wait longer")),
        }
    }

    async fn wait_for<T: Cached>(
        &self,
        caller: &Caller,
        id: Uuid,
        phases: &[String],
        last: &mut String,
    ) -> Result<Option<Arc<T>>, ApiError> {
        let mut changes = T::table(&self.cache.read()).subscribe();
        loop {
            let now = {
                let tables = self.cache.read();
                T::table(&tables).get(id).map(|object| T::present(&tables, object))
            };
            match now {
                None => return Ok(None),
                Some(object) => {
                    caller.may(Verb::Read, T::KIND, owner(object.as_ref()), "")?;
                    let phase = object.phase();
                    let wanted = phases.iter().any(|wanted| wanted == phase && wanted != GONE);
                    let failed = phase == "error"
                        && object.is_settled()
                        && (T::KIND != Kind::Vm || object.metadata().deleted.is_none());
                    if wanted || failed {
                        return Ok(Some(object));
                    }
                    *last = phase.to_owned();
                }
            }
            loop {
                match changes.recv().await {
                    Ok(change) => {
                        let about = change.new.as_ref().or(change.old.as_ref());
                        if about.is_some_and(|object| object.metadata().id == id) {
                            break;
                        }
                    }
                    Err(RecvError::Lagged(_)) => break,
                    Err(RecvError::Closed) => {
                        return Err(ApiError::new(ErrorCode::Unavailable, "the server is stopping"));
                    }
                }
            }
        }
    }
}
