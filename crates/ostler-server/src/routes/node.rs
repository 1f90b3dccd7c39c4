//! `/v1/nodes`: what people see of them, and what their agents say and hear.

use std::sync::Arc;

use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use http::{HeaderMap, StatusCode};
use ostler_api::StreamId;
use ostler_api::list::{List, ListParams, WatchLine};
use ostler_api::node::{Node, NodePatch, NodeRegister};
use ostler_api::work::{Heartbeat, Reports, ReportsTaken, WorkLine};
use ostler_api::{ApiError, Kind};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::ask::{Ask, IfMatchHeader, NoFields, WaitOnly};
use crate::extract::{Act, IfMatch, Json, Params};
use crate::file::{Sending, read_error, send_file};
use crate::identity::let_go;
use crate::lines::{json_lines, list_or_watch};
use crate::openapi::Problems;
use crate::problem::Failure;
use crate::socket::Upgrade;
use crate::wait::{self, single};

pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(node_list))
        .routes(routes!(node_show, node_register, node_patch, node_delete))
        .routes(routes!(node_heartbeat))
        .routes(routes!(node_work))
        .routes(routes!(node_reports))
        .routes(routes!(node_image))
        .routes(routes!(node_stream))
}

/// List or watch nodes
///
/// `watch=true` streams lines of `WatchLine` (`application/jsonl`).
#[utoipa::path(get, path = "/v1/nodes", tag = "nodes", params(ListParams), responses(
    (status = 200, description = "A page, or the watch",
        content((List<Node> = "application/json"), (WatchLine<Node> = "application/jsonl"))), Problems))]
async fn node_list(ask: Ask, Params(params): Params<ListParams>) -> Result<Response, Failure> {
    list_or_watch::<Node>(&ask.app, &ask.caller, &params).await
}

/// Show a node
#[utoipa::path(get, path = "/v1/nodes/{node}", tag = "nodes",
    params(("node" = String, Path, description = "Name or id"), WaitOnly), responses(
    (status = 200, body = Node, headers(("ETag" = String, description = "Its revision"))),
    (status = 204, description = "Gone, as `wait=gone` asked"), Problems))]
async fn node_show(
    ask: Ask,
    Path(node): Path<String>,
    Params(query): Params<WaitOnly>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Node>()?;
    let node = ask.cloud().get::<Node>(&ask.caller, None, &node)?;
    wait::resource(&ask.app, &ask.caller, node, wait).await
}

/// Say what a node is and has
///
/// From its agent when it starts and when its facts change; makes the node when it is new. Errors: `conflict` when the
/// name is another host's.
#[utoipa::path(put, path = "/v1/nodes/{node}", tag = "nodes",
    params(("node" = String, Path, description = "Name")), request_body = NodeRegister, responses(
    (status = 200, body = Node, headers(("ETag" = String, description = "Its revision"))), Problems))]
async fn node_register(
    ask: Ask,
    Path(node): Path<String>,
    Json(register): Json<NodeRegister>,
) -> Result<Response, Failure> {
    let node: Arc<Node> = ask.cloud().node_register(&ask.caller, &node, register).await?;
    Ok(single(node.as_ref()))
}

/// Change a node
///
/// What is absent stays. Errors: `revision_mismatch`.
#[utoipa::path(patch, path = "/v1/nodes/{node}", tag = "nodes",
    params(("node" = String, Path, description = "Name or id"), IfMatchHeader), request_body = NodePatch, responses(
    (status = 200, body = Node, headers(("ETag" = String, description = "Its revision"))), Problems))]
async fn node_patch(
    ask: Ask,
    Path(node): Path<String>,
    IfMatch(revision): IfMatch,
    Json(patch): Json<NodePatch>,
) -> Result<Response, Failure> {
    let node: Arc<Node> = ask.cloud().node_patch(&ask.caller, &node, revision, patch).await?;
    Ok(single(node.as_ref()))
}

/// Forget a node
///
/// Errors: `conflict` unless it is unreachable, `in_use` while VMs or volumes are on it, `revision_mismatch`.
#[utoipa::path(delete, path = "/v1/nodes/{node}", tag = "nodes",
    params(("node" = String, Path, description = "Name or id"), IfMatchHeader), responses(
    (status = 204, description = "Gone"), Problems))]
async fn node_delete(
    ask: Ask,
    Path(node): Path<String>,
    IfMatch(revision): IfMatch,
) -> Result<StatusCode, Failure> {
    ask.cloud().node_delete(&ask.caller, &node, revision).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Say that a node's agent lives
///
/// Without one for `lease_secs` the node is unreachable.
#[utoipa::path(post, path = "/v1/nodes/{node}/heartbeat", tag = "nodes",
    params(("node" = String, Path, description = "Name")), request_body = NoFields, responses(
    (status = 200, body = Heartbeat), Problems))]
async fn node_heartbeat(
    ask: Ask,
    Path(node): Path<String>,
    _body: Act<NoFields>,
) -> Result<Response, Failure> {
    Ok(axum::Json(ask.cloud().node_heartbeat(&ask.caller, &node).await?).into_response())
}

/// What a node has to do
///
/// An endless stream of `WorkLine` (`application/jsonl`): all that is placed on it, `synced`, then changes, with a bookmark
/// every few seconds. A second stream of a node ends the first.
#[utoipa::path(get, path = "/v1/nodes/{node}/work", tag = "nodes",
    params(("node" = String, Path, description = "Name")), responses(
    (status = 200, body = WorkLine, content_type = "application/jsonl"), Problems))]
async fn node_work(ask: Ask, Path(node): Path<String>) -> Result<Response, Failure> {
    let Ask { app, caller } = ask;
    let work = app.cloud.node_work(&caller, &node).await?;
    let end = let_go(app, caller);
    Ok(json_lines(work.take_until(Box::pin(end))))
}

/// Report what a node sees
///
/// Reports about what is no longer placed on the node are dropped, and counted as such.
#[utoipa::path(post, path = "/v1/nodes/{node}/reports", tag = "nodes",
    params(("node" = String, Path, description = "Name")), request_body = Reports, responses(
    (status = 200, body = ReportsTaken), Problems))]
async fn node_reports(
    ask: Ask,
    Path(node): Path<String>,
    Json(reports): Json<Reports>,
) -> Result<Response, Failure> {
    Ok(axum::Json(ask.cloud().node_reports(&ask.caller, &node, reports).await?).into_response())
}

/// Fetch a stored image for a node
///
/// Takes `Range`, so that a broken transfer goes on where it was. Errors: `not_found` also when nothing on the node needs
/// the image.
#[utoipa::path(get, path = "/v1/nodes/{node}/images/{sha256}", tag = "nodes",
    params(("node" = String, Path, description = "Name"), ("sha256" = String, Path, description = "Of the stored file, in hex")),
    responses(
    (status = 200, body = [u8], content_type = "application/octet-stream"),
    (status = 206, description = "The part that `Range` asked for"),
    (status = 416, description = "No such part"), Problems))]
async fn node_image(
    ask: Ask,
    Path((node, sha256)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let image = ask.cloud().node_image(&ask.caller, &node, &sha256)?;
    let file = tokio::fs::File::open(&image.path).await.map_err(read_error)?;
    send_file(&headers, Sending { file, size: image.size, tag: image.sha256 }).await
}

/// The agent's side of a console, display or log
///
/// A WebSocket with binary frames. The stream's id comes with a `stream` line of the node's work and is good once, for
/// some seconds.
#[utoipa::path(get, path = "/v1/nodes/{node}/streams/{stream}", tag = "nodes",
    params(("node" = String, Path, description = "Name"), ("stream" = String, Path, description = "Id")), responses(
    (status = 101, description = "A WebSocket"), Problems))]
async fn node_stream(
    ask: Ask,
    Path((node, stream)): Path<(String, String)>,
    upgrade: Upgrade,
) -> Result<Response, Failure> {
    ask.cloud().get::<Node>(&ask.caller, None, &node)?;
    let ready = upgrade.check()?;
    let id: StreamId = stream.parse().map_err(|_| ApiError::not_found(Kind::Node, &node))?;
    let end = ask.cloud().stream_join(&ask.caller, &node, id).await?;
    Ok(ready.join(ask.app, ask.caller, end))
}
