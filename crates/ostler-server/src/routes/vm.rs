//! `/v1/vms`: life and actions.

use std::sync::Arc;

use axum::extract::Path;
use axum::response::Response;
use http::StatusCode;
use ostler_api::ByteSize;
use ostler_api::list::{List, ListParams, WatchLine};
use ostler_api::operation::Accepted;
use ostler_api::vm::{DiskBus, Vm, VmCreate, VmPatch};
use ostler_api::vm_action::SHUTDOWN_TIMEOUT_DEFAULT;
use ostler_control::VmActionRequest;
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};
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
        .routes(routes!(vm_list, vm_create))
        .routes(routes!(vm_show, vm_patch, vm_delete))
        .routes(routes!(vm_start))
        .routes(routes!(vm_stop))
        .routes(routes!(vm_reset))
        .routes(routes!(vm_pause))
        .routes(routes!(vm_resume))
        .routes(routes!(vm_suspend))
        .routes(routes!(vm_shutdown))
        .routes(routes!(vm_reboot))
        .routes(routes!(vm_rebuild))
        .routes(routes!(vm_attach))
        .routes(routes!(vm_detach))
}

/// List or watch VMs
///
/// `watch=true` streams lines of `WatchLine` (`application/jsonl`), with a bookmark every few seconds.
#[utoipa::path(get, path = "/v1/vms", tag = "vms", params(ListParams), responses(
    (status = 200, description = "A page, or the watch",
        content((List<Vm> = "application/json"), (WatchLine<Vm> = "application/jsonl"))), Problems))]
async fn vm_list(ask: Ask, Params(params): Params<ListParams>) -> Result<Response, Failure> {
    list_or_watch::<Vm>(&ask.app, &ask.caller, &params).await
}

/// Create a VM
///
/// Its root disk is a linked copy of the image; it starts unless `start` is false. Errors: `already_exists` when the
/// name is taken, `invalid` with the field when a value cannot be or an image is not there, `conflict` when an image
/// cannot be used.
#[utoipa::path(post, path = "/v1/vms", tag = "vms", params(ScopeWait, IdempotencyHeader), request_body = VmCreate, responses(
    (status = 201, description = "Accepted; it is made from here on", body = Accepted<Vm>), Problems))]
async fn vm_create(
    ask: Ask,
    Params(query): Params<ScopeWait>,
    submit: Submit<VmCreate>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Vm>()?;
    let made = ask.cloud().vm_create(&ask.caller, query.project(), submit.body, submit.idempotency).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::CREATED, made, wait).await
}

/// Show a VM
#[utoipa::path(get, path = "/v1/vms/{vm}", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), ScopeWait), responses(
    (status = 200, body = Vm, headers(("ETag" = String, description = "Its revision"))),
    (status = 204, description = "Gone, as `wait=gone` asked"), Problems))]
async fn vm_show(
    ask: Ask,
    Path(vm): Path<String>,
    Params(query): Params<ScopeWait>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Vm>()?;
    let vm = ask.cloud().get::<Vm>(&ask.caller, query.project(), &vm)?;
    wait::resource(&ask.app, &ask.caller, vm, wait).await
}

/// Change a VM
///
/// What is absent stays. Errors: `conflict` when CPUs, memory or ports are to change while it is not stopped,
/// `already_exists` when the new name is taken, `revision_mismatch`.
#[utoipa::path(patch, path = "/v1/vms/{vm}", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), ScopeWait, IfMatchHeader), request_body = VmPatch, responses(
    (status = 200, body = Vm, headers(("ETag" = String, description = "Its revision"))), Problems))]
async fn vm_patch(
    ask: Ask,
    Path(vm): Path<String>,
    Params(query): Params<ScopeWait>,
    IfMatch(revision): IfMatch,
    Json(patch): Json<VmPatch>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Vm>()?;
    let vm: Arc<Vm> = ask.cloud().vm_patch(&ask.caller, query.project(), &vm, revision, patch).await?;
    wait::resource(&ask.app, &ask.caller, vm, wait).await
}

/// The query of a VM's deletion.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct VmDelete {
    /// Project; the caller's own when not given.
    project: Option<String>,
    /// Forget it at once when its node does not report.
    #[serde(default)]
    force: bool,
    /// `gone` answers when it is gone.
    wait: Option<String>,
    /// Most seconds to wait (at most 3600; 300 when not given).
    timeout: Option<u64>,
}

/// Delete a VM
///
/// With the volumes it owns. Always possible, in every phase. Errors: `revision_mismatch`.
#[utoipa::path(delete, path = "/v1/vms/{vm}", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), VmDelete, IfMatchHeader), responses(
    (status = 202, description = "Accepted", body = Accepted<Vm>), Problems))]
async fn vm_delete(
    ask: Ask,
    Path(vm): Path<String>,
    Params(query): Params<VmDelete>,
    IfMatch(revision): IfMatch,
) -> Result<Response, Failure> {
    let wait = Wait::parse::<Vm>(query.wait.as_deref(), query.timeout)?;
    let project = query.project.as_deref();
    let going = ask.cloud().vm_delete(&ask.caller, project, &vm, revision, query.force).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::ACCEPTED, going, wait).await
}

/// What all actions have in common.
async fn act<B>(
    ask: Ask,
    vm: &str,
    query: &ScopeWait,
    act: Act<B>,
    request: impl FnOnce(B) -> VmActionRequest,
) -> Result<Response, Failure> {
    let wait = query.wait::<Vm>()?;
    let (request, key) = (request(act.body), act.idempotency);
    let begun = ask.cloud().vm_act(&ask.caller, query.project(), vm, request, key).await?;
    wait::accepted(&ask.app, &ask.caller, StatusCode::ACCEPTED, begun, wait).await
}

/// An action whose body is empty or `{}`.
macro_rules! plain_action {
    ($name:ident, $path:literal, $request:ident, $title:literal, $about:literal) => {
        #[doc = $title]
        #[doc = ""]
        #[doc = $about]
        #[utoipa::path(post, path = $path, tag = "vms",
            params(("vm" = String, Path, description = "Name or id"), ScopeWait, IdempotencyHeader), request_body = NoFields, responses(
            (status = 202, description = "Accepted, or nothing to do (no operation)", body = Accepted<Vm>), Problems))]
        async fn $name(
            ask: Ask,
            Path(vm): Path<String>,
            Params(query): Params<ScopeWait>,
            body: Act<NoFields>,
        ) -> Result<Response, Failure> {
            act(ask, &vm, &query, body, |NoFields {}| VmActionRequest::$request).await
        }
    };
}

plain_action!(
    vm_start,
    "/v1/vms/{vm}/actions/start",
    Start,
    "Start a VM",
    "Cold, or from its saved memory when it is suspended. Errors: `conflict` when it is paused or busy, `no_capacity`."
);
plain_action!(
    vm_stop,
    "/v1/vms/{vm}/actions/stop",
    Stop,
    "Stop a VM at once",
    "Pulls the plug, and drops saved memory. The guest is not asked."
);
plain_action!(
    vm_reset,
    "/v1/vms/{vm}/actions/reset",
    Reset,
    "Press a VM's reset button",
    "The guest is not asked. Errors: `conflict` when it does not run."
);
plain_action!(
    vm_pause,
    "/v1/vms/{vm}/actions/pause",
    Pause,
    "Freeze a VM's processors",
    "Errors: `conflict` when it does not run."
);
plain_action!(
    vm_resume,
    "/v1/vms/{vm}/actions/resume",
    Resume,
    "Let a paused or suspended VM go on",
    "Errors: `conflict` when it is neither."
);
plain_action!(
    vm_suspend,
    "/v1/vms/{vm}/actions/suspend",
    Suspend,
    "Save a VM's memory to its node's disk",
    "Its process ends; start or resume goes on where it was. Errors: `conflict` when it does not run."
);

/// How a VM is shut down.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct VmShutdown {
    /// Seconds the guest gets (at most 3600).
    #[serde(default = "shutdown_timeout")]
    timeout: u32,
    /// Force it off after that; else it stays running and the operation fails.
    #[serde(default = "yes")]
    force: bool,
}

const fn shutdown_timeout() -> u32 {
    SHUTDOWN_TIMEOUT_DEFAULT
}

const fn yes() -> bool {
    true
}

/// Ask a VM's guest to shut down
///
/// Presses the ACPI power button. Errors: `conflict` when it does not run.
#[utoipa::path(post, path = "/v1/vms/{vm}/actions/shutdown", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), ScopeWait, IdempotencyHeader), request_body = VmShutdown, responses(
    (status = 202, description = "Accepted, or nothing to do (no operation)", body = Accepted<Vm>), Problems))]
async fn vm_shutdown(
    ask: Ask,
    Path(vm): Path<String>,
    Params(query): Params<ScopeWait>,
    body: Act<VmShutdown>,
) -> Result<Response, Failure> {
    let request = |VmShutdown { timeout, force }| VmActionRequest::Shutdown { timeout, force };
    act(ask, &vm, &query, body, request).await
}

/// How a VM is rebooted.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct VmReboot {
    /// Seconds the guest gets to shut down before it is forced off (at most 3600).
    #[serde(default = "shutdown_timeout")]
    timeout: u32,
}

/// Reboot a VM
///
/// A shutdown with force, then a start. Errors: `conflict` when it does not run.
#[utoipa::path(post, path = "/v1/vms/{vm}/actions/reboot", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), ScopeWait, IdempotencyHeader), request_body = VmReboot, responses(
    (status = 202, description = "Accepted", body = Accepted<Vm>), Problems))]
async fn vm_reboot(
    ask: Ask,
    Path(vm): Path<String>,
    Params(query): Params<ScopeWait>,
    body: Act<VmReboot>,
) -> Result<Response, Failure> {
    act(ask, &vm, &query, body, |VmReboot { timeout }| VmActionRequest::Reboot { timeout }).await
}

/// What a VM is rebuilt from.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct VmRebuild {
    /// Image, by name or id.
    image: String,
    /// Bytes of the new root disk; as large as the old one when not given.
    #[serde(default)]
    disk: Option<ByteSize>,
}

/// Give a VM a new root disk
///
/// From another image; its identity stays. The old disk goes once the new one is there. Errors: `invalid` when the image
/// is not there or the disk is smaller than it, `conflict`.
#[utoipa::path(post, path = "/v1/vms/{vm}/actions/rebuild", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), ScopeWait, IdempotencyHeader), request_body = VmRebuild, responses(
    (status = 202, description = "Accepted", body = Accepted<Vm>), Problems))]
async fn vm_rebuild(
    ask: Ask,
    Path(vm): Path<String>,
    Params(query): Params<ScopeWait>,
    body: Act<VmRebuild>,
) -> Result<Response, Failure> {
    act(ask, &vm, &query, body, |VmRebuild { image, disk }| VmActionRequest::Rebuild { image, disk }).await
}

/// A volume that becomes a disk.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct VmAttach {
    /// Volume, by name or id.
    volume: String,
    #[serde(default = "virtio")]
    bus: DiskBus,
}

const fn virtio() -> DiskBus {
    DiskBus::Virtio
}

/// Attach a volume to a VM
///
/// Also while it runs. Errors: `invalid` when there is no such volume, `in_use` when another VM has it, `conflict` when it
/// is on another node or cannot be plugged into a running machine.
#[utoipa::path(post, path = "/v1/vms/{vm}/actions/attach", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), ScopeWait, IdempotencyHeader), request_body = VmAttach, responses(
    (status = 202, description = "Accepted, or nothing to do (no operation)", body = Accepted<Vm>), Problems))]
async fn vm_attach(
    ask: Ask,
    Path(vm): Path<String>,
    Params(query): Params<ScopeWait>,
    body: Act<VmAttach>,
) -> Result<Response, Failure> {
    act(ask, &vm, &query, body, |VmAttach { volume, bus }| VmActionRequest::Attach { volume, bus }).await
}

/// A disk to take away.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct VmDetach {
    /// Volume, by name or id.
    volume: String,
}

/// Detach a volume from a VM
///
/// Of a running machine the guest has to let it go: unmount it there first. The volume stays. Errors: `conflict` when the VM does not
/// have it or runs from it.
#[utoipa::path(post, path = "/v1/vms/{vm}/actions/detach", tag = "vms",
    params(("vm" = String, Path, description = "Name or id"), ScopeWait, IdempotencyHeader), request_body = VmDetach, responses(
    (status = 202, description = "Accepted, or nothing to do (no operation)", body = Accepted<Vm>), Problems))]
async fn vm_detach(
    ask: Ask,
    Path(vm): Path<String>,
    Params(query): Params<ScopeWait>,
    body: Act<VmDetach>,
) -> Result<Response, Failure> {
    act(ask, &vm, &query, body, |VmDetach { volume }| VmActionRequest::Detach { volume }).await
}
