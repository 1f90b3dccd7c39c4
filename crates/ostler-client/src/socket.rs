//! A WebSocket that carries bytes: consoles, displays, and the agent's side of both.

use bytes::Bytes;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use http::header::AUTHORIZATION;
use http::uri::Scheme;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::call::{Call, problem};
use crate::dial::Conn;
use crate::{Client, ClientError, Result};

const FRAME_MAX: usize = 1 << 20;

/// Bytes both ways. Frame boundaries mean nothing.
pub struct Socket {
    sender: SocketSender,
    receiver: SocketReceiver,
}

pub struct SocketSender {
    sink: SplitSink<WebSocketStream<Conn>, Message>,
    target: Box<str>,
}

pub struct SocketReceiver {
    stream: SplitStream<WebSocketStream<Conn>>,
    target: Box<str>,
}

impl Socket {
    /// The next bytes; `None` once the other end has closed.
    ///
    /// # Errors
    /// The connection breaks.
    pub async fn recv(&mut self) -> Result<Option<Bytes>> {
        self.receiver.recv().await
    }

    /// # Errors
    /// The connection breaks.
    pub async fn send(&mut self, bytes: Bytes) -> Result<()> {
        self.sender.send(bytes).await
    }

    pub fn split(self) -> (SocketSender, SocketReceiver) {
        (self.sender, self.receiver)
    }
}

impl SocketSender {
    /// # Errors
    /// The connection breaks.
    pub async fn send(&mut self, bytes: Bytes) -> Result<()> {
        self.sink.send(Message::Binary(bytes)).await.map_err(|e| broken(&self.target, e))
    }

    /// Keeps the connection alive through what drops silent ones.
    ///
    /// # Errors
    /// The connection breaks.
    pub async fn ping(&mut self) -> Result<()> {
        self.sink.send(Message::Ping(Bytes::new())).await.map_err(|e| broken(&self.target, e))
    }

    /// Says that nothing more will come.
    ///
    /// # Errors
    /// The connection breaks.
    pub async fn close(&mut self) -> Result<()> {
        match self.sink.send(Message::Close(None)).await {
            Ok(()) | Err(Error::ConnectionClosed | Error::AlreadyClosed) => Ok(()),
            Err(error) => Err(broken(&self.target, error)),
        }
    }
}

impl SocketReceiver {
    /// The next bytes; `None` once the other end has closed. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The connection breaks.
    pub async fn recv(&mut self) -> Result<Option<Bytes>> {
        loop {
            match self.stream.next().await {
                None | Some(Err(Error::ConnectionClosed | Error::AlreadyClosed)) => return Ok(None),
                Some(Ok(Message::Close(_))) => return Ok(None),
                Some(Ok(Message::Binary(bytes))) => return Ok(Some(bytes)),
                Some(Ok(Message::Text(text))) => return Ok(Some(text.into())),
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Err(error)) => return Err(broken(&self.target, error)),
            }
        }
    }
}

fn broken(target: &str, error: Error) -> ClientError {
    ClientError::Broken { target: target.to_owned(), source: Box::new(error) }
}

impl Client {
    pub(crate) async fn socket(&self, call: Call) -> Result<Socket> {
        let link = &self.shared.link;
        let scheme = if link.scheme == Scheme::HTTPS { "wss" } else { "ws" };
        let scheme = Scheme::try_from(scheme).map_err(|e| ClientError::Protocol(e.to_string()))?;
        let uri = self.uri(scheme, &call)?;
        let path = uri.path().to_owned();
        let mut request = uri.into_client_request().map_err(|e| ClientError::Protocol(e.to_string()))?;
        if let Some(value) = &self.shared.authorization {
            request.headers_mut().insert(AUTHORIZATION, value.clone());
        }
        let config =
            WebSocketConfig::default().max_message_size(Some(FRAME_MAX)).max_frame_size(Some(FRAME_MAX));
        let conn = link.connection().await?;
        let after = self.shared.options.request_timeout;
        let shake = tokio_tungstenite::client_async_with_config(request, conn, Some(config));
        let (stream, _answer) = tokio::time::timeout(after, shake)
            .await
            .map_err(|_| ClientError::Timeout { what: format!("opening {path}"), after })?
            .map_err(|error| match error {
                Error::Http(answer) => {
                    let status = answer.status();
                    problem(&path, status, answer.body().as_deref().unwrap_or_default())
                }
                other => link.broken(other),
            })?;
        let target: Box<str> = link.target().into();
        let (sink, stream) = stream.split();
        Ok(Socket {
            sender: SocketSender { sink, target: target.clone() },
            receiver: SocketReceiver { stream, target },
        })
    }
}
