//! The one list of routes: the router, the OpenAPI document and the permission test are all made from it.

#![allow(unused_qualifications, reason = "utoipa's macro writes them")]

mod event;
mod image;
mod node;
mod operation;
mod project;
mod snapshot;
mod system;
mod token;
mod vm;
mod vm_stream;
mod volume;

use axum::middleware::from_fn_with_state;
use ostler_api::Problem;
use utoipa::OpenApi as _;
use utoipa_axum::router::OpenApiRouter;

use crate::app::App;
use crate::openapi::{complete, frame};
use crate::{identity, observe};

#[derive(utoipa::OpenApi)]
#[openapi(components(schemas(Problem)))]
struct Shared;

/// Routes for everybody.
fn public() -> OpenApiRouter<App> {
    system::public()
}

/// Routes that need an identity.
fn protected() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .merge(vm::router())
        .merge(vm_stream::router())
        .merge(image::router())
        .merge(volume::router())
        .merge(snapshot::router())
        .merge(node::router())
        .merge(operation::router())
        .merge(event::router())
        .merge(token::router())
        .merge(project::router())
        .merge(system::protected())
}

/// The OpenAPI document of the API.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = frame();
    document.merge(Shared::openapi());
    document.merge(public().into_openapi());
    document.merge(protected().into_openapi());
    complete(document)
}

/// The document as JSON, as it is served and checked in.
pub fn openapi_json() -> String {
    let mut text = openapi().to_pretty_json().unwrap_or_default();
    text.push('\n');
    text
}

/// The whole router, with every layer.
pub(crate) fn router(app: App) -> axum::Router {
    let (public, _) = public().split_for_parts();
    let (protected, _) = protected().split_for_parts();
    // The layer is on the routes with their fallbacks: a wrong method under a protected path is not answered either.
    let protected = protected.layer(from_fn_with_state(app.clone(), identity::identify));
    public
        .merge(protected)
        .fallback(|| async { http::StatusCode::NOT_FOUND })
        .layer(from_fn_with_state(app.clone(), observe::observe))
        .with_state(app)
}
