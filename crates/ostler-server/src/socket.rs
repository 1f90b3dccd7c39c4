//! WebSockets that carry bytes: joins one to the end of a stream.
//!
//! What always holds: a web page of another origin gets no WebSocket; a socket ends when its stream does, when the
//! server stops, and within seconds when its token is revoked.

use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::{HeaderMap, StatusCode, Uri};
use ostler_api::{ApiError, ErrorCode};
use ostler_control::{Caller, StreamEnd};
use tokio::time::MissedTickBehavior;

use crate::app::App;
use crate::identity::still_valid;
use crate::listen::Held;
use crate::problem::Failure;

const MESSAGE_MAX: usize = 1 << 20;
const BUFFER: usize = 16 * 1024;
/// Keeps the connection alive through what forgets silent ones, and finds dead peers.
const PING: Duration = Duration::from_secs(10);
/// For the last words on a socket.
const FAREWELL: Duration = Duration::from_secs(2);

const STOPPING: &str = "the server is stopping";

/// A request that wants to become a WebSocket.
pub(crate) struct Upgrade {
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    held: Option<Held>,
}

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        check_origin(&parts.headers, &parts.uri)?;
        let held = parts.extensions.get::<Held>().cloned();
        // Whether it is one at all is told after permission is: a stranger learns nothing from it.
        let upgrade = <WebSocketUpgrade as FromRequestParts<S>>::from_request_parts(parts, state).await;
        Ok(Self { upgrade, held })
    }
}

impl Upgrade {
    /// Fails when the request cannot become a WebSocket; asked before anything is begun for it.
    pub(crate) fn check(self) -> Result<Ready, Failure> {
        match self.upgrade {
            Ok(upgrade) => Ok(Ready { upgrade: Box::new(upgrade), held: self.held }),
            Err(rejection) => {
                let error = ApiError::new(ErrorCode::Invalid, rejection.body_text())
                    .hint("this route is a WebSocket: send the headers of its handshake");
                Err(Failure::with_status(error, StatusCode::BAD_REQUEST))
            }
        }
    }
}

/// A request that will become a WebSocket.
pub(crate) struct Ready {
    upgrade: Box<WebSocketUpgrade>,
    held: Option<Held>,
}

impl Ready {
    /// Answers with the handshake, and joins socket and stream from then on.
    pub(crate) fn join(self, app: App, caller: Caller, end: StreamEnd) -> Response {
        let Self { upgrade, held } = self;
        // Counted from now on, so that a server that stops waits for it.
        let task = app.shutdown.tasks.token();
        upgrade
            .max_message_size(MESSAGE_MAX)
            .max_frame_size(MESSAGE_MAX)
            .read_buffer_size(BUFFER)
            .write_buffer_size(0)
            .on_upgrade(move |socket| async move {
                splice(socket, end, &app, &caller).await;
                drop((task, held));
            })
            .into_response()
    }
}

/// Browsers send the page's origin; it has to be this server's.
fn check_origin(headers: &HeaderMap, uri: &Uri) -> Result<(), ApiError> {
    let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
    let authority = origin
        .to_str()
        .ok()
        .and_then(|origin| origin.parse::<Uri>().ok())
        .and_then(|uri| uri.authority().cloned());
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).or(uri.authority().map(|a| a.as_str()));
    match (authority, host) {
        (Some(authority), Some(host)) if authority.as_str().eq_ignore_ascii_case(host) => Ok(()),
        (Some(_) | None, Some(_) | None) => {
            Err(ApiError::new(ErrorCode::Forbidden, "pages of another origin may not open this"))
        }
    }
}

async fn splice(socket: WebSocket, end: StreamEnd, app: &App, caller: &Caller) {
    let (mut sink, mut source) = socket.split();
    let StreamEnd { tx, mut rx } = end;

    let inbound = async {
        while let Some(Ok(message)) = source.next().await {
            let bytes: Bytes = match message {
                Message::Binary(bytes) => bytes,
                Message::Text(text) => text.into(),
                Message::Ping(_) | Message::Pong(_) => continue,
                Message::Close(_) => return,
            };
            if tx.send(bytes).await.is_err() {
                // The other end is closed; what it sent before still goes out.
                std::future::pending::<()>().await;
            }
        }
    };
    let outbound = async {
        let mut ticks = tokio::time::interval(PING);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.reset();
        loop {
            let message = tokio::select! {
                chunk = rx.recv() => match chunk {
                    Some(bytes) => Message::Binary(bytes),
                    None if app.shutdown.closing.is_cancelled() => break close(close_code::AWAY, STOPPING),
                    None => break close(close_code::NORMAL, "the stream has ended"),
                },
                _ = ticks.tick() => match still_valid(&app.cloud, caller) {
                    Ok(()) => Message::Ping(Bytes::new()),
                    Err(error) => break close(close_code::POLICY, &error.detail),
                },
                () = app.shutdown.closing.cancelled() => break close(close_code::AWAY, STOPPING),
            };
            if sink.send(message).await.is_err() {
                break None;
            }
        }
    };
    let last = tokio::select! {
        () = inbound => None,
        last = outbound => last,
        () = app.shutdown.kill.cancelled() => return,
    };
    let farewell = async {
        if let Some(last) = last {
            sink.send(last).await?;
        }
        sink.close().await
    };
    // Nobody is owed a farewell: the stream has ended either way.
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
}

fn close(code: u16, reason: &str) -> Option<Message> {
    Some(Message::Close(Some(CloseFrame { code, reason: reason.into() })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_of_this_server() {
        let check = |origin: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, "cloud.example:7443".parse().unwrap());
            origin.map(|origin| headers.insert(ORIGIN, origin.parse().unwrap()));
            check_origin(&headers, &Uri::from_static("/v1/vms/a/console")).is_ok()
        };
        assert!(check(None));
        assert!(check(Some("https://cloud.example:7443")));
        for bad in [
            "https://evil.example",
            "https://cloud.example",
            "null",
            "",
            "https://cloud.example:7443.evil.example",
        ] {
            assert!(!check(Some(bad)), "{bad}");
        }
    }
}
