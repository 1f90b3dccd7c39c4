//! `/v1/operations`.

use axum::extract::Path;
use axum::response::Response;
use ostler_api::list::{List, ListParams, WatchLine};
use ostler_api::operation::Operation;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::ask::{Ask, NoFields, ScopeWait};
use crate::extract::{Act, Params};
use crate::lines::list_or_watch;
use crate::openapi::Problems;
use crate::problem::Failure;
use crate::wait;

pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(operation_list))
        .routes(routes!(operation_show))
        .routes(routes!(operation_cancel))
}

/// List or watch operations
///
/// `watch=true` streams lines of `WatchLine` (`application/jsonl`).
#[utoipa::path(get, path = "/v1/operations", tag = "operations", params(ListParams), responses(
    (status = 200, description = "A page, or the watch",
        content((List<Operation> = "application/json"), (WatchLine<Operation> = "application/jsonl"))), Problems))]
async fn operation_list(ask: Ask, Params(params): Params<ListParams>) -> Result<Response, Failure> {
    list_or_watch::<Operation>(&ask.app, &ask.caller, &params).await
}

/// Show an operation
#[utoipa::path(get, path = "/v1/operations/{operation}", tag = "operations",
    params(("operation" = String, Path, description = "Id"), ScopeWait), responses(
    (status = 200, body = Operation, headers(("ETag" = String, description = "Its revision"))), Problems))]
async fn operation_show(
    ask: Ask,
    Path(operation): Path<String>,
    Params(query): Params<ScopeWait>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Operation>()?;
    let operation = ask.cloud().get::<Operation>(&ask.caller, query.project(), &operation)?;
    wait::resource(&ask.app, &ask.caller, operation, wait).await
}

/// Cancel an operation
///
/// It ends as `cancelled` once what it did is undone. One that has ended stays as it is. Errors: `conflict` when it cannot
/// be cancelled.
#[utoipa::path(post, path = "/v1/operations/{operation}/cancel", tag = "operations",
    params(("operation" = String, Path, description = "Id"), ScopeWait), request_body = NoFields, responses(
    (status = 200, body = Operation), Problems))]
async fn operation_cancel(
    ask: Ask,
    Path(operation): Path<String>,
    Params(query): Params<ScopeWait>,
    _body: Act<NoFields>,
) -> Result<Response, Failure> {
    let wait = query.wait::<Operation>()?;
    let operation = ask.cloud().operation_cancel(&ask.caller, query.project(), &operation).await?;
    wait::resource(&ask.app, &ask.caller, operation, wait).await
}
