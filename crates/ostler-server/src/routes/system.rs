//! The server itself: health, version, description, metrics.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use ostler_api::{ApiError, ErrorCode, SCHEMA_VERSION};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::app::App;
use crate::ask::Ask;
use crate::metrics;
use crate::openapi::Problems;
use crate::problem::Failure;

pub(super) fn public() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(healthz))
        .routes(routes!(readyz))
        .routes(routes!(version))
        .routes(routes!(openapi_json))
}

pub(super) fn protected() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(metrics))
}

/// Whether the process is alive
#[utoipa::path(get, path = "/healthz", tag = "system", security(()), responses(
    (status = 200, description = "ok", body = String, content_type = "text/plain")))]
async fn healthz() -> &'static str {
    "ok\n"
}

/// Whether it serves
///
/// Errors: `unavailable` (503) with the reason.
#[utoipa::path(get, path = "/readyz", tag = "system", security(()), responses(
    (status = 200, description = "ok", body = String, content_type = "text/plain"), Problems))]
async fn readyz(State(app): State<App>) -> Result<&'static str, Failure> {
    if app.shutdown.closing.is_cancelled() {
        return Err(ApiError::new(ErrorCode::Unavailable, "the server is stopping").into());
    }
    match app.cloud.ready() {
        Ok(()) => Ok("ok\n"),
        Err(reason) => Err(ApiError::new(ErrorCode::Unavailable, reason).into()),
    }
}

/// What a server is.
#[derive(Debug, Serialize, ToSchema)]
struct ServerVersion {
    /// Ostler's version.
    version: &'static str,
    /// This cloud's id.
    cloud: Uuid,
    /// The version of the shapes in its store.
    schema: u32,
}

/// What a server is
#[utoipa::path(get, path = "/v1/version", tag = "system", security(()), responses(
    (status = 200, body = ServerVersion), Problems))]
async fn version(State(app): State<App>) -> Response {
    let version = env!("CARGO_PKG_VERSION");
    axum::Json(ServerVersion { version, cloud: app.cloud.cloud_id(), schema: SCHEMA_VERSION }).into_response()
}

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", tag = "system", security(()), responses(
    (status = 200, description = "OpenAPI 3.1", body = Object), Problems))]
async fn openapi_json(State(app): State<App>) -> Response {
    ([(CONTENT_TYPE, "application/json")], app.openapi).into_response()
}

/// Metrics as Prometheus text
#[utoipa::path(get, path = "/metrics", tag = "system", responses(
    (status = 200, description = "Text format 0.0.4", body = String, content_type = "text/plain"), Problems))]
async fn metrics(ask: Ask) -> Result<Response, Failure> {
    let text = metrics::text(&ask.app).map_err(ApiError::internal)?;
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}
