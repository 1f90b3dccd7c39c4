//! Endless answers: JSON lines, watches with bookmarks.

use std::sync::Arc;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, Stream, StreamExt};
use http::header::CONTENT_TYPE;
use ostler_api::list::{ListParams, WatchLine};
use ostler_control::{Cached, Caller};
use serde::Serialize;
use tokio::time::{Interval, MissedTickBehavior};

use crate::app::App;
use crate::identity::still_valid;
use crate::problem::Failure;

const JSON_LINES: &str = "application/jsonl";
/// Lines that are ready at the same time go out as one chunk.
const LINES_AT_ONCE: usize = 256;

/// Answers with each item as one line of JSON, as soon as it comes.
pub(crate) fn json_lines<T: Serialize + Send + 'static>(
    items: impl Stream<Item = T> + Send + 'static,
) -> Response {
    let chunks = items.ready_chunks(LINES_AT_ONCE).map(|items| -> Result<Bytes, serde_json::Error> {
        let mut out = Vec::with_capacity(items.len() * 512);
        for item in &items {
            serde_json::to_writer(&mut out, item)?;
            out.push(b'\n');
        }
        Ok(out.into())
    });
    ([(CONTENT_TYPE, JSON_LINES)], Body::from_stream(chunks)).into_response()
}

/// A list, or a watch when `watch=true`.
pub(crate) async fn list_or_watch<T: Cached>(
    app: &App,
    caller: &Caller,
    params: &ListParams,
) -> Result<Response, Failure> {
    if params.watch != Some(true) {
        return Ok(axum::Json(app.cloud.list::<T>(caller, params)?).into_response());
    }
    let lines = app.cloud.watch::<T>(caller, params).await?;
    Ok(json_lines(with_bookmarks(app.clone(), caller.clone(), params.from, lines)))
}

/// What a watch knows between two lines.
struct Watching<T> {
    app: App,
    caller: Caller,
    /// None once the last line is out.
    lines: Option<BoxStream<'static, WatchLine<Arc<T>>>>,
    ticks: Interval,
    /// For a watch of the past: everything up to here has been sent. A watch of the present is as far as the cloud is.
    sent: Option<u64>,
}

/// Adds a bookmark for every interval of silence, and ends the watch with one when the server stops.
fn with_bookmarks<T: Cached>(
    app: App,
    caller: Caller,
    from: Option<u64>,
    lines: BoxStream<'static, WatchLine<Arc<T>>>,
) -> impl Stream<Item = WatchLine<Arc<T>>> + Send + 'static {
    let mut ticks = tokio::time::interval(app.limits.bookmark);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.reset();
    let sent = from.map(|from| from.saturating_sub(1));
    stream::unfold(Watching { app, caller, lines: Some(lines), ticks, sent }, |mut watching| async {
        let line = watching.next().await?;
        Some((line, watching))
    })
}

impl<T: Cached> Watching<T> {
    async fn next(&mut self) -> Option<WatchLine<Arc<T>>> {
        let lines = self.lines.as_mut()?;
        let line = tokio::select! {
            line = lines.next() => line,
            _ = self.ticks.tick() => match still_valid(&self.app.cloud, &self.caller) {
                Ok(()) => self.line_or_bookmark(),
                Err(error) => Some(WatchLine::Error { problem: error.problem(None) }),
            },
            () = self.app.shutdown.closing.cancelled() => {
                let last = self.line_or_bookmark();
                if matches!(last, Some(WatchLine::Bookmark { .. })) {
                    self.lines = None;
                }
                last
            }
        };
        if let (Some(sent), Some(WatchLine::Added { object } | WatchLine::Modified { object })) =
            (&mut self.sent, &line)
        {
            *sent = (*sent).max(object.metadata().revision);
        }
        if matches!(line, None | Some(WatchLine::Error { .. })) {
            self.lines = None;
        }
        line
    }

    /// A line that is ready, else a bookmark: only when nothing is left to send is everything sent.
    fn line_or_bookmark(&mut self) -> Option<WatchLine<Arc<T>>> {
        let lines = self.lines.as_mut()?;
        // Read before the lines are.
        let now = self.app.cloud.revision();
        // Without a budget, so that "not ready" means that there is nothing.
        match tokio::task::unconstrained(lines.next()).now_or_never() {
            Some(line) => line,
            None => Some(WatchLine::Bookmark { revision: self.sent.unwrap_or(now) }),
        }
    }
}
