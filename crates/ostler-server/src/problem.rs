//! Errors as the client sees them: always an RFC 9457 document, whoever made the error.
//!
//! A handler's error travels in the response's extensions as a [`Failure`]; [`finish`] makes the document of it where the
//! request's id is known. Answers of axum itself (no such route, wrong method, bad upgrade) become documents there too.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, Method, StatusCode};
use ostler_api::{ApiError, ErrorCode, Problem};

pub(crate) const PROBLEM_JSON: &str = "application/problem+json";

/// Longest detail that goes out, in characters: some of it may be the client's own text.
const DETAIL_MAX: usize = 600;

/// An error on its way out of a handler.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    error: ApiError,
    /// Where HTTP has a more exact status than the code's.
    status: Option<StatusCode>,
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self { error, status: None }
    }
}

impl Failure {
    pub(crate) fn with_status(error: ApiError, status: StatusCode) -> Self {
        Self { error, status: Some(status) }
    }

    fn status(&self) -> StatusCode {
        self.status
            .or_else(|| StatusCode::from_u16(self.error.code.status()).ok())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// Gives every error the same shape; other responses pass untouched.
pub(crate) async fn finish(response: Response, method: &Method, path: &str, request_id: &str) -> Response {
    let status = response.status();
    if !status.is_client_error() && !status.is_server_error() {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    let error = match parts.extensions.remove::<Failure>() {
        Some(failure) => failure.error,
        None => {
            // Axum's own words are short and at hand. A server error's are not for clients.
            let text = axum::body::to_bytes(body, 4096).await.unwrap_or_default();
            from_status(status, method, path, &String::from_utf8_lossy(&text))
        }
    };
    log(&error, request_id);
    let mut problem = error.problem(Some(request_id.to_owned()));
    problem.status = status.as_u16();
    bound(&mut problem);
    let body = serde_json::to_vec(&problem).unwrap_or_default();
    parts.headers.remove(CONTENT_LENGTH);
    parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
    match error.code {
        ErrorCode::Unauthenticated => {
            parts.headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        ErrorCode::Unavailable => {
            parts.headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        _ => {}
    }
    Response::from_parts(parts, Body::from(body))
}

fn bound(problem: &mut Problem) {
    if let Some((at, _)) = problem.detail.char_indices().nth(DETAIL_MAX) {
        problem.detail.truncate(at);
        problem.detail.push('…');
    }
}

fn log(error: &ApiError, request_id: &str) {
    let internal = error.internal.as_deref();
    match (error.code, internal) {
        (ErrorCode::Internal, _) => {
            tracing::error!(
                request_id,
                internal = internal.unwrap_or(""),
                detail = error.detail,
                "request failed"
            );
        }
        (code, Some(internal)) => {
            tracing::warn!(request_id, %code, internal, detail = error.detail, "request failed");
        }
        (code, None) => tracing::debug!(request_id, %code, detail = error.detail, "request refused"),
    }
}

/// An error for an answer that carries only a status.
fn from_status(status: StatusCode, method: &Method, path: &str, text: &str) -> ApiError {
    let path: String = path.chars().take(200).collect();
    let or = |fallback: &str| if text.is_empty() { fallback.to_owned() } else { text.to_owned() };
    match status {
        StatusCode::NOT_FOUND => {
            ApiError::new(ErrorCode::NotFound, format!("there is no route {method} {path}"))
                .hint("GET /v1/openapi.json describes all routes")
        }
        StatusCode::METHOD_NOT_ALLOWED => {
            ApiError::new(ErrorCode::Invalid, format!("{path} does not take {method}"))
                .hint("the Allow header names what it takes")
        }
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(ErrorCode::TooLarge, or("the body is too large")),
        StatusCode::REQUEST_TIMEOUT => ApiError::new(ErrorCode::TimedOut, or("the request took too long")),
        StatusCode::SERVICE_UNAVAILABLE => {
            ApiError::new(ErrorCode::Unavailable, "the server cannot do this now")
        }
        status if status.is_client_error() => {
            ApiError::new(ErrorCode::Invalid, or("the request is malformed"))
        }
        status => ApiError::internal(format!("{method} {path} answered {status}: {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn problem(response: Response) -> (Response<()>, Problem) {
        let response = finish(response, &Method::GET, "/v1/x", "r-1").await;
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
        (Response::from_parts(parts, ()), serde_json::from_slice(&bytes).unwrap())
    }

    #[tokio::test]
    async fn internal_texts_stay_inside() {
        let error = ApiError::internal("disk /dev/secret failed");
        let (response, problem) = problem(Failure::from(error).into_response()).await;
        assert_eq!(response.status(), 500);
        assert!(!format!("{problem:?}").contains("secret"));
        assert_eq!(problem.request_id.as_deref(), Some("r-1"));
        let (_, problem) = self::problem((StatusCode::INTERNAL_SERVER_ERROR, "secret").into_response()).await;
        assert!(!format!("{problem:?}").contains("secret"));
    }

    #[tokio::test]
    async fn what_axum_answers_becomes_a_document() {
        let (response, problem) = problem(StatusCode::METHOD_NOT_ALLOWED.into_response()).await;
        assert_eq!((response.status().as_u16(), problem.status), (405, 405));
        assert_eq!(response.headers()[CONTENT_TYPE], PROBLEM_JSON);
        let (_, problem) =
            self::problem((StatusCode::BAD_REQUEST, "no upgrade header").into_response()).await;
        assert_eq!(problem.detail, "no upgrade header");
    }

    #[tokio::test]
    async fn details_are_bounded() {
        let error = ApiError::invalid("name", "ä".repeat(10_000));
        let (_, problem) = problem(Failure::from(error).into_response()).await;
        assert_eq!(problem.detail.chars().count(), DETAIL_MAX + 1);
    }
}
