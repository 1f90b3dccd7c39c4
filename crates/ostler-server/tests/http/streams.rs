//! Consoles and logs: a user's end joined to an agent's.

use std::sync::Arc;

use futures::{SinkExt, StreamExt};
use http::Method;
use serde_json::{Value, json};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::support::{Io, PATIENCE, Site, Via, until};

type Socket = WebSocketStream<Box<dyn Io>>;

/// Who asks: nobody in particular, or the holder of a token; from a page of some origin.
#[derive(Default, Clone)]
struct Who {
    token: Option<String>,
    origin: Option<&'static str>,
}

impl Who {
    fn token(token: &str) -> Self {
        Self { token: Some(token.to_owned()), origin: None }
    }
}

async fn socket(site: &Site, via: Via, path: &str, who: Who) -> Result<Socket, Error> {
    let mut request = format!("ws://localhost{path}").into_client_request().unwrap();
    if let Some(token) = who.token {
        request.headers_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    if let Some(origin) = who.origin {
        request.headers_mut().insert("origin", origin.parse().unwrap());
    }
    let io = site.connect(via).await;
    let handshake = tokio_tungstenite::client_async(request, io);
    let (socket, _) = tokio::time::timeout(PATIENCE, handshake).await.expect("an answer in time")?;
    Ok(socket)
}

/// The refusal of a handshake.
async fn refused(site: &Site, via: Via, path: &str, who: Who) -> u16 {
    match socket(site, via, path, who).await {
        Err(Error::Http(response)) => response.status().as_u16(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("{path} was opened"),
    }
}

async fn next(socket: &mut Socket) -> Option<Message> {
    loop {
        match tokio::time::timeout(PATIENCE, socket.next()).await.expect("a message in time")? {
            Ok(Message::Ping(_) | Message::Pong(_)) => {}
            Ok(message) => return Some(message),
            Err(_) => return None,
        }
    }
}

/// A VM that is placed on node n1, whose agent reads its work.
struct Placed {
    site: Arc<Site>,
    agent: String,
    requests: tokio::sync::mpsc::Receiver<Value>,
}

async fn placed() -> Placed {
    let site = Arc::new(Site::start().await);
    site.node("n1").await;
    site.image("base").await;
    let agent = site.token(json!({"name": "agent", "role": "node", "node": "n1"})).await;
    let work = site.get("/v1/nodes/n1/work").via(Via::Plain).token(&agent).open().await;
    let (sender, requests) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        let mut body = http_body_util::BodyExt::into_data_stream(work.into_body());
        let mut buffer = Vec::new();
        while let Some(Ok(chunk)) = body.next().await {
            buffer.extend_from_slice(&chunk);
            while let Some(at) = buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=at).collect();
                let line: Value = serde_json::from_slice(&line).unwrap();
                if line["type"] == "stream" && sender.send(line["stream"].clone()).await.is_err() {
                    return;
                }
            }
        }
    });
    let created = site.post("/v1/vms", &json!({"name": "web", "image": "base"})).send().await;
    assert_eq!(created.status, 201, "{}", created.text());
    until("a node for the VM", || async {
        let vm = site.get("/v1/vms/web").send().await.json();
        vm["status"]["node"].is_string().then_some(())
    })
    .await;
    Placed { site, agent, requests }
}

impl Placed {
    async fn request(&mut self) -> (Value, String) {
        let request = tokio::time::timeout(PATIENCE, self.requests.recv()).await.unwrap().unwrap();
        let path = format!("/v1/nodes/n1/streams/{}", request["id"].as_str().unwrap());
        (request, path)
    }

    /// What the agent was asked, the user's socket, and the agent's.
    async fn open(&mut self, via: Via, path: &'static str, who: Who) -> (Value, Socket, Socket) {
        let site = Arc::clone(&self.site);
        // The two ends wait for each other.
        let user = tokio::spawn(async move { socket(&site, via, path, who).await });
        let (request, path) = self.request().await;
        let agent = socket(&self.site, Via::Plain, &path, Who::token(&self.agent)).await.unwrap();
        // The id is good once.
        assert_eq!(refused(&self.site, Via::Plain, &path, Who::token(&self.agent)).await, 404);
        (request, user.await.unwrap().unwrap(), agent)
    }
}

#[tokio::test]
async fn a_console_carries_bytes_both_ways() {
    let mut placed = placed().await;
    let token = placed.site.token(json!({"name": "u", "role": "member", "project": "default"})).await;
    let path = "/v1/vms/web/console?scrollback=100";
    let (request, mut user, mut agent) = placed.open(Via::Tls, path, Who::token(&token)).await;
    assert_eq!((&request["stream"], &request["scrollback"]), (&json!("console"), &json!(100)));
    user.send(Message::Binary("ls\n".into())).await.unwrap();
    assert_eq!(next(&mut agent).await, Some(Message::Binary("ls\n".into())));
    user.send(Message::text("text is bytes too")).await.unwrap();
    assert_eq!(next(&mut agent).await, Some(Message::Binary("text is bytes too".into())));
    agent.close(None).await.unwrap();
    assert!(matches!(next(&mut user).await, Some(Message::Close(_)) | None));
    placed.site.stop().await;
}

#[tokio::test]
async fn more_than_the_buffers_hold_goes_both_ways_at_once() {
    const CHUNKS: usize = 200;
    let mut placed = placed().await;
    let (_, user, agent) = placed.open(Via::Unix, "/v1/vms/web/vnc", Who::default()).await;
    let ends = [user, agent].map(|socket| {
        let (mut sender, mut receiver) = socket.split();
        let send = async move {
            for _ in 0..CHUNKS {
                sender.send(Message::Binary(vec![7; 10_000].into())).await.unwrap();
            }
            sender
        };
        let receive = async move {
            let mut bytes = 0;
            while bytes < CHUNKS * 10_000 {
                if let Message::Binary(chunk) = receiver.next().await.unwrap().unwrap() {
                    bytes += chunk.len();
                }
            }
            bytes
        };
        futures::future::join(send, receive)
    });
    let done = tokio::time::timeout(PATIENCE, futures::future::join_all(ends)).await.expect("all in time");
    assert!(done.iter().all(|(_, bytes)| *bytes == CHUNKS * 10_000));
    placed.site.stop().await;
}

#[tokio::test]
async fn a_log_streams_until_its_end() {
    let mut placed = placed().await;
    let site = Arc::clone(&placed.site);
    let open = tokio::spawn(async move { site.get("/v1/vms/web/log?tail=10&follow=true").open().await });
    let (request, path) = placed.request().await;
    assert_eq!((&request["tail"], &request["follow"]), (&json!(10), &json!(true)));
    let mut agent = socket(&placed.site, Via::Plain, &path, Who::token(&placed.agent)).await.unwrap();
    let answer = open.await.unwrap();
    assert_eq!(answer.status(), 200);
    agent.send(Message::Binary("booting\n".into())).await.unwrap();
    agent.send(Message::Binary("login: ".into())).await.unwrap();
    agent.close(None).await.unwrap();
    let body = http_body_util::BodyExt::collect(answer.into_body());
    let body = tokio::time::timeout(PATIENCE, body).await.unwrap().unwrap().to_bytes();
    assert_eq!(body, "booting\nlogin: ");
    placed.site.stop().await;
}

#[tokio::test]
async fn stopping_closes_sockets() {
    let mut placed = placed().await;
    let (_, mut user, mut agent) = placed.open(Via::Unix, "/v1/vms/web/vnc", Who::default()).await;
    placed.site.shutdown.cancel();
    for socket in [&mut user, &mut agent] {
        let last = next(socket).await;
        assert!(
            matches!(&last, Some(Message::Close(Some(frame))) if u16::from(frame.code) == 1001),
            "{last:?}"
        );
    }
    placed.site.stop().await;
}

#[tokio::test]
async fn what_is_no_websocket_or_another_pages_is_refused() {
    let placed = placed().await;
    let site = &placed.site;
    let console = "/v1/vms/web/console";
    let problem = site.get(console).refused(400, "invalid").await;
    assert!(problem.hint.unwrap().contains("WebSocket"));
    let stranger = Who { origin: Some("https://evil.example"), ..Who::default() };
    assert_eq!(refused(site, Via::Unix, console, stranger).await, 403);
    assert_eq!(refused(site, Via::Unix, "/v1/vms/none/console", Who::default()).await, 404);
    assert_eq!(refused(site, Via::Plain, console, Who::default()).await, 401);
    // A reader may read the log and must not have the console.
    let reader = site.token(json!({"name": "r", "role": "reader", "project": "default"})).await;
    assert_eq!(refused(site, Via::Plain, console, Who::token(&reader)).await, 403);
    site.ask(Method::POST, console).refused(405, "invalid").await;
    site.stop().await;
}
