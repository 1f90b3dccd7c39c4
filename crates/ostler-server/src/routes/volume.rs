//! `/v1/volumes`.

use axum::extract::Path;
use axum::response::Response;
use http::StatusCode;
use ostler_api::ByteSize;
use ostler_api::list::{List, ListParams, WatchLine};
use ostler_api::operation::Accepted;
use ostler_api::volume::{Volume, VolumeCreate, VolumePatch};
use serde::Deserialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::ask::{Ask, IdempotencyHeader, IfMatchHeader, NoFields, ScopeWait};
use crate::extract::{Act, IfMatch, Json, Params, Submit};
use crate::lines::list_or_watch;
use crate::openapi::Problems;
use crate::problem::Failure;
use crate::wait;

pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(volume_list, volume_create))
        .routes(routes!(volume_show, volume_patch, volume_delete))
        .routes(routes!(volume_resize))
        .routes(routes!(volume_flatten))
}

/// List or watch volumes
///
/// `watch=true` streams lines of `WatchLine` (`application/jsonl`).
#[utoipa::path(get, path = "/v1/volumes", tag = "volumes", params(ListParams), responses(
    (status = 200, description = "A page, or the watch",
        content((List<Volume> = "application/json"), (WatchLine<Volume> = "application/jsonl"))), Problems))]
async fn volume_list(ask: Ask, Params(params): Params<ListParams>) -> Result<Response, Failure> {
    list_or_watch::<Volume>(&ask.app, &ask.caller, &params).await
}

/// Create a volume
///
/// Blank, or a linked copy of an image or of a disk of a snapshot. Errors: `already_exists`, `invalid` with the field,
/// `conflict` when the source cannot be used, `no_capacity` when no node has room.
#[utoipa::path(post, path = "/v1/volumes", tag = "volumes", params(ScopeWait, IdempotencyHeader), request_body = VolumeCreate, responses(
    (status = 201, description = "Accepted; its node makes it", body = Accepted<Volume>), Problems))]
async fn volume_create(
    ask: Ask,
    Params(query): Params<ScopeWait>,
    submit: Submit<VolumeCreate>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Volume>()?;
    let made =
        ask.cloud().volume_create(&ask.caller, query.project(), submit.body, submit.idempotency).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::CREATED, made, wait).await
}

/// How large a volume is to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct VolumeResize {
    /// Bytes, a multiple of 512; not less than it has.
    size: ByteSize,
}

/// Make a volume larger
///
/// Also while it is in use: the guest sees the new size. Errors: `invalid` when it would shrink, `conflict`.
#[utoipa::path(post, path = "/v1/volumes/{volume}/actions/resize", tag = "volumes",
    params(("volume" = String, Path, description = "Name or id"), ScopeWait, IdempotencyHeader), request_body = VolumeResize, responses(
    (status = 202, description = "Accepted, or nothing to do (no operation)", body = Accepted<Volume>), Problems))]
async fn volume_resize(
    ask: Ask,
    Path(volume): Path<String>,
    Params(query): Params<ScopeWait>,
    act: Act<VolumeResize>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Volume>()?;
    let (size, key) = (act.body.size, act.idempotency);
    let begun = ask.cloud().volume_resize(&ask.caller, query.project(), &volume, size, key).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::ACCEPTED, begun, wait).await
}

/// Show a volume
#[utoipa::path(get, path = "/v1/volumes/{volume}", tag = "volumes",
    params(("volume" = String, Path, description = "Name or id"), ScopeWait), responses(
    (status = 200, body = Volume, headers(("ETag" = String, description = "Its revision"))),
    (status = 204, description = "Gone, as `wait=gone` asked"), Problems))]
async fn volume_show(
    ask: Ask,
    Path(volume): Path<String>,
    Params(query): Params<ScopeWait>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Volume>()?;
    let volume = ask.cloud().get::<Volume>(&ask.caller, query.project(), &volume)?;
    wait::resource(&ask.app, &ask.caller, volume, wait).await
}

/// Change a volume
///
/// What is absent stays. Errors: `already_exists` when the new name is taken, `revision_mismatch`.
#[utoipa::path(patch, path = "/v1/volumes/{volume}", tag = "volumes",
    params(("volume" = String, Path, description = "Name or id"), ScopeWait, IfMatchHeader), request_body = VolumePatch, responses(
    (status = 200, body = Volume, headers(("ETag" = String, description = "Its revision"))), Problems))]
async fn volume_patch(
    ask: Ask,
    Path(volume): Path<String>,
    Params(query): Params<ScopeWait>,
    IfMatch(revision): IfMatch,
    Json(patch): Json<VolumePatch>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Volume>()?;
    let volume = ask.cloud().volume_patch(&ask.caller, query.project(), &volume, revision, patch).await?;
    wait::resource(&ask.app, &ask.caller, volume, wait).await
}

/// Delete a volume
///
/// Errors: `in_use` while a VM has it or it has snapshots, `conflict` while it is protected, `revision_mismatch`.
#[utoipa::path(delete, path = "/v1/volumes/{volume}", tag = "volumes",
    params(("volume" = String, Path, description = "Name or id"), ScopeWait, IfMatchHeader), responses(
    (status = 202, description = "Accepted", body = Accepted<Volume>), Problems))]
async fn volume_delete(
    ask: Ask,
    Path(volume): Path<String>,
    Params(query): Params<ScopeWait>,
    IfMatch(revision): IfMatch,
) -> Result<Response, Failure> {
    let wait = query.wait::<Volume>()?;
    let going = ask.cloud().volume_delete(&ask.caller, query.project(), &volume, revision).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::ACCEPTED, going, wait).await
}

/// Make a volume stand on its own
///
/// What it has from an image or a snapshot is copied into it, also while it is in use; then it needs neither any more. Errors:
/// `conflict` while it has snapshots.
#[utoipa::path(post, path = "/v1/volumes/{volume}/actions/flatten", tag = "volumes",
    params(("volume" = String, Path, description = "Name or id"), ScopeWait, IdempotencyHeader), request_body = NoFields, responses(
    (status = 202, description = "Accepted, or nothing to do (no operation)", body = Accepted<Volume>), Problems))]
async fn volume_flatten(
    ask: Ask,
    Path(volume): Path<String>,
    Params(query): Params<ScopeWait>,
    act: Act<NoFields>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Volume>()?;
    let begun = ask.cloud().volume_flatten(&ask.caller, query.project(), &volume, act.idempotency).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::ACCEPTED, begun, wait).await
}
