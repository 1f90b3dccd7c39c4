//! `?wait=PHASE[,PHASE]&timeout=SECONDS`, the same for all nouns.

use std::sync::Arc;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use http::header::ETAG;
use ostler_api::image::{Image, ImagePhase};
use ostler_api::node::{Node, NodePhase};
use ostler_api::operation::{Accepted, Operation, OperationPhase};
use ostler_api::snapshot::{Snapshot, SnapshotPhase};
use ostler_api::vm::Vm;
use ostler_api::vm_phase::VmPhase;
use ostler_api::volume::{Volume, VolumePhase};
use ostler_api::{ApiError, ErrorCode};
use ostler_control::{Cached, Caller};
use serde::Serialize;

use crate::app::App;
use crate::extract::etag;
use crate::problem::Failure;

pub(crate) const TIMEOUT_DEFAULT: Duration = Duration::from_secs(300);
pub(crate) const TIMEOUT_MAX: Duration = Duration::from_secs(3600);

/// The word that means: until it is no longer there.
const GONE: &str = "gone";

/// A kind whose phases can be waited for.
pub(crate) trait Phased: Cached {
    fn words() -> Vec<&'static str>;
}

macro_rules! phased {
    ($($type:ty => $phase:ty),+ $(,)?) => {$(
        impl Phased for $type {
            fn words() -> Vec<&'static str> {
                <$phase>::ALL.iter().map(|phase| phase.as_str()).collect()
            }
        }
    )+};
}
phased!(Snapshot => SnapshotPhase, Vm => VmPhase, Image => ImagePhase, Volume => VolumePhase, Node => NodePhase, Operation => OperationPhase);

/// What to wait for, and how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wait {
    phases: Vec<String>,
    timeout: Duration,
}

/// Whether a query has `wait`.
pub(crate) fn asks_to_wait(query: &str) -> bool {
    query.split('&').any(|pair| pair.starts_with("wait="))
}

/// Whether a `key=value` of a query is about waiting.
pub(crate) fn is_wait_parameter(pair: &str) -> bool {
    matches!(pair.split('=').next(), Some("wait" | "timeout"))
}

impl Wait {
    /// Reads the two parameters; checked before anything is changed.
    pub(crate) fn parse<T: Phased>(
        wait: Option<&str>,
        timeout: Option<u64>,
    ) -> Result<Option<Self>, ApiError> {
        let Some(wait) = wait else {
            return match timeout {
                None => Ok(None),
                Some(_) => {
                    Err(ApiError::invalid("timeout", "timeout is how long to wait, and there is no wait"))
                }
            };
        };
        let known = T::words();
        let phases: Vec<String> = wait.split(',').map(|word| word.trim().to_owned()).collect();
        if let Some(bad) = phases.iter().find(|word| *word != GONE && !known.contains(&word.as_str())) {
            return Err(ApiError::invalid("wait", format!("{bad:?} is not a phase of a {}", T::KIND))
                .hint(format!("the phases are {} and {GONE}", known.join(", "))));
        }
        let timeout = timeout.map_or(TIMEOUT_DEFAULT, Duration::from_secs);
        if timeout > TIMEOUT_MAX {
            let max = TIMEOUT_MAX.as_secs();
            return Err(ApiError::invalid("timeout", format!("at most {max} seconds can be waited at once")));
        }
        Ok(Some(Self { phases, timeout }))
    }

    fn includes_gone(&self) -> bool {
        self.phases.iter().any(|word| word == GONE)
    }

    /// Waits for the resource, or for the end of the operation without success. None when it is gone.
    async fn run<T: Phased>(
        &self,
        app: &App,
        caller: &Caller,
        resource: &T,
        operation: Option<&Operation>,
    ) -> Result<Option<Arc<T>>, ApiError> {
        let id = resource.metadata().id;
        let reached = app.cloud.wait::<T>(caller, id, &self.phases, self.timeout);
        let failed = async {
            let ends =
                [OperationPhase::Failed, OperationPhase::Cancelled].map(|phase| phase.as_str().to_owned());
            match operation {
                None => std::future::pending().await,
                Some(operation) => {
                    let id = operation.metadata.id;
                    match app.cloud.wait::<Operation>(caller, id, &ends, TIMEOUT_MAX).await {
                        Ok(Some(_)) => {}
                        // Its own end says nothing about the resource.
                        Ok(None) | Err(_) => std::future::pending().await,
                    }
                }
            }
        };
        tokio::select! {
            biased;
            reached = reached => reached,
            () = failed => Ok(app.cloud.get::<T>(caller, Some("*"), &id.to_string()).ok()),
            () = app.shutdown.closing.cancelled() => {
                Err(ApiError::new(ErrorCode::Unavailable, "the server is stopping").hint("the work goes on: look again"))
            }
        }
    }
}

/// One resource, with its revision as `ETag`.
pub(crate) fn single<T: Cached>(resource: &T) -> Response {
    ([(ETAG, etag(resource.metadata().revision))], axum::Json(resource)).into_response()
}

/// The answer to a read or a change of one resource. `wait=gone` is answered with 204.
pub(crate) async fn resource<T: Phased>(
    app: &App,
    caller: &Caller,
    resource: Arc<T>,
    wait: Option<Wait>,
) -> Result<Response, Failure> {
    let Some(wait) = wait else { return Ok(single(resource.as_ref())) };
    match wait.run(app, caller, resource.as_ref(), None).await? {
        Some(now) => Ok(single(now.as_ref())),
        None if wait.includes_gone() => Ok(StatusCode::NO_CONTENT.into_response()),
        None => Err(ApiError::not_found(T::KIND, resource.metadata().name.as_str()).into()),
    }
}

/// The answer to a request that takes time: at once, or when the wait is over.
pub(crate) async fn accepted<T: Phased + Serialize>(
    app: &App,
    caller: &Caller,
    status: StatusCode,
    accepted: Accepted<Arc<T>>,
    wait: Option<Wait>,
) -> Result<Response, Failure> {
    let Some(wait) = wait else { return Ok(answer(status, &accepted)) };
    let Accepted { operation, resource } = accepted;
    let now = wait.run(app, caller, resource.as_ref(), operation.as_ref()).await?;
    let operation = operation.map(|operation| {
        let id = operation.metadata.id.to_string();
        // Kept for days; should it be gone, what is known of it is its start.
        app.cloud.get::<Operation>(caller, Some("*"), &id).map_or(operation, Arc::unwrap_or_clone)
    });
    Ok(answer(status, &Accepted { operation, resource: now.unwrap_or(resource) }))
}

fn answer<T: Cached>(status: StatusCode, accepted: &Accepted<Arc<T>>) -> Response {
    let revision = accepted.resource.metadata().revision;
    (status, [(ETAG, etag(revision))], axum::Json(accepted)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_parameters() {
        let wait = Wait::parse::<Vm>(Some("running,stopped"), Some(5)).unwrap().unwrap();
        assert_eq!(
            wait,
            Wait {
                phases: vec!["running".to_owned(), "stopped".to_owned()],
                timeout: Duration::from_secs(5)
            }
        );
        assert_eq!(Wait::parse::<Vm>(None, None).unwrap(), None);
        assert!(Wait::parse::<Vm>(Some("gone"), None).unwrap().unwrap().includes_gone());
        for (wait, timeout, field) in [
            (Some("runing"), None, "wait"),
            (Some(""), None, "wait"),
            (Some("active"), None, "wait"),
            (Some("running"), Some(3601), "timeout"),
            (None, Some(1), "timeout"),
        ] {
            let error = Wait::parse::<Vm>(wait, timeout).unwrap_err();
            assert_eq!(error.field.as_deref(), Some(field));
        }
        assert!(Wait::parse::<Image>(Some("active"), None).is_ok());
    }
}
