//! `/v1/tokens`.

use axum::extract::Path;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use ostler_api::list::{List, ListParams, WatchLine};
use ostler_api::token::{Token, TokenCreate, TokenCreated};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;
use crate::ask::Ask;
use crate::extract::{Json, Params};
use crate::lines::list_or_watch;
use crate::openapi::Problems;
use crate::problem::Failure;
use crate::wait::single;

pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(token_list, token_create)).routes(routes!(token_show, token_delete))
}

/// List or watch tokens
///
/// Their secrets are not kept, so nobody can read them. `watch=true` streams lines of `WatchLine` (`application/jsonl`).
#[utoipa::path(get, path = "/v1/tokens", tag = "tokens", params(ListParams), responses(
    (status = 200, description = "A page, or the watch",
        content((List<Token> = "application/json"), (WatchLine<Token> = "application/jsonl"))), Problems))]
async fn token_list(ask: Ask, Params(params): Params<ListParams>) -> Result<Response, Failure> {
    list_or_watch::<Token>(&ask.app, &ask.caller, &params).await
}

/// Create a token
///
/// The answer is the only place where its secret is shown, so an idempotency key has no use here. Errors:
/// `already_exists` when the name is taken, `invalid` when role, project and node do not go together.
#[utoipa::path(post, path = "/v1/tokens", tag = "tokens", request_body = TokenCreate, responses(
    (status = 201, body = TokenCreated), Problems))]
async fn token_create(ask: Ask, Json(create): Json<TokenCreate>) -> Result<Response, Failure> {
    let created = ask.cloud().token_create(&ask.caller, create).await?;
    Ok((StatusCode::CREATED, axum::Json(created)).into_response())
}

/// Show a token
#[utoipa::path(get, path = "/v1/tokens/{token}", tag = "tokens",
    params(("token" = String, Path, description = "Name or id")), responses(
    (status = 200, body = Token, headers(("ETag" = String, description = "Its revision"))), Problems))]
async fn token_show(ask: Ask, Path(token): Path<String>) -> Result<Response, Failure> {
    Ok(single(ask.cloud().get::<Token>(&ask.caller, None, &token)?.as_ref()))
}

/// Revoke a token
///
/// It opens nothing from now on; streams that it opened end within seconds.
#[utoipa::path(delete, path = "/v1/tokens/{token}", tag = "tokens",
    params(("token" = String, Path, description = "Name or id")), responses(
    (status = 204, description = "Revoked"), Problems))]
async fn token_delete(ask: Ask, Path(token): Path<String>) -> Result<StatusCode, Failure> {
    ask.cloud().token_delete(&ask.caller, &token).await?;
    Ok(StatusCode::NO_CONTENT)
}
