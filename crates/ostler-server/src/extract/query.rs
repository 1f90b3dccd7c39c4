//! Query strings.

use axum::extract::FromRequestParts;
use http::request::Parts;
use ostler_api::{ApiError, ErrorCode};
use serde::de::DeserializeOwned;

use crate::problem::Failure;

/// A query string, decoded strictly.
#[derive(Debug)]
pub(crate) struct Params<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Failure> {
        match axum::extract::Query::try_from_uri(&parts.uri) {
            Ok(axum::extract::Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(explain(&rejection.body_text()).into()),
        }
    }
}

/// Axum says `Failed to deserialize query string: FIELD: WHY`, or without the field.
fn explain(text: &str) -> ApiError {
    let why = text.split_once("query string: ").map_or(text, |(_, why)| why);
    let unknown =
        why.split_once("unknown field `").and_then(|(_, rest)| rest.split_once('`')).map(|(name, _)| name);
    let field = unknown.or_else(|| {
        why.split_once(": ").map(|(field, _)| field).filter(|field| !field.is_empty() && !field.contains(' '))
    });
    let error = ApiError::new(ErrorCode::Invalid, format!("the query is not valid: {why}"));
    ApiError { field: field.map(str::to_owned), ..error }
}

#[cfg(test)]
mod tests {
    use ostler_api::list::ListParams;

    use super::*;

    async fn list(query: &str) -> Result<ListParams, ApiError> {
        let uri: http::Uri = format!("/v1/vms?{query}").parse().unwrap();
        match axum::extract::Query::try_from_uri(&uri) {
            Ok(axum::extract::Query(value)) => Ok(value),
            Err(rejection) => Err(explain(&rejection.body_text())),
        }
    }

    #[tokio::test]
    async fn errors_name_the_parameter() {
        let good = list("limit=5&label=a%3Db&watch=true").await.unwrap();
        assert_eq!((good.limit, good.label.as_deref(), good.watch), (Some(5), Some("a=b"), Some(true)));
        for (query, field) in
            [("limit=x", "limit"), ("watch=yes", "watch"), ("colour=red", "colour"), ("from=-1", "from")]
        {
            let error = list(query).await.unwrap_err();
            assert_eq!(error.field.as_deref(), Some(field), "{}", error.detail);
        }
    }
}
