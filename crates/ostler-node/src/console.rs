//! The serial console of a VM, for several watchers over one connection to QEMU.
//!
//! The hub exists while somebody watches: the first watcher opens the serial port, the last one closes it. QEMU logs
//! what the guest prints whether somebody watches or not; that log is the scrollback.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use ostler_qemu::Machine;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc};

use crate::vm_handle::VmHandle;

/// Chunks that wait for the slowest watcher before it loses some.
const CHUNKS: usize = 256;
const CHUNK: usize = 4 << 10;
/// Key strokes that wait for the guest.
const STROKES: usize = 64;
/// The end of what was passed on, by which a newcomer finds his place in the log.
const RECENT: usize = 512;
/// QEMU takes the connection within this, or does not work.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Hub {
    printed: broadcast::Sender<Bytes>,
    strokes: mpsc::Sender<Bytes>,
    recent: Arc<Mutex<VecDeque<u8>>>,
}

/// One watcher. The hub ends with the last of them.
#[derive(Debug)]
pub(crate) struct Watch {
    hub: Arc<Hub>,
    pub(crate) printed: broadcast::Receiver<Bytes>,
    /// What the hub passed on last, before `printed`.
    pub(crate) before: Vec<u8>,
}

impl Watch {
    /// Types. An error once the machine is gone.
    pub(crate) async fn stroke(&self, bytes: Bytes) -> io::Result<()> {
        self.hub.strokes.send(bytes).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// Joins the watchers of a VM's console.
pub(crate) async fn watch(handle: &VmHandle, machine: &Arc<dyn Machine>) -> io::Result<Watch> {
    let mut slot = handle.hub.lock().await;
    let hub = match slot.upgrade().filter(|hub| !hub.strokes.is_closed()) {
        Some(hub) => hub,
        None => {
            let open = tokio::time::timeout(OPEN_LIMIT, machine.console());
            let serial = open.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
            let hub = Hub::start(serial.map_err(io::Error::other)?);
            *slot = Arc::downgrade(&hub);
            hub
        }
    };
    let recent = hub.recent.lock();
    let printed = hub.printed.subscribe();
    let before = recent.iter().copied().collect();
    drop(recent);
    Ok(Watch { hub, printed, before })
}

/// A slot without a hub.
pub(crate) fn none() -> tokio::sync::Mutex<Weak<Hub>> {
    tokio::sync::Mutex::new(Weak::new())
}

impl Hub {
    fn start(serial: UnixStream) -> Arc<Self> {
        let (printed, _) = broadcast::channel(CHUNKS);
        let (strokes, typed) = mpsc::channel(STROKES);
        let recent = Arc::new(Mutex::new(VecDeque::new()));
        let (from, to) = serial.into_split();
        let (out, kept) = (printed.clone(), Arc::clone(&recent));
        // Ends by itself: with the machine, or once no watcher can type any more.
        tokio::spawn(async move {
            tokio::select! {
                () = pass_on(from, &out, &kept) => {}
                () = type_in(to, typed) => {}
            }
        });
        Arc::new(Self { printed, strokes, recent })
    }
}

async fn pass_on(mut from: OwnedReadHalf, out: &broadcast::Sender<Bytes>, recent: &Mutex<VecDeque<u8>>) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = match from.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(read) => &chunk[..read],
        };
        // Together, so that a newcomer misses nothing and gets nothing twice.
        let mut recent = recent.lock();
        recent.extend(read);
        let surplus = recent.len().saturating_sub(RECENT);
        recent.drain(..surplus);
        let _ = out.send(Bytes::copy_from_slice(read));
    }
}

async fn type_in(mut to: OwnedWriteHalf, mut typed: mpsc::Receiver<Bytes>) {
    while let Some(bytes) = typed.recv().await {
        if to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// How much of the log's end a newcomer has to see: up to the place where the live output goes on.
pub(crate) fn scrollback_end(log: &[u8], before: &[u8]) -> usize {
    if before.is_empty() {
        return log.len();
    }
    // The log may be a little ahead or a little behind of what was passed on.
    (1..=before.len())
        .rev()
        .find_map(|length| {
            let end = &before[before.len() - length..];
            // A short match means nothing.
            (length == before.len() || length >= RECENT / 8).then_some(())?;
            log.windows(length).rposition(|window| window == end).map(|at| at + length)
        })
        .unwrap_or(log.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scrollback_ends_where_the_live_output_goes_on() {
        assert_eq!(scrollback_end(b"boot...login: ", b""), 14);
        assert_eq!(scrollback_end(b"boot...login: ", b"login: "), 14);
        // The log is ahead: what comes after will come live.
        assert_eq!(scrollback_end(b"boot...login: root", b"login: "), 14);
        // What was passed on is no longer, or not yet, in the log.
        assert_eq!(scrollback_end(b"boot", b"login: "), 4);
        assert_eq!(scrollback_end(b"", b"x"), 0);
    }

    #[tokio::test]
    async fn all_watchers_see_what_is_printed_and_may_type() {
        let (ours, qemu) = UnixStream::pair().unwrap();
        let hub = Hub::start(ours);
        let mut watchers = [hub.printed.subscribe(), hub.printed.subscribe()];
        let (mut from_qemu, mut to_guest) = qemu.into_split();
        to_guest.write_all(b"login: ").await.unwrap();
        for watcher in &mut watchers {
            assert_eq!(watcher.recv().await.unwrap(), "login: ");
        }
        assert_eq!(hub.recent.lock().iter().copied().collect::<Vec<_>>(), b"login: ");
        hub.strokes.send(Bytes::from_static(b"root\n")).await.unwrap();
        let mut typed = [0; 5];
        from_qemu.read_exact(&mut typed).await.unwrap();
        assert_eq!(&typed, b"root\n");
        // The last watcher leaves: the serial port is closed.
        drop(hub);
        assert_eq!(from_qemu.read(&mut typed).await.unwrap(), 0);
    }
}
