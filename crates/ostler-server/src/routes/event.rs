//! `/v1/events`.

use axum::response::Response;
use ostler_api::event::Event;
use ostler_api::list::{List, ListParams, WatchLine};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::ask::Ask;
use crate::extract::Params;
use crate::lines::list_or_watch;
use crate::openapi::Problems;
use crate::problem::Failure;

pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(event_list))
}

/// List or watch events
///
/// `watch=true` streams lines of `WatchLine` (`application/jsonl`).
#[utoipa::path(get, path = "/v1/events", tag = "events", params(ListParams), responses(
    (status = 200, description = "A page, or the watch",
        content((List<Event> = "application/json"), (WatchLine<Event> = "application/jsonl"))), Problems))]
async fn event_list(ask: Ask, Params(params): Params<ListParams>) -> Result<Response, Failure> {
    list_or_watch::<Event>(&ask.app, &ask.caller, &params).await
}
