//! JSON bodies.

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use bytes::Bytes;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, Method, StatusCode, Uri};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use ostler_api::{ApiError, ErrorCode};
use ostler_control::Idempotency;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::app::App;
use crate::problem::Failure;

const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// A JSON body.
#[derive(Debug)]
pub(crate) struct Json<T>(pub(crate) T);

/// A JSON body of a request that may carry an `Idempotency-Key`.
#[derive(Debug)]
pub(crate) struct Submit<T> {
    pub(crate) body: T,
    pub(crate) idempotency: Option<Idempotency>,
}

/// The same, where no body at all means `{}`.
#[derive(Debug)]
pub(crate) struct Act<T> {
    pub(crate) body: T,
    pub(crate) idempotency: Option<Idempotency>,
}

impl<T: DeserializeOwned> FromRequest<App> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, app: &App) -> Result<Self, Failure> {
        let (parts, body) = request.into_parts();
        content_type(&parts.headers)?;
        let bytes = read(&parts.headers, body, app.limits.body_bytes).await?;
        Ok(Self(parse(&bytes)?))
    }
}

impl<T: DeserializeOwned> FromRequest<App> for Submit<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, app: &App) -> Result<Self, Failure> {
        let (parts, body) = request.into_parts();
        content_type(&parts.headers)?;
        let bytes = read(&parts.headers, body, app.limits.body_bytes).await?;
        let idempotency = idempotency(&parts.headers, &parts.method, &parts.uri, &bytes)?;
        Ok(Self { body: parse(&bytes)?, idempotency })
    }
}

impl<T: DeserializeOwned> FromRequest<App> for Act<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, app: &App) -> Result<Self, Failure> {
        let (parts, body) = request.into_parts();
        let bytes = read(&parts.headers, body, app.limits.body_bytes).await?;
        let idempotency = idempotency(&parts.headers, &parts.method, &parts.uri, &bytes)?;
        let body = if bytes.is_empty() {
            parse(b"{}")?
        } else {
            content_type(&parts.headers)?;
            parse(&bytes)?
        };
        Ok(Self { body, idempotency })
    }
}

/// A form that a web page may send anywhere cannot be JSON, so this is also what keeps such pages out.
fn content_type(headers: &HeaderMap) -> Result<(), Failure> {
    let given = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = given.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    let error = ApiError::new(ErrorCode::Invalid, "the body must be JSON")
        .hint("send it with 'Content-Type: application/json'");
    Err(Failure::with_status(error, StatusCode::UNSUPPORTED_MEDIA_TYPE))
}

async fn read(headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let too_large = || ApiError::new(ErrorCode::TooLarge, format!("a body has at most {limit} bytes"));
    let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.downcast_ref::<LengthLimitError>().is_some() => Err(too_large()),
        Err(error) => Err(ApiError::new(ErrorCode::Invalid, "the body broke off").log(error)),
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        // Of broken JSON the path says only how far the decoder came.
        let about_a_field = error.inner().is_data() && path != "." && path != "?";
        let path = if about_a_field { path.as_str() } else { "" };
        let text = error.inner().to_string();
        let error = ApiError::new(ErrorCode::Invalid, format!("the body is not valid: {text}"));
        ApiError { field: field(path, &text), ..error }
    })?;
    json.end().map_err(|error| {
        ApiError::new(ErrorCode::Invalid, format!("the body has more behind its JSON value: {error}"))
    })?;
    Ok(value)
}

/// The field at fault. Of one that is unknown or missing, the decoder's path may name only the object it should be in.
fn field(path: &str, text: &str) -> Option<String> {
    let named = ["unknown field `", "missing field `", "duplicate field `"]
        .iter()
        .find_map(|start| text.strip_prefix(start)?.split_once('`').map(|(name, _)| name));
    let last = path.rsplit('.').next().unwrap_or("");
    match named {
        Some(name) if last != name && path.is_empty() => Some(name.to_owned()),
        Some(name) if last != name => Some(format!("{path}.{name}")),
        Some(_) | None => (!path.is_empty()).then(|| path.to_owned()),
    }
}

/// The key, with a digest of what it stands for.
///
/// `wait` and `timeout` are left out of the digest: how long the answer is waited for does not change what is done.
fn idempotency(
    headers: &HeaderMap,
    method: &Method,
    uri: &Uri,
    body: &[u8],
) -> Result<Option<Idempotency>, ApiError> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    let key = value.as_bytes();
    if !(1..=128).contains(&key.len()) || !key.iter().all(u8::is_ascii_graphic) {
        let error = ApiError::new(ErrorCode::Invalid, "Idempotency-Key is 1-128 visible ASCII characters");
        return Err(error.hint("a fresh UUID is a good key"));
    }
    let mut digest = Sha256::new();
    for part in [method.as_str(), uri.path()] {
        digest.update(part);
        digest.update([0]);
    }
    for pair in uri.query().unwrap_or("").split('&').filter(|pair| !crate::wait::is_wait_parameter(pair)) {
        digest.update(pair);
        digest.update([0]);
    }
    digest.update([0]);
    digest.update(body);
    Ok(Some(Idempotency {
        key: String::from_utf8_lossy(key).into_owned(),
        fingerprint: digest.finalize().into(),
    }))
}

#[cfg(test)]
mod tests {
    use ostler_api::vm::VmCreate;

    use super::*;

    fn fault(body: &str) -> (String, String) {
        let error = parse::<VmCreate>(body.as_bytes()).unwrap_err();
        (error.field.unwrap_or_default(), error.detail)
    }

    #[test]
    fn errors_name_the_field() {
        for (body, field) in [
            (r#"{"name":"a","colour":1}"#, "colour"),
            (r#"{"cpus":1}"#, "name"),
            (r#"{"name":"a","cpus":"many"}"#, "cpus"),
            (r#"{"name":"a","cpus":-1}"#, "cpus"),
            (r#"{"name":"A B"}"#, "name"),
            (r#"{"name":"a","publish":[{"host_port":1}]}"#, "publish[0].guest_port"),
            (r#"{"name":"a","publish":[{"host_port":1,"guest_port":70000}]}"#, "publish[0].guest_port"),
            (r#"{"name":"a","publish":[{"host_port":1,"guest_port":1,"x":2}]}"#, "publish[0].x"),
            (r#"{"name":"a","name":"b"}"#, "name"),
            (r#"{"name":"a""#, ""),
            ("", ""),
            ("[]", ""),
        ] {
            let (found, detail) = fault(body);
            assert_eq!(found, field, "{body}: {detail}");
        }
        assert!(fault(r#"{"name":"a"} {}"#).1.contains("more behind"));
        assert!(parse::<VmCreate>(&[b'['; 100_000]).is_err());
    }

    #[test]
    fn the_digest_is_of_what_is_asked() {
        let make = |key: &str, uri: &str, body: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(IDEMPOTENCY_KEY, key.parse().unwrap());
            idempotency(&headers, &Method::POST, &uri.parse().unwrap(), body.as_bytes())
        };
        let print = |uri, body| make("k", uri, body).unwrap().unwrap().fingerprint;
        let first = print("/v1/vms?project=a", "{}");
        assert_eq!(first, print("/v1/vms?project=a&wait=running&timeout=5", "{}"));
        assert_ne!(first, print("/v1/vms?project=b", "{}"));
        assert_ne!(first, print("/v1/vms?project=a", "{ }"));
        assert_ne!(first, print("/v1/images?project=a", "{}"));
        assert!(make("", "/", "").is_err());
        assert!(make("a b", "/", "").is_err());
        assert!(make(&"k".repeat(129), "/", "").is_err());
    }
}
