//! A stream of JSON lines: watches and a node's work.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use crate::body::Body;
use crate::client::Shared;
use crate::{ClientError, Result};

/// Longest line that is taken.
const LINE_MAX: usize = 8 << 20;

/// Lines of a stream, parsed as they come. It ends when the server or the connection does; the caller connects again.
pub struct Lines<T> {
    shared: Arc<Shared>,
    body: Body,
    buffer: BytesMut,
    /// Bytes of `buffer` that were searched and have no end of line.
    searched: usize,
    idle: Duration,
    what: &'static str,
    line: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> Lines<T> {
    pub(crate) fn new(shared: Arc<Shared>, body: Body, what: &'static str) -> Self {
        let idle = shared.options.stream_idle;
        Self { shared, body, buffer: BytesMut::new(), searched: 0, idle, what, line: PhantomData }
    }

    /// The next line; `None` at the end. Dropping the future loses nothing, so it may stand in a `select!`.
    ///
    /// # Errors
    /// The connection breaks, is silent for too long, or sends what is not understood.
    pub async fn next(&mut self) -> Result<Option<T>> {
        loop {
            if let Some(line) = self.line()? {
                return Ok(Some(line));
            }
            let frame = tokio::time::timeout(self.idle, self.body.frame()).await.map_err(|_| {
                ClientError::Timeout { what: format!("the next line of {}", self.what), after: self.idle }
            })?;
            match frame {
                None if self.buffer.iter().all(u8::is_ascii_whitespace) => return Ok(None),
                None => return Err(self.shared.link.broken(format!("{} ended within a line", self.what))),
                Some(Err(error)) => return Err(self.shared.link.broken(error)),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }

    fn line(&mut self) -> Result<Option<T>> {
        while let Some(at) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
            let line = self.buffer.split_to(self.searched + at);
            self.buffer.advance(1);
            self.searched = 0;
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return serde_json::from_slice(&line).map(Some).map_err(|e| {
                ClientError::Protocol(format!("a line of {} is not understood: {e}", self.what))
            });
        }
        self.searched = self.buffer.len();
        if self.searched > LINE_MAX {
            return Err(ClientError::Protocol(format!(
                "a line of {} is longer than {LINE_MAX} bytes",
                self.what
            )));
        }
        Ok(None)
    }
}
