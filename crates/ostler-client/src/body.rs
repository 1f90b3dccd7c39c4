//! Bodies of requests and answers: one boxed type, whichever transport carries it.

use std::io;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Incoming;
use tokio::io::AsyncRead;
use tokio_util::io::ReaderStream;

/// Whatever broke a body. A struct and no bare box, since futures that hold one could not be spawned.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct BodyError(Box<dyn std::error::Error + Send + Sync>);

impl BodyError {
    pub fn new(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self(error.into())
    }
}

pub type Body = UnsyncBoxBody<Bytes, BodyError>;

/// Pieces that a file or pipe is read in.
const READ_SIZE: usize = 256 * 1024;

pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

pub fn stream(chunks: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Body {
    BodyExt::boxed_unsync(StreamBody::new(chunks.map_ok(Frame::data).map_err(BodyError::new)))
}

pub fn reader(from: impl AsyncRead + Send + 'static) -> Body {
    stream(ReaderStream::with_capacity(from, READ_SIZE))
}

/// What hyper received.
pub fn incoming(body: Incoming) -> Body {
    body.map_err(BodyError::new).boxed_unsync()
}

/// Any other body, such as a server's.
pub fn boxed<B>(body: B) -> Body
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    body.map_err(BodyError::new).boxed_unsync()
}
