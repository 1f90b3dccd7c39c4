//! `/v1/projects`.

use axum::response::Response;
use ostler_api::list::{List, ListParams, WatchLine};
use ostler_api::project::Project;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::ask::Ask;
use crate::extract::Params;
use crate::lines::list_or_watch;
use crate::openapi::Problems;
use crate::problem::Failure;

pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(project_list))
}

/// List or watch projects
///
/// `watch=true` streams lines of `WatchLine` (`application/jsonl`).
#[utoipa::path(get, path = "/v1/projects", tag = "projects", params(ListParams), responses(
    (status = 200, description = "A page, or the watch",
        content((List<Project> = "application/json"), (WatchLine<Project> = "application/jsonl"))), Problems))]
async fn project_list(ask: Ask, Params(params): Params<ListParams>) -> Result<Response, Failure> {
    list_or_watch::<Project>(&ask.app, &ask.caller, &params).await
}
