//! What nearly every handler needs: the shared state and the caller; and the query strings that many routes share.

use axum::extract::FromRequestParts;
use http::request::Parts;
use ostler_api::ApiError;
use ostler_control::{Caller, Cloud};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use crate::app::App;
use crate::identity::As;
use crate::problem::Failure;
use crate::wait::{Phased, Wait};

/// A request of an identified caller.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) app: App,
    pub(crate) caller: Caller,
}

impl Ask {
    pub(crate) fn cloud(&self) -> &Cloud {
        &self.app.cloud
    }
}

impl FromRequestParts<App> for Ask {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Failure> {
        let As(caller) = As::from_request_parts(parts, app).await?;
        Ok(Self { app: app.clone(), caller })
    }
}

/// Which project a name is looked up in.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Scope {
    /// Project; the caller's own when not given.
    pub(crate) project: Option<String>,
}

/// The same, and how long to wait for what.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ScopeWait {
    /// Project; the caller's own when not given.
    pub(crate) project: Option<String>,
    /// Answer when the resource is in one of these phases (separated by commas), in `error`, or its operation has
    /// failed. `gone` waits for its end.
    pub(crate) wait: Option<String>,
    /// Most seconds to wait (at most 3600; 300 when not given). Past it: 408 `timed_out`; the work goes on.
    pub(crate) timeout: Option<u64>,
}

impl ScopeWait {
    pub(crate) fn project(&self) -> Option<&str> {
        self.project.as_deref()
    }

    pub(crate) fn wait<T: Phased>(&self) -> Result<Option<Wait>, ApiError> {
        Wait::parse::<T>(self.wait.as_deref(), self.timeout)
    }
}

/// Waiting, for what is in no project.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct WaitOnly {
    /// Answer when the resource is in one of these phases (separated by commas) or gone (`gone`).
    pub(crate) wait: Option<String>,
    /// Most seconds to wait (at most 3600; 300 when not given). Past it: 408 `timed_out`.
    pub(crate) timeout: Option<u64>,
}

impl WaitOnly {
    pub(crate) fn wait<T: Phased>(&self) -> Result<Option<Wait>, ApiError> {
        Wait::parse::<T>(self.wait.as_deref(), self.timeout)
    }
}

/// The body of a request that says all with its path.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoFields {}

/// Describes `Idempotency-Key`; `extract::body` reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code, reason = "for the OpenAPI document")]
pub(crate) struct IdempotencyHeader {
    /// 1-128 visible ASCII characters: the same request with the same key is done once.
    #[param(rename = "Idempotency-Key")]
    key: Option<String>,
}

/// Describes `If-Match`; `extract::headers` reads it.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[allow(dead_code, reason = "for the OpenAPI document")]
pub(crate) struct IfMatchHeader {
    /// The `ETag` of the state that is meant; 412 `revision_mismatch` when it has changed since.
    #[param(rename = "If-Match")]
    revision: Option<String>,
}
