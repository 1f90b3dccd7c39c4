//! Standard input on its way to the guest.

use std::io::Read;
use std::time::Duration;

use bytes::Bytes;
use ostler_client::{ClientError, SocketSender};
use tokio::sync::mpsc;

/// ctrl-]
const ESCAPE: u8 = 0x1d;
const READ_SIZE: usize = 4096;
const QUEUE: usize = 64;
/// Signs of life, for what drops silent connections.
const PING: Duration = Duration::from_secs(20);

/// What ended the input.
pub(super) enum Ended {
    /// ctrl-] was pressed.
    Escape,
    /// Standard input is at its end and everything was sent.
    Input,
    Broken(ClientError),
}

/// A thread that reads and a task that sends. Reading cannot be called off, so the thread ends with the process.
pub(super) struct Input {
    ends: mpsc::UnboundedReceiver<Ended>,
}

impl Input {
    /// Nothing is sent but signs of life.
    pub(super) fn none(sender: SocketSender) -> Self {
        let (end, ends) = mpsc::unbounded_channel();
        let (keep, chunks) = mpsc::channel(1);
        tokio::spawn(async move {
            send(sender, chunks, end).await;
            drop(keep);
        });
        Self { ends }
    }

    /// With `keys` ctrl-] leaves; else every byte is the guest's.
    pub(super) fn stdin(sender: SocketSender, keys: bool) -> Self {
        let (end, ends) = mpsc::unbounded_channel();
        let (chunk, chunks) = mpsc::channel(QUEUE);
        let escape = end.clone();
        std::thread::spawn(move || read(&chunk, &escape, keys));
        tokio::spawn(send(sender, chunks, end));
        Self { ends }
    }

    pub(super) async fn ended(&mut self) -> Ended {
        match self.ends.recv().await {
            Some(end) => end,
            None => std::future::pending().await,
        }
    }
}

fn read(chunks: &mpsc::Sender<Bytes>, end: &mpsc::UnboundedSender<Ended>, keys: bool) {
    let mut buffer = [0; READ_SIZE];
    loop {
        let length = match std::io::stdin().lock().read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        let read = &buffer[..length];
        let escape = if keys { read.iter().position(|byte| *byte == ESCAPE) } else { None };
        let rest = &read[..escape.unwrap_or(length)];
        let sent = if keys {
            // A guest that takes nothing must not keep ctrl-] from being seen: what is over is lost.
            rest.is_empty()
                || !matches!(
                    chunks.try_send(Bytes::copy_from_slice(rest)),
                    Err(mpsc::error::TrySendError::Closed(_))
                )
        } else {
            rest.is_empty() || chunks.blocking_send(Bytes::copy_from_slice(rest)).is_ok()
        };
        if escape.is_some() {
            let _ = end.send(Ended::Escape);
            return;
        }
        // A dropped sender tells the task that this is the end.
        if length == 0 || !sent {
            return;
        }
    }
}

async fn send(
    mut sender: SocketSender,
    mut chunks: mpsc::Receiver<Bytes>,
    end: mpsc::UnboundedSender<Ended>,
) {
    let mut ping = tokio::time::interval(PING);
    let mut open = true;
    loop {
        let sent = tokio::select! {
            chunk = chunks.recv(), if open => match chunk {
                Some(chunk) => sender.send(chunk).await,
                None => {
                    open = false;
                    let _ = end.send(Ended::Input);
                    Ok(())
                }
            },
            _ = ping.tick() => sender.ping().await,
        };
        if let Err(error) = sent {
            // The receiving side sees a closed console by itself and says so.
            let _ = end.send(Ended::Broken(error));
            return;
        }
        if end.is_closed() {
            return;
        }
    }
}
