//! Waiting: by the server within one request, or here by a watch.

use std::time::{Duration, Instant};

use ostler_api::Resource;
use ostler_api::list::{ListParams, WatchLine};

use crate::{Client, ClientError, Result};

/// Asks the server to answer when the resource is in one of the phases, or in `error`.
#[derive(Debug, Clone)]
pub struct Wait {
    pub(crate) phases: String,
    pub(crate) timeout: Duration,
}

impl Wait {
    pub fn phases<'a>(phases: impl IntoIterator<Item = &'a str>, timeout: Duration) -> Self {
        Self { phases: phases.into_iter().collect::<Vec<_>>().join(","), timeout }
    }

    pub fn gone(timeout: Duration) -> Self {
        Self::phases(["gone"], timeout)
    }
}

/// Between tries when a watch breaks.
const PAUSE: Duration = Duration::from_millis(200);

impl Client {
    /// Follows one resource until `look` answers. `look` is shown its present state and each change, `None` when it is
    /// gone. Connections that break are made anew until the time is up.
    ///
    /// # Errors
    /// The server refuses or cannot be reached at the first try; it is gone and `look` has no answer to that; the
    /// time is up.
    pub async fn wait_until<T: Resource, R>(
        &self,
        name: &str,
        timeout: Duration,
        mut look: impl FnMut(Option<&T>) -> Option<R>,
    ) -> Result<R> {
        let late =
            || ClientError::Timeout { what: format!("waiting for {} {name}", T::KIND), after: timeout };
        tokio::time::timeout(timeout, self.follow(name, &mut look)).await.map_err(|_| late())?
    }

    async fn follow<T: Resource, R>(
        &self,
        name: &str,
        look: &mut impl FnMut(Option<&T>) -> Option<R>,
    ) -> Result<R> {
        let mut known: Option<String> = None;
        loop {
            let began = Instant::now();
            let object = match self.get::<T>(known.as_deref().unwrap_or(name)).await {
                Ok(object) => object,
                Err(error) if error.is_not_found() => return look(None).ok_or(error),
                Err(error) if known.is_some() && error.is_passing() => {
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            if let Some(answer) = look(Some(&object)) {
                return Ok(answer);
            }
            known = Some(object.metadata().id.to_string());
            match self.follow_watch(&object, look).await {
                Ok(Some(answer)) => return Ok(answer),
                // Its name changed, it is gone, or the watch ended: look at it again.
                Ok(None) => {}
                Err(error) if error.is_passing() || matches!(error, ClientError::Api(_)) => {}
                Err(error) => return Err(error),
            }
            tokio::time::sleep(PAUSE.saturating_sub(began.elapsed())).await;
        }
    }

    async fn follow_watch<T: Resource, R>(
        &self,
        object: &T,
        look: &mut impl FnMut(Option<&T>) -> Option<R>,
    ) -> Result<Option<R>> {
        let metadata = object.metadata();
        let params = ListParams {
            project: metadata.project.as_ref().map(ToString::to_string),
            name: Some(metadata.name.to_string()),
            ..ListParams::default()
        };
        let mut watch = self.watch::<T>(&params).await?;
        let mut seen = false;
        while let Some(line) = watch.next().await? {
            match line {
                WatchLine::Added { object: next } | WatchLine::Modified { object: next } => {
                    if next.metadata().id == metadata.id {
                        seen = true;
                        if let Some(answer) = look(Some(&next)) {
                            return Ok(Some(answer));
                        }
                    }
                }
                WatchLine::Deleted { object: last } if last.metadata().id == metadata.id => return Ok(None),
                WatchLine::Deleted { .. } | WatchLine::Bookmark { .. } => {}
                WatchLine::Synced { .. } if !seen => return Ok(None),
                WatchLine::Synced { .. } => {}
                WatchLine::Error { problem } => return Err(ClientError::Api(Box::new(problem))),
            }
        }
        Ok(None)
    }
}
