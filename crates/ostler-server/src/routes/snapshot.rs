//! `/v1/snapshots`.

use axum::extract::Path;
use axum::response::Response;
use http::StatusCode;
use ostler_api::list::{List, ListParams, WatchLine};
use ostler_api::operation::Accepted;
use ostler_api::snapshot::{Snapshot, SnapshotCreate, SnapshotPatch};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::ask::{Ask, IdempotencyHeader, IfMatchHeader, NoFields, ScopeWait};
use crate::extract::{Act, IfMatch, Json, Params, Submit};
use crate::lines::list_or_watch;
use crate::openapi::Problems;
use crate::problem::Failure;
use crate::wait::{self, Wait};

pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(snapshot_list, snapshot_create))
        .routes(routes!(snapshot_show, snapshot_patch, snapshot_delete))
        .routes(routes!(snapshot_revert))
}

/// List or watch snapshots
///
/// `watch=true` streams lines of `WatchLine` (`application/jsonl`).
#[utoipa::path(get, path = "/v1/snapshots", tag = "snapshots", params(ListParams), responses(
    (status = 200, description = "A page, or the watch",
        content((List<Snapshot> = "application/json"), (WatchLine<Snapshot> = "application/jsonl"))), Problems))]
async fn snapshot_list(ask: Ask, Params(params): Params<ListParams>) -> Result<Response, Failure> {
    list_or_watch::<Snapshot>(&ask.app, &ask.caller, &params).await
}

/// Take a snapshot
///
/// Of all disks of a VM at one instant, running or not, or of one volume. Errors: `already_exists`, `conflict` while a disk
/// is not ready or another snapshot of it is under way.
#[utoipa::path(post, path = "/v1/snapshots", tag = "snapshots", params(ScopeWait, IdempotencyHeader), request_body = SnapshotCreate, responses(
    (status = 201, description = "Accepted; its node takes it", body = Accepted<Snapshot>), Problems))]
async fn snapshot_create(
    ask: Ask,
    Params(query): Params<ScopeWait>,
    submit: Submit<SnapshotCreate>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Snapshot>()?;
    let made =
        ask.cloud().snapshot_create(&ask.caller, query.project(), submit.body, submit.idempotency).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::CREATED, made, wait).await
}

/// Show a snapshot
#[utoipa::path(get, path = "/v1/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Name or id"), ScopeWait), responses(
    (status = 200, body = Snapshot, headers(("ETag" = String, description = "Its revision"))),
    (status = 204, description = "Gone, as `wait=gone` asked"), Problems))]
async fn snapshot_show(
    ask: Ask,
    Path(snapshot): Path<String>,
    Params(query): Params<ScopeWait>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Snapshot>()?;
    let snapshot = ask.cloud().get::<Snapshot>(&ask.caller, query.project(), &snapshot)?;
    wait::resource(&ask.app, &ask.caller, snapshot, wait).await
}

/// Change a snapshot
///
/// What is absent stays. Errors: `already_exists` when the new name is taken, `revision_mismatch`.
#[utoipa::path(patch, path = "/v1/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Name or id"), ScopeWait, IfMatchHeader), request_body = SnapshotPatch, responses(
    (status = 200, body = Snapshot, headers(("ETag" = String, description = "Its revision"))), Problems))]
async fn snapshot_patch(
    ask: Ask,
    Path(snapshot): Path<String>,
    Params(query): Params<ScopeWait>,
    IfMatch(revision): IfMatch,
    Json(patch): Json<SnapshotPatch>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Snapshot>()?;
    let changed =
        ask.cloud().snapshot_patch(&ask.caller, query.project(), &snapshot, revision, patch).await?;
    wait::resource(&ask.app, &ask.caller, changed, wait).await
}

/// The query of a snapshot's deletion.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct SnapshotDelete {
    /// Project; the caller's own when not given.
    project: Option<String>,
    /// Delete it also when it has linked copies, which stay whole.
    #[serde(default)]
    force: bool,
    /// `gone` answers when it is gone.
    wait: Option<String>,
    /// Most seconds to wait (at most 3600; 300 when not given).
    timeout: Option<u64>,
}

/// Delete a snapshot
///
/// Anywhere in the tree; what stands on it stays whole. Errors: `in_use` when it has linked copies and `force` is not
/// set, `revision_mismatch`.
#[utoipa::path(delete, path = "/v1/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Name or id"), SnapshotDelete, IfMatchHeader), responses(
    (status = 202, description = "Accepted", body = Accepted<Snapshot>), Problems))]
async fn snapshot_delete(
    ask: Ask,
    Path(snapshot): Path<String>,
    Params(query): Params<SnapshotDelete>,
    IfMatch(revision): IfMatch,
) -> Result<Response, Failure> {
    let wait = Wait::parse::<Snapshot>(query.wait.as_deref(), query.timeout)?;
    let project = query.project.as_deref();
    let going = ask.cloud().snapshot_delete(&ask.caller, project, &snapshot, revision, query.force).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::ACCEPTED, going, wait).await
}

/// Go back to a snapshot
///
/// Its disks hold again what they held then; what they have held since is given up unless a later snapshot has it. Errors:
/// `conflict` while the VM is not stopped.
#[utoipa::path(post, path = "/v1/snapshots/{snapshot}/actions/revert", tag = "snapshots",
    params(("snapshot" = String, Path, description = "Name or id"), ScopeWait, IdempotencyHeader), request_body = NoFields, responses(
    (status = 202, description = "Accepted", body = Accepted<Snapshot>), Problems))]
async fn snapshot_revert(
    ask: Ask,
    Path(snapshot): Path<String>,
    Params(query): Params<ScopeWait>,
    act: Act<NoFields>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Snapshot>()?;
    let begun = ask.cloud().snapshot_revert(&ask.caller, query.project(), &snapshot, act.idempotency).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::ACCEPTED, begun, wait).await
}
