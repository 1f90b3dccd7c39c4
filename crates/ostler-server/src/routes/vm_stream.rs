//! `/v1/vms/{vm}/console`, `vnc` and `log`: bytes from and to a running VM.

use axum::body::Body;
use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{StreamExt, stream};
use http::header::CONTENT_TYPE;
use ostler_api::vm::Vm;
use ostler_api::work::StreamKind;
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::ask::{Ask, Scope};
use crate::extract::Params;
use crate::identity::let_go;
use crate::openapi::Problems;
use crate::problem::Failure;
use crate::socket::Upgrade;

/// Bytes of scrollback when none are asked for.
const SCROLLBACK_DEFAULT: u64 = 64 * 1024;
/// Bytes of a log's end when none are asked for.
const TAIL_DEFAULT: u64 = 1 << 20;

pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(vm_console)).routes(routes!(vm_vnc)).routes(routes!(vm_log))
}

/// The query of a console.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Console {
    /// Project; the caller's own when not given.
    project: Option<String>,
    /// Bytes of what was printed before (65536 when not given).
    scrollback: Option<u64>,
}

/// A VM's serial console
///
/// A WebSocket; binary frames both ways, their boundaries mean nothing. Several may look at once. Errors: `conflict` when
/// the VM has no node yet, `node_unavailable`.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), Console), responses(
    (status = 101, description = "A WebSocket"), Problems))]
async fn vm_console(
    ask: Ask,
    Path(vm): Path<String>,
    Params(query): Params<Console>,
    upgrade: Upgrade,
) -> Result<Response, Failure> {
    let scrollback = query.scrollback.unwrap_or(SCROLLBACK_DEFAULT);
    socket(ask, query.project.as_deref(), &vm, StreamKind::Console { scrollback }, upgrade).await
}

/// A VM's display
///
/// A WebSocket with RFB in binary frames, as noVNC speaks it. Errors: `conflict`, `node_unavailable`.
#[utoipa::path(get, path = "/v1/vms/{vm}/vnc", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), Scope), responses(
    (status = 101, description = "A WebSocket"), Problems))]
async fn vm_vnc(
    ask: Ask,
    Path(vm): Path<String>,
    Params(query): Params<Scope>,
    upgrade: Upgrade,
) -> Result<Response, Failure> {
    socket(ask, query.project.as_deref(), &vm, StreamKind::Vnc, upgrade).await
}

async fn socket(
    ask: Ask,
    project: Option<&str>,
    vm: &str,
    what: StreamKind,
    upgrade: Upgrade,
) -> Result<Response, Failure> {
    // Who may not see it hears that first; and no agent is asked for a stream that has no socket.
    ask.cloud().get::<Vm>(&ask.caller, project, vm)?;
    let ready = upgrade.check()?;
    let end = ask.cloud().stream_open(&ask.caller, project, vm, what).await?;
    Ok(ready.join(ask.app, ask.caller, end))
}

/// The query of a log.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Log {
    /// Project; the caller's own when not given.
    project: Option<String>,
    /// Bytes from the end (1048576 when not given).
    tail: Option<u64>,
    /// Go on with what will be printed.
    #[serde(default)]
    follow: bool,
}

/// What a VM's serial console printed
///
/// The guest's own bytes, whatever they are. Errors: `conflict` when the VM has no node yet, `node_unavailable`.
#[utoipa::path(get, path = "/v1/vms/{vm}/log", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), Log), responses(
    (status = 200, body = String, content_type = "text/plain"), Problems))]
async fn vm_log(ask: Ask, Path(vm): Path<String>, Params(query): Params<Log>) -> Result<Response, Failure> {
    let what = StreamKind::Log { tail: query.tail.unwrap_or(TAIL_DEFAULT), follow: query.follow };
    let end = ask.cloud().stream_open(&ask.caller, query.project.as_deref(), &vm, what).await?;
    // The end as a whole goes along: dropping its sender would close the stream.
    let chunks = stream::unfold(end, |mut end| async {
        let chunk = end.rx.recv().await?;
        Some((Ok::<Bytes, std::convert::Infallible>(chunk), end))
    });
    let body = Body::from_stream(chunks.take_until(Box::pin(let_go(ask.app, ask.caller))));
    Ok(([(CONTENT_TYPE, "text/plain")], body).into_response())
}
