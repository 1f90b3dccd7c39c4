//! Knows whether a connection has a request in progress, so that one without can be closed after a while.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::watch;

/// The requests in progress of one connection.
#[derive(Debug, Clone)]
pub(crate) struct Activity(Arc<watch::Sender<usize>>);

/// One request in progress, until dropped.
#[derive(Debug)]
pub(crate) struct Busy(Arc<watch::Sender<usize>>);

impl Activity {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::channel(0).0))
    }

    pub(crate) fn enter(&self) -> Busy {
        self.0.send_modify(|n| *n += 1);
        Busy(Arc::clone(&self.0))
    }

    /// Ends once there was no request for `limit`.
    pub(crate) async fn idle(&self, limit: Duration) {
        let mut requests = self.0.subscribe();
        loop {
            // The sender is ours, so neither wait can fail.
            let _ = requests.wait_for(|n| *n == 0).await;
            if tokio::time::timeout(limit, requests.wait_for(|n| *n > 0)).await.is_err() {
                return;
            }
        }
    }
}

impl Busy {
    /// Busy until `body` has been sent.
    pub(crate) fn hold(self, body: Body) -> Body {
        Body::new(BusyBody { body, _busy: self })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

struct BusyBody {
    body: Body,
    _busy: Busy,
}

impl http_body::Body for BusyBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn idle_only_without_requests() {
        let activity = Activity::new();
        let limit = Duration::from_secs(10);
        let busy = activity.enter();
        let body = busy.hold(Body::empty());
        assert!(tokio::time::timeout(limit * 5, activity.idle(limit)).await.is_err());
        drop(body);
        assert!(activity.idle(limit).now_or_never().is_none());
        assert!(tokio::time::timeout(limit * 5, activity.idle(limit)).await.is_ok());
    }
}
