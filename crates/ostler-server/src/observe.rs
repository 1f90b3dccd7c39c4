//! The outermost layer: request ids, panics, the shape of errors, metrics and the access log.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use http::header::{CACHE_CONTROL, X_CONTENT_TYPE_OPTIONS};
use http::{HeaderMap, HeaderName, HeaderValue};
use ostler_api::{ApiError, ErrorCode};
use tracing::Instrument;
use uuid::Uuid;

use crate::app::App;
use crate::identity::{CallerTag, Peer};
use crate::problem::{self, Failure};

pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Routes without a deadline: their clients send or get whole images.
pub(crate) const UNHURRIED: [(&str, &str); 4] = [
    ("PUT", "/v1/images/{image}/upload"),
    ("GET", "/v1/images/{image}/data"),
    ("HEAD", "/v1/images/{image}/data"),
    ("GET", "/v1/nodes/{node}/images/{sha256}"),
];

/// Middleware over everything.
pub(crate) async fn observe(State(app): State<App>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let in_progress = app.metrics.begin();
    let request_id = request_id(request.headers());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    let peer = request.extensions().get::<Peer>().map_or_else(|| "in-process".to_owned(), Peer::to_string);
    let span = tracing::debug_span!("request", id = request_id);

    let work = with_deadline(&app, route, request, next).instrument(span);
    let response = match AssertUnwindSafe(work).catch_unwind().await {
        Ok(response) => response,
        Err(panic) => Failure::from(ApiError::internal(panic_text(panic.as_ref()))).into_response(),
    };
    let mut response = problem::finish(response, &method, &path, &request_id).await;

    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        headers.insert(X_REQUEST_ID, value);
    }
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));

    drop(in_progress);
    let status = response.status().as_u16();
    let elapsed = started.elapsed();
    app.metrics.request(&method, route, status, elapsed);
    let caller = response.extensions().get::<CallerTag>().map_or("-", |tag| tag.0.as_str());
    tracing::debug!(request_id, %method, route, path, status, ms = elapsed.as_millis(), caller, peer, "request");
    response
}

async fn with_deadline(app: &App, route: &str, request: Request, next: Next) -> Response {
    let mut limit = app.limits.request_timeout;
    if UNHURRIED.contains(&(request.method().as_str(), route)) {
        return next.run(request).await;
    }
    if request.uri().query().is_some_and(crate::wait::asks_to_wait) {
        limit += crate::wait::TIMEOUT_MAX;
    }
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let error = ApiError::new(ErrorCode::TimedOut, format!("not done within {} s", limit.as_secs()))
                .hint("it may have been done all the same: look before you try again");
            Failure::from(error).into_response()
        }
    }
}

/// The client's id when it is a modest one, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    headers
        .get(X_REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|text| {
            (1..=64).contains(&text.len())
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.:".contains(c))
        })
        .map_or_else(|| Uuid::now_v7().to_string(), str::to_owned)
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    format!("a handler panicked: {text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_internal_error_and_no_more() {
        use std::sync::Arc;

        use axum::Router;
        use axum::body::Body;
        use axum::routing::get;
        use tower::ServiceExt;

        let dir = tempfile::tempdir().unwrap();
        let images = Arc::new(ostler_storage::ImageStore::open(dir.path()).unwrap());
        let store = Arc::new(ostler_store::MemoryStore::new());
        let cloud =
            ostler_control::Cloud::open(store, images, ostler_control::CloudConfig::default()).await.unwrap();
        let app = App::new(cloud, crate::Limits::default(), bytes::Bytes::new());
        async fn fall_over() -> &'static str {
            if std::hint::black_box(true) {
                panic!("a secret");
            }
            "never"
        }
        let router: Router = Router::new()
            .route("/boom", get(fall_over))
            .layer(axum::middleware::from_fn_with_state(app.clone(), observe));
        for _ in 0..2 {
            let request = Request::builder().uri("/boom").body(Body::empty()).unwrap();
            let response = router.clone().oneshot(request).await.unwrap();
            assert_eq!(response.status(), 500);
            let body = axum::body::to_bytes(response.into_body(), 4096).await.unwrap();
            let problem: ostler_api::Problem = serde_json::from_slice(&body).unwrap();
            assert_eq!(problem.code, ErrorCode::Internal);
            assert!(!String::from_utf8_lossy(&body).contains("secret"));
        }
    }

    #[test]
    fn strange_request_ids_are_replaced() {
        let id = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(X_REQUEST_ID, HeaderValue::from_static(text));
            request_id(&headers)
        };
        assert_eq!(id("abc-1.2:3"), "abc-1.2:3");
        for bad in ["", "a b", "\"x\"", "{}"] {
            assert!(Uuid::parse_str(&id(bad)).is_ok(), "{bad}");
        }
        assert!(Uuid::parse_str(&request_id(&HeaderMap::new())).is_ok());
    }
}
