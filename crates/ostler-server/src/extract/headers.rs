//! Conditions on revisions: `ETag: "REV"` out, `If-Match: "REV"` in.

use axum::extract::FromRequestParts;
use http::HeaderValue;
use http::header::IF_MATCH;
use http::request::Parts;
use ostler_api::{ApiError, ErrorCode};

use crate::problem::Failure;

/// The revision that a change is meant for; none when the client does not care (no header, or `*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IfMatch(pub(crate) Option<u64>);

impl<S: Sync> FromRequestParts<S> for IfMatch {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Failure> {
        match parts.headers.get(IF_MATCH) {
            None => Ok(Self(None)),
            Some(value) => Ok(if_match(value)?),
        }
    }
}

fn if_match(value: &HeaderValue) -> Result<IfMatch, ApiError> {
    let text = value.to_str().unwrap_or("").trim();
    if text == "*" {
        return Ok(IfMatch(None));
    }
    let revision = text
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
        .filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|digits| digits.parse().ok());
    match revision {
        Some(revision) => Ok(IfMatch(Some(revision))),
        None => Err(ApiError::new(ErrorCode::Invalid, "If-Match is not a revision in quotes")
            .hint("send back the ETag of the resource as it was read, such as \"42\"")),
    }
}

/// The `ETag` of a revision.
pub(crate) fn etag(revision: u64) -> HeaderValue {
    // Digits in quotes are always a valid header.
    HeaderValue::try_from(format!("\"{revision}\"")).unwrap_or(HeaderValue::from_static("\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_out_comes_in() {
        assert_eq!(if_match(&etag(42)).unwrap(), IfMatch(Some(42)));
        assert_eq!(if_match(&HeaderValue::from_static("*")).unwrap(), IfMatch(None));
        for bad in ["42", "\"x\"", "W/\"42\"", "\"1\", \"2\"", "\"+1\"", "", "\""] {
            assert!(if_match(&HeaderValue::from_str(bad).unwrap()).is_err(), "{bad}");
        }
    }
}
