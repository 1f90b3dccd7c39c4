//! One connection to QEMU's monitor.
//!
//! A task owns the socket, so a caller that goes away in the middle of a command never leaves half a message behind.
//! Commands may be submitted without waiting for the one before; QEMU answers in order. The task ends when the socket
//! closes, when the peer breaks the protocol, or when every [`Connection`] is dropped.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::commands::{Command, QmpCapabilities};
use super::log::{Direction, TrafficLog};
use super::wire::{Decoder, Message};
use crate::error::QmpError;
use crate::text::clean;

/// Commands without an answer yet, before new ones are refused.
const MAX_WAITING: usize = 512;
/// Of QEMU's error text.
const MAX_DESC: usize = 2048;

/// Called for each event, in order, on the connection's task: it must not block.
pub type EventSink = Box<dyn Fn(&str, &Value) + Send + Sync>;

#[derive(Debug, Clone)]
pub struct Connection {
    requests: mpsc::Sender<Request>,
    next_id: Arc<AtomicU64>,
    closed: Arc<AtomicBool>,
    timeout: Duration,
}

struct Request {
    id: u64,
    bytes: Vec<u8>,
    fd: Option<Arc<OwnedFd>>,
    reply: oneshot::Sender<Result<Value, Refusal>>,
}

/// Why a command has no value.
#[derive(Debug)]
enum Refusal {
    Closed,
    Protocol(String),
    Error { class: String, desc: String },
}

/// A command that was submitted. Dropping it gives up the answer, not the command.
#[must_use = "the answer tells whether the command worked"]
#[derive(Debug)]
pub struct Pending<C> {
    reply: Result<oneshot::Receiver<Result<Value, Refusal>>, QmpError>,
    timeout: Duration,
    command: PhantomData<fn() -> C>,
}

impl Connection {
    /// Takes over a connected socket and negotiates. The returned answer says when QEMU listens; commands may be
    /// submitted before.
    pub fn open(
        stream: UnixStream,
        events: EventSink,
        log: TrafficLog,
        timeout: Duration,
    ) -> (Self, Pending<QmpCapabilities>) {
        let (requests, inbox) = mpsc::channel(MAX_WAITING);
        let closed = Arc::new(AtomicBool::new(false));
        let task = Task {
            stream,
            inbox,
            inbox_open: true,
            unsent: VecDeque::new(),
            handing_over: None,
            waiting: HashMap::new(),
            decoder: Decoder::default(),
            events,
            log,
        };
        let task_closed = Arc::clone(&closed);
        tokio::spawn(async move {
            task.run(&task_closed).await;
        });
        let connection = Self { requests, next_id: Arc::new(AtomicU64::new(1)), closed, timeout };
        // With out-of-band execution QEMU reads the next command while it works on the last; without, every one of a chain
        // waits for two of its threads to wake each other. Every QEMU since 4.0 offers it on a socket.
        let ready = connection.submit(&QmpCapabilities { enable: &["oob"] });
        (connection, ready)
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// The same connection with another deadline for answers.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout, ..self.clone() }
    }

    /// Sends a command and waits for its answer.
    pub async fn execute<C: Command>(&self, command: &C) -> Result<C::Reply, QmpError> {
        self.submit(command).answer().await
    }

    /// Sends a command without waiting.
    pub fn submit<C: Command>(&self, command: &C) -> Pending<C> {
        self.submit_with(command, None)
    }

    /// Sends a command that carries a descriptor.
    pub fn submit_fd<C: Command>(&self, command: &C, fd: Arc<OwnedFd>) -> Pending<C> {
        self.submit_with(command, Some(fd))
    }

    fn submit_with<C: Command>(&self, command: &C, fd: Option<Arc<OwnedFd>>) -> Pending<C> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        let sent = encode(C::NAME, command, id).and_then(|bytes| {
            self.requests.try_send(Request { id, bytes, fd, reply }).map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => QmpError::Backlog { command: C::NAME },
                mpsc::error::TrySendError::Closed(_) => QmpError::Closed,
            })
        });
        Pending { reply: sent.map(|()| answer), timeout: self.timeout, command: PhantomData }
    }
}

impl<C: Command> Pending<C> {
    pub async fn answer(self) -> Result<C::Reply, QmpError> {
        let after = self.timeout;
        let value = match tokio::time::timeout(after, self.reply?).await {
            Err(_) => return Err(QmpError::Timeout { command: C::NAME, after }),
            Ok(Err(_)) | Ok(Ok(Err(Refusal::Closed))) => return Err(QmpError::Closed),
            Ok(Ok(Err(Refusal::Protocol(what)))) => return Err(QmpError::Protocol(what)),
            Ok(Ok(Err(Refusal::Error { class, desc }))) => {
                return Err(QmpError::Refused { command: C::NAME, class, desc });
            }
            Ok(Ok(Ok(value))) => value,
        };
        serde_json::from_value(value).map_err(|error| {
            QmpError::Protocol(format!("the answer to '{}' is not understood: {error}", C::NAME))
        })
    }
}

/// One line; QEMU reads its monitor a byte at a time, so it is as short as can be.
fn encode<C: Command>(name: &'static str, command: &C, id: u64) -> Result<Vec<u8>, QmpError> {
    let unfit = |error| QmpError::Protocol(format!("'{name}' cannot be written as JSON: {error}"));
    let arguments = serde_json::to_string(command).map_err(unfit)?;
    let text = match arguments.as_str() {
        "{}" => format!("{{\"execute\":\"{name}\",\"id\":{id}}}\n"),
        arguments => format!("{{\"execute\":\"{name}\",\"arguments\":{arguments},\"id\":{id}}}\n"),
    };
    Ok(text.into_bytes())
}

struct Task {
    stream: UnixStream,
    inbox: mpsc::Receiver<Request>,
    inbox_open: bool,
    unsent: VecDeque<Unsent>,
    /// The command that took a descriptor along and has no answer yet. QEMU holds the descriptor that came last for the
    /// command that asks next, so a second one waits until the first has arrived.
    handing_over: Option<u64>,
    waiting: HashMap<u64, oneshot::Sender<Result<Value, Refusal>>>,
    decoder: Decoder,
    events: EventSink,
    log: TrafficLog,
}

struct Unsent {
    id: u64,
    bytes: Vec<u8>,
    written: usize,
    fd: Option<Arc<OwnedFd>>,
}

enum Step {
    Readable(io::Result<()>),
    Writable(io::Result<()>),
    Submitted(Option<Request>),
}

impl Task {
    async fn run(mut self, closed: &AtomicBool) {
        let why = self.work().await;
        closed.store(true, Ordering::Release);
        self.inbox.close();
        while let Ok(request) = self.inbox.try_recv() {
            self.waiting.insert(request.id, request.reply);
        }
        for (_, reply) in self.waiting.drain() {
            // A caller that no longer waits does not mind.
            let _ = reply.send(Err(match &why {
                Some(what) => Refusal::Protocol(what.clone()),
                None => Refusal::Closed,
            }));
        }
    }

    /// Returns what the peer did wrong, or nothing when the connection just ended.
    async fn work(&mut self) -> Option<String> {
        loop {
            let unwanted = |reply: &oneshot::Sender<_>| reply.is_closed();
            if !self.inbox_open && self.unsent.is_empty() && self.waiting.values().all(unwanted) {
                return None;
            }
            let take_more = self.inbox_open && self.waiting.len() < MAX_WAITING;
            let step = tokio::select! {
                request = self.inbox.recv(), if take_more => Step::Submitted(request),
                ready = self.stream.readable() => Step::Readable(ready),
                ready = self.stream.writable(), if self.may_write() => Step::Writable(ready),
            };
            match step {
                Step::Submitted(Some(request)) => self.accept(request),
                Step::Submitted(None) => self.inbox_open = false,
                Step::Writable(ready) => {
                    if ready.and_then(|()| self.write()).is_err() {
                        return None;
                    }
                }
                Step::Readable(ready) => match ready.and_then(|()| self.read()) {
                    Ok(true) => {
                        if let Err(what) = self.dispatch() {
                            return Some(what);
                        }
                    }
                    Ok(false) | Err(_) => return None,
                },
            }
        }
    }

    fn accept(&mut self, request: Request) {
        self.log.record(Direction::Sent, &request.bytes);
        self.waiting.insert(request.id, request.reply);
        self.unsent.push_back(Unsent { id: request.id, bytes: request.bytes, written: 0, fd: request.fd });
    }

    /// False at the end of the stream.
    fn read(&mut self) -> io::Result<bool> {
        let mut buffer = [0u8; 16 << 10];
        match self.stream.try_read(&mut buffer) {
            Ok(0) => Ok(false),
            Ok(length) => {
                self.decoder.feed(&buffer[..length]);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(error) => Err(error),
        }
    }

    fn may_write(&self) -> bool {
        self.unsent.front().is_some_and(|front| front.fd.is_none() || self.handing_over.is_none())
    }

    fn write(&mut self) -> io::Result<()> {
        while self.may_write()
            && let Some(front) = self.unsent.front_mut()
        {
            let fd = front.fd.as_ref().map(|fd| fd.as_fd());
            let rest = &front.bytes[front.written..];
            match self.stream.try_io(Interest::WRITABLE, || send(self.stream.as_fd(), rest, fd)) {
                Ok(length) => {
                    // The descriptor went with the first byte.
                    if front.fd.take().is_some() {
                        self.handing_over = Some(front.id);
                    }
                    front.written += length;
                    if front.written == front.bytes.len() {
                        self.unsent.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// QEMU has dealt with a command, and has taken the descriptor that came with it.
    fn arrived(&mut self, id: u64) {
        self.handing_over.take_if(|handed| *handed == id);
    }

    fn dispatch(&mut self) -> Result<(), String> {
        while let Some(next) = self.decoder.next_message() {
            let (message, line) = next.map_err(|error| error.to_string())?;
            self.log.record(Direction::Received, line);
            match message {
                Message::Greeting { version: _ } => {}
                Message::Event { name, data } => (self.events)(&name, &data),
                Message::Return { id, value } => {
                    self.arrived(id);
                    if let Some(reply) = self.waiting.remove(&id) {
                        let _ = reply.send(Ok(value));
                    }
                }
                Message::Error { id: Some(id), class, desc } => {
                    self.arrived(id);
                    if let Some(reply) = self.waiting.remove(&id) {
                        let _ = reply.send(Err(Refusal::Error { class, desc: clean(&desc, MAX_DESC) }));
                    }
                }
                Message::Error { id: None, desc, .. } => {
                    return Err(format!("QEMU could not read a command: {}", clean(&desc, MAX_DESC)));
                }
            }
        }
        Ok(())
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: &[BorrowedFd<'_>] = fd.as_slice();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    use super::super::commands::{GetFd, QueryStatus, Status, Stop};
    use super::*;

    fn open(timeout: Duration) -> (Connection, UnixStream, mpsc::UnboundedReceiver<String>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (seen, events) = mpsc::unbounded_channel();
        let dir = Arc::new(OwnedFd::from(File::open(tempfile::tempdir().unwrap().path()).unwrap()));
        let sink: EventSink = Box::new(move |name, _| seen.send(name.to_owned()).unwrap());
        let (connection, _ready) = Connection::open(ours, sink, TrafficLog::open(dir), timeout);
        (connection, theirs, events)
    }

    #[tokio::test]
    async fn answers_find_their_command_and_events_come_through() {
        let (connection, mut peer, mut events) = open(Duration::from_secs(5));
        let (stop, status) = (connection.submit(&Stop {}), connection.submit(&QueryStatus {}));
        let (read, mut write) = peer.split();
        let mut lines = BufReader::new(read).lines();
        for expected in ["qmp_capabilities", "stop", "query-status"] {
            assert!(lines.next_line().await.unwrap().unwrap().contains(expected));
        }
        write
            .write_all(
                b"{\"event\":\"STOP\"}\r\n{\"id\":3,\"return\":{\"status\":\"paused\"}}\n{\"id\":2,\"error\":{\"class\":\"G\",\"desc\":\"no\\u001b\"}}\n",
            )
            .await
            .unwrap();
        assert_eq!(status.answer().await.unwrap().status, Status::Paused);
        let refused = stop.answer().await.unwrap_err();
        assert_eq!(refused.to_string(), "QEMU refused 'stop': no ");
        assert_eq!(events.recv().await.unwrap(), "STOP");
    }

    #[tokio::test]
    async fn one_descriptor_travels_at_a_time_and_the_order_stays() {
        use std::io::{BufRead, Write};
        let (connection, peer, _events) = open(Duration::from_secs(5));
        // Read by a thread: a read ends where a descriptor came along, which the runtime takes for the end of the data.
        let mut write = peer.into_std().unwrap();
        write.set_nonblocking(false).unwrap();
        let read = io::BufReader::new(write.try_clone().unwrap());
        let (seen, mut lines) = mpsc::unbounded_channel();
        std::thread::spawn(move || read.lines().map_while(Result::ok).try_for_each(|line| seen.send(line)));
        let fd = || Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
        let getfd = |name: &str| GetFd { fdname: name.to_owned() };
        let first = connection.submit_fd(&getfd("first"), fd());
        let between = connection.submit(&Stop {});
        let second = connection.submit_fd(&getfd("second"), fd());
        let after = connection.submit(&QueryStatus {});
        let mut next = async || lines.recv().await.unwrap();
        for expected in ["qmp_capabilities", "first", "stop"] {
            assert!(next().await.contains(expected));
        }
        // Nothing more until the first has its answer, also when it is a refusal.
        write.write_all(b"{\"id\":3,\"return\":{}}\n").unwrap();
        between.answer().await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), next()).await.is_err());
        write.write_all(b"{\"id\":2,\"error\":{\"class\":\"G\",\"desc\":\"no\"}}\n").unwrap();
        first.answer().await.unwrap_err();
        assert!(next().await.contains("second"));
        assert!(next().await.contains("query-status"));
        drop((second, after));
    }

    #[tokio::test]
    async fn silence_ends_in_a_timeout_and_the_connection_stays() {
        let (connection, mut peer, _events) = open(Duration::from_millis(20));
        let error = connection.execute(&Stop {}).await.unwrap_err();
        assert!(matches!(error, QmpError::Timeout { command: "stop", .. }), "{error}");
        // A late answer is dropped, the next one is taken.
        let next = connection.with_timeout(Duration::from_secs(5)).submit(&Stop {});
        peer.write_all(b"{\"id\":2,\"return\":{}}\n{\"id\":3,\"return\":{}}\n").await.unwrap();
        next.answer().await.unwrap();
    }

    #[tokio::test]
    async fn garbage_and_hang_ups_reach_every_caller() {
        let (connection, mut peer, _events) = open(Duration::from_secs(5));
        let pending = connection.submit(&Stop {});
        peer.write_all(b"what?\n").await.unwrap();
        assert!(matches!(pending.answer().await.unwrap_err(), QmpError::Protocol(_)));
        assert!(connection.is_closed());
        assert!(matches!(connection.execute(&Stop {}).await.unwrap_err(), QmpError::Closed));

        let (connection, peer, _events) = open(Duration::from_secs(5));
        let pending = connection.submit(&Stop {});
        drop(peer);
        assert!(matches!(pending.answer().await.unwrap_err(), QmpError::Closed));
    }
}
