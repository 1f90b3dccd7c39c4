//! `/v1/images`: the images and their data.

use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::{HeaderMap, Method, StatusCode};
use ostler_api::image::{Image, ImageCreate, ImageFormat, ImagePatch, UploadState};
use ostler_api::list::{List, ListParams, WatchLine};
use ostler_api::operation::Accepted;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::ask::{Ask, IdempotencyHeader, IfMatchHeader, Scope, ScopeWait};
use crate::extract::{IfMatch, Json, Params, Submit};
use crate::file::{Sending, read_error, send_file};
use crate::lines::list_or_watch;
use crate::openapi::Problems;
use crate::problem::Failure;
use crate::wait;

pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(image_list, image_create))
        .routes(routes!(image_show, image_patch, image_delete))
        .routes(routes!(image_data))
        .routes(routes!(image_upload_state, image_upload))
}

/// List or watch images
///
/// `watch=true` streams lines of `WatchLine` (`application/jsonl`).
#[utoipa::path(get, path = "/v1/images", tag = "images", params(ListParams), responses(
    (status = 200, description = "A page, or the watch",
        content((List<Image> = "application/json"), (WatchLine<Image> = "application/jsonl"))), Problems))]
async fn image_list(ask: Ask, Params(params): Params<ListParams>) -> Result<Response, Failure> {
    list_or_watch::<Image>(&ask.app, &ask.caller, &params).await
}

/// Create an image
///
/// With `url` the server fetches it; else upload its data. The operation ends when the image is `active`. Errors:
/// `already_exists` when the name is taken.
#[utoipa::path(post, path = "/v1/images", tag = "images", params(ScopeWait, IdempotencyHeader), request_body = ImageCreate, responses(
    (status = 201, description = "Accepted; it waits for its data, or is fetched", body = Accepted<Image>), Problems))]
async fn image_create(
    ask: Ask,
    Params(query): Params<ScopeWait>,
    submit: Submit<ImageCreate>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Image>()?;
    let made =
        ask.cloud().image_create(&ask.caller, query.project(), submit.body, submit.idempotency).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::CREATED, made, wait).await
}

/// Show an image
#[utoipa::path(get, path = "/v1/images/{image}", tag = "images",
    params(("image" = String, Path, description = "Name or id"), ScopeWait), responses(
    (status = 200, body = Image, headers(("ETag" = String, description = "Its revision"))),
    (status = 204, description = "Gone, as `wait=gone` asked"), Problems))]
async fn image_show(
    ask: Ask,
    Path(image): Path<String>,
    Params(query): Params<ScopeWait>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Image>()?;
    let image = ask.cloud().get::<Image>(&ask.caller, query.project(), &image)?;
    wait::resource(&ask.app, &ask.caller, image, wait).await
}

/// Change an image
///
/// What is absent stays. Errors: `already_exists` when the new name is taken, `revision_mismatch`.
#[utoipa::path(patch, path = "/v1/images/{image}", tag = "images",
    params(("image" = String, Path, description = "Name or id"), ScopeWait, IfMatchHeader), request_body = ImagePatch, responses(
    (status = 200, body = Image, headers(("ETag" = String, description = "Its revision"))), Problems))]
async fn image_patch(
    ask: Ask,
    Path(image): Path<String>,
    Params(query): Params<ScopeWait>,
    IfMatch(revision): IfMatch,
    Json(patch): Json<ImagePatch>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Image>()?;
    let image = ask.cloud().image_patch(&ask.caller, query.project(), &image, revision, patch).await?;
    wait::resource(&ask.app, &ask.caller, image, wait).await
}

/// Delete an image
///
/// Errors: `in_use` while something is made from it, `revision_mismatch`.
#[utoipa::path(delete, path = "/v1/images/{image}", tag = "images",
    params(("image" = String, Path, description = "Name or id"), ScopeWait, IfMatchHeader), responses(
    (status = 202, description = "Accepted", body = Accepted<Image>), Problems))]
async fn image_delete(
    ask: Ask,
    Path(image): Path<String>,
    Params(query): Params<ScopeWait>,
    IfMatch(revision): IfMatch,
) -> Result<Response, Failure> {
    let wait = query.wait::<Image>()?;
    let going = ask.app.cloud.image_delete(&ask.caller, query.project(), &image, revision).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::ACCEPTED, going, wait).await
}

/// The query of an image's data.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Data {
    /// Project; the caller's own when not given.
    project: Option<String>,
    /// Convert it first; as it is stored when not given.
    #[param(value_type = Option<ImageFormat>)]
    format: Option<ImageFormat>,
}

/// Download an image
///
/// As it is stored, with `Range`; or converted, which takes time before the first byte comes. Errors: `conflict` while it
/// is not active.
#[utoipa::path(get, path = "/v1/images/{image}/data", tag = "images",
    params(("image" = String, Path, description = "Name or id"), Data), responses(
    (status = 200, body = [u8], content_type = "application/octet-stream"),
    (status = 206, description = "The part that `Range` asked for"),
    (status = 416, description = "No such part"), Problems))]
async fn image_data(
    ask: Ask,
    Path(image): Path<String>,
    Params(query): Params<Data>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let project = query.project.as_deref();
    let stored = ask.cloud().image_file(&ask.caller, project, &image)?;
    let Some(format) = query.format.filter(|format| *format != stored.format) else {
        let file = tokio::fs::File::open(&stored.path).await.map_err(read_error)?;
        return send_file(&headers, Sending { file, size: stored.size, tag: stored.sha256 }).await;
    };
    if method == Method::HEAD {
        // Not worth a conversion.
        return Ok(StatusCode::OK.into_response());
    }
    // A client that goes away drops this future, and the guard ends the conversion.
    let cancel = CancellationToken::new();
    let _guard = cancel.clone().drop_guard();
    let made = ask.cloud().image_export(&ask.caller, project, &image, format, cancel).await?;
    let opened = tokio::fs::File::open(&made.path).await;
    // From here on the descriptor alone holds it, so it is gone with the answer.
    tokio::fs::remove_file(&made.path).await.map_err(read_error)?;
    let tag = format!("{}-{format}", made.sha256);
    // Two conversions need not be alike byte for byte, so there are no parts of one.
    send_file(&HeaderMap::new(), Sending { file: opened.map_err(read_error)?, size: made.size, tag }).await
}

/// How far an upload is
#[utoipa::path(get, path = "/v1/images/{image}/upload", tag = "images",
    params(("image" = String, Path, description = "Name or id"), Scope), responses(
    (status = 200, body = UploadState), Problems))]
async fn image_upload_state(
    ask: Ask,
    Path(image): Path<String>,
    Params(query): Params<Scope>,
) -> Result<Response, Failure> {
    let state = ask.cloud().image_upload_offset(&ask.caller, query.project.as_deref(), &image).await?;
    Ok(axum::Json(state).into_response())
}

/// The query of an upload.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Upload {
    /// Project; the caller's own when not given.
    project: Option<String>,
    /// Where the body goes: as many bytes as are there already.
    #[serde(default)]
    offset: u64,
    /// Nothing comes after this body: begin the import.
    #[serde(default)]
    last: bool,
}

/// Upload an image's data
///
/// Appends the body at `offset`. What arrived before a break is kept; ask for the state to go on. The data may have any of
/// the formats and be compressed. Errors: `conflict` with the true offset when `offset` is not it, `no_space`,
/// `too_large`.
#[utoipa::path(put, path = "/v1/images/{image}/upload", tag = "images",
    params(("image" = String, Path, description = "Name or id"), Upload),
    request_body(content = [u8], content_type = "application/octet-stream"), responses(
    (status = 200, body = UploadState), Problems))]
async fn image_upload(
    ask: Ask,
    Path(image): Path<String>,
    Params(query): Params<Upload>,
    body: Body,
) -> Result<Response, Failure> {
    let Upload { project, offset, last } = query;
    let chunks = with_idle_limit(body, ask.app.limits.upload_idle);
    let state =
        ask.app.cloud.image_upload(&ask.caller, project.as_deref(), &image, offset, last, chunks).await?;
    Ok(axum::Json(state).into_response())
}

/// The body's chunks; one that does not come in time is the end.
fn with_idle_limit(body: Body, limit: Duration) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some(body.into_data_stream()), move |chunks| async move {
        let mut chunks = chunks?;
        match tokio::time::timeout(limit, chunks.next()).await {
            Ok(Some(Ok(chunk))) => Some((Ok(chunk), Some(chunks))),
            Ok(Some(Err(error))) => Some((Err(io::Error::new(io::ErrorKind::UnexpectedEof, error)), None)),
            Ok(None) => None,
            Err(_) => Some((Err(io::ErrorKind::TimedOut.into()), None)),
        }
    })
}
