//! Files as answers: whole, or one range of bytes (RFC 9110, one range only).

use std::io::{self, SeekFrom};

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_RANGE, RANGE};
use http::{HeaderMap, HeaderValue, StatusCode};
use ostler_api::{ApiError, ErrorCode};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use crate::problem::Failure;

/// Bytes read at once: large, since each read goes to another thread.
const CHUNK: usize = 256 * 1024;

/// A file to be sent.
#[derive(Debug)]
pub(crate) struct Sending {
    pub(crate) file: File,
    pub(crate) size: u64,
    /// Names the content, so that a range of another content is not taken for one of this.
    pub(crate) tag: String,
}

/// Which bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Whole,
    /// From, and how many (at least one).
    Some(u64, u64),
    Unsatisfiable,
}

/// Sends a file, or the part of it that `Range` asks for.
pub(crate) async fn send_file(headers: &HeaderMap, sending: Sending) -> Result<Response, Failure> {
    let Sending { mut file, size, tag } = sending;
    let etag = HeaderValue::try_from(format!("\"{tag}\"")).map_err(ApiError::internal)?;
    let same = headers.get(IF_RANGE).is_none_or(|wanted| *wanted == etag);
    let range = headers.get(RANGE).and_then(|value| value.to_str().ok()).filter(|_| same);
    let (status, from, len) = match range.map_or(Part::Whole, |range| part(range, size)) {
        Part::Whole => (StatusCode::OK, 0, size),
        Part::Some(from, len) => (StatusCode::PARTIAL_CONTENT, from, len),
        Part::Unsatisfiable => return Ok(unsatisfiable(size)),
    };
    if from > 0 {
        file.seek(SeekFrom::Start(from)).await.map_err(read_error)?;
    }
    let body = Body::from_stream(ReaderStream::with_capacity(file.take(len), CHUNK));
    let mut response = (status, body).into_response();
    let out = response.headers_mut();
    out.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    out.insert(CONTENT_LENGTH, len.into());
    out.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    out.insert(ETAG, etag);
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {from}-{}/{size}", from + len - 1);
        out.insert(CONTENT_RANGE, HeaderValue::try_from(range).map_err(ApiError::internal)?);
    }
    Ok(response)
}

pub(crate) fn read_error(error: io::Error) -> ApiError {
    ApiError::internal(format!("a file that should be there cannot be read: {error}"))
}

fn unsatisfiable(size: u64) -> Response {
    let error =
        ApiError::new(ErrorCode::Invalid, format!("the range is outside of the {size} bytes there are"));
    let mut response = Failure::with_status(error, StatusCode::RANGE_NOT_SATISFIABLE).into_response();
    if let Ok(value) = HeaderValue::try_from(format!("bytes */{size}")) {
        response.headers_mut().insert(CONTENT_RANGE, value);
    }
    response
}

/// What is not understood, and several ranges, mean the whole, as the standard allows.
fn part(range: &str, size: u64) -> Part {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let Some((first, last)) = range.trim().strip_prefix("bytes=").and_then(|spec| spec.split_once('-'))
    else {
        return Part::Whole;
    };
    if !digits(first) || !digits(last) {
        return Part::Whole;
    }
    match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), _) if first >= size => Part::Unsatisfiable,
        (Ok(first), Ok(last)) if last < first => Part::Whole,
        (Ok(first), Ok(last)) => Part::Some(first, last.min(size - 1) - first + 1),
        (Ok(first), Err(_)) if last.is_empty() => Part::Some(first, size - first),
        (Err(_), Ok(0)) if first.is_empty() => Part::Unsatisfiable,
        (Err(_), Ok(_)) if first.is_empty() && size == 0 => Part::Unsatisfiable,
        (Err(_), Ok(count)) if first.is_empty() => Part::Some(size.saturating_sub(count), count.min(size)),
        (Ok(_) | Err(_), Ok(_) | Err(_)) => Part::Whole,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges() {
        for (range, size, wanted) in [
            ("bytes=0-", 10, Part::Some(0, 10)),
            ("bytes=0-0", 10, Part::Some(0, 1)),
            ("bytes=3-5", 10, Part::Some(3, 3)),
            ("bytes=3-99", 10, Part::Some(3, 7)),
            ("bytes=-4", 10, Part::Some(6, 4)),
            ("bytes=-99", 10, Part::Some(0, 10)),
            ("bytes=10-", 10, Part::Unsatisfiable),
            ("bytes=-0", 10, Part::Unsatisfiable),
            ("bytes=0-", 0, Part::Unsatisfiable),
            ("bytes=5-3", 10, Part::Whole),
            ("bytes=0-1,3-4", 10, Part::Whole),
            ("lines=0-1", 10, Part::Whole),
            ("bytes=-", 10, Part::Whole),
            ("bytes=+1-2", 10, Part::Whole),
            ("bytes=99999999999999999999-", 10, Part::Whole),
        ] {
            assert_eq!(part(range, size), wanted, "{range} of {size}");
        }
    }

    proptest! {
        #[test]
        fn a_part_is_always_inside(range in "bytes=[0-9]{0,4}-[0-9]{0,4}", size in 0u64..2000) {
            if let Part::Some(from, len) = part(&range, size) {
                prop_assert!(len > 0 && from + len <= size);
            }
        }
    }

    #[tokio::test]
    async fn sends_what_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "0123456789").unwrap();
        for (range, if_range, status, body) in [
            (None, None, 200, "0123456789"),
            (Some("bytes=4-"), None, 206, "456789"),
            (Some("bytes=4-5"), Some("\"abc\""), 206, "45"),
            (Some("bytes=4-5"), Some("\"other\""), 200, "0123456789"),
        ] {
            let mut headers = HeaderMap::new();
            range.map(|range| headers.insert(RANGE, HeaderValue::from_static(range)));
            if_range.map(|tag| headers.insert(IF_RANGE, HeaderValue::from_static(tag)));
            let sending = Sending { file: File::open(&path).await.unwrap(), size: 10, tag: "abc".to_owned() };
            let response = send_file(&headers, sending).await.unwrap();
            assert_eq!(response.status().as_u16(), status);
            assert_eq!(response.headers()[CONTENT_LENGTH], body.len().to_string());
            let bytes = axum::body::to_bytes(response.into_body(), 100).await.unwrap();
            assert_eq!(bytes, body);
        }
    }
}
