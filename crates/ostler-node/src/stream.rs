//! Joins a user's stream with a VM: console, display or log. One task per stream, which ends with either side.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use ostler_api::work::{StreamKind, StreamRequest};
use ostler_qemu::Machine;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::broadcast::error::RecvError;

use crate::console::{scrollback_end, watch};
use crate::console_log::{Follow, tail};
use crate::control_plane::Wire;
use crate::fault;
use crate::host::{Host, within};
use crate::vm_handle::VmHandle;

/// Streams of one node at the same time.
pub(crate) const STREAMS_MAX: usize = 256;
/// A user who takes nothing for so long is gone.
const SEND_LIMIT: Duration = Duration::from_secs(30);
/// How often a followed log is looked at.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);
/// Sent to a watcher who was too slow for the guest.
const LOST: &[u8] = b"\r\n[ostler: output was lost here, the connection is too slow]\r\n";
const FRAME: usize = 32 << 10;

/// Serves one request in a task of its own.
pub(crate) fn open(host: &Arc<Host>, request: StreamRequest) {
    let Ok(slot) = Arc::clone(&host.streams).try_acquire_owned() else {
        tracing::warn!(stream = %request.id, vm = %request.vm, "refused: {STREAMS_MAX} streams are open");
        return;
    };
    let task_host = Arc::clone(host);
    host.spawn(async move {
        let _slot = slot;
        let (stream, vm) = (request.id, request.vm);
        let join = Box::pin(join(&task_host, request));
        let ended = tokio::select! {
            ended = join => ended,
            () = task_host.stopping.cancelled() => Ok(()),
        };
        match ended {
            Ok(()) => tracing::debug!(%stream, %vm, "stream ended"),
            Err(error) => tracing::info!(%stream, %vm, %error, "stream broke off"),
        }
    });
}

async fn join(host: &Host, request: StreamRequest) -> io::Result<()> {
    let dial = host.plane.stream(&host.config.node_name, request.id);
    let dialled = within("joining a stream", host.config.times.request, dial).await;
    let mut wire = dialled.map_err(|late| io::Error::other(late.message))?.map_err(io::Error::other)?;
    let Some(handle) = host.vm(request.vm) else { return wire.tx.close().await };
    let machine = handle.machine.lock().clone();
    match (request.what, machine) {
        (StreamKind::Console { scrollback }, Some(machine)) => {
            console(host, &handle, &machine, &mut wire, scrollback).await?;
        }
        // Nobody to talk with: what it said last, and the end.
        (StreamKind::Console { scrollback }, None) => {
            let last = tail(&log_path(host, &handle), scrollback).await;
            send(&mut wire, last.into()).await?;
        }
        (StreamKind::Vnc, Some(machine)) => display(&machine, &mut wire).await?,
        (StreamKind::Vnc, None) => {}
        (StreamKind::Log { tail, follow }, _) => log(host, &handle, &mut wire, tail, follow).await?,
    }
    wire.tx.close().await
}

/// Where the console's output is now.
fn log_path(host: &Host, handle: &VmHandle) -> PathBuf {
    handle.console_log.lock().clone().unwrap_or_else(|| host.console_file(handle.id))
}

async fn send(wire: &mut Wire, bytes: Bytes) -> io::Result<()> {
    for start in (0..bytes.len()).step_by(FRAME) {
        let frame = bytes.slice(start..bytes.len().min(start + FRAME));
        tokio::time::timeout(SEND_LIMIT, wire.tx.send(frame))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the other side takes nothing"))??;
    }
    Ok(())
}

async fn console(
    host: &Host,
    handle: &VmHandle,
    machine: &Arc<dyn Machine>,
    wire: &mut Wire,
    scrollback: u64,
) -> io::Result<()> {
    let mut watch = watch(handle, machine).await?;
    if scrollback > 0 {
        let log = tail(&log_path(host, handle), scrollback).await;
        let end = scrollback_end(&log, &watch.before);
        send(wire, Bytes::from(log).slice(..end)).await?;
    }
    loop {
        tokio::select! {
            printed = watch.printed.recv() => match printed {
                Ok(bytes) => send(wire, bytes).await?,
                Err(RecvError::Lagged(_)) => send(wire, Bytes::from_static(LOST)).await?,
                Err(RecvError::Closed) => return Ok(()),
            },
            typed = wire.rx.next() => match typed {
                Some(Ok(bytes)) => watch.stroke(bytes).await?,
                Some(Err(error)) => return Err(error),
                None => return Ok(()),
            },
        }
    }
}

async fn display(machine: &Arc<dyn Machine>, wire: &mut Wire) -> io::Result<()> {
    let open = tokio::time::timeout(SEND_LIMIT, machine.vnc());
    let screen = open.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?;
    let (mut from, mut to) = screen.map_err(|error| io::Error::other(fault::chain(&error)))?.into_split();
    let Wire { tx, rx } = wire;
    let shown = async {
        let mut chunk = vec![0; FRAME];
        loop {
            let read = from.read(&mut chunk).await?;
            if read == 0 {
                return Ok(());
            }
            tokio::time::timeout(SEND_LIMIT, tx.send(Bytes::copy_from_slice(&chunk[..read])))
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        }
    };
    let typed = async {
        while let Some(bytes) = rx.next().await {
            to.write_all(&bytes?).await?;
        }
        Ok(())
    };
    tokio::select! {
        ended = shown => ended,
        ended = typed => ended,
    }
}

async fn log(host: &Host, handle: &VmHandle, wire: &mut Wire, bytes: u64, follow: bool) -> io::Result<()> {
    let (mut added, shown) = Follow::from_end(&log_path(host, handle), bytes).await;
    send(wire, shown.into()).await?;
    if !follow {
        return Ok(());
    }
    loop {
        let more = added.more(&log_path(host, handle)).await?;
        if !more.is_empty() {
            send(wire, more.into()).await?;
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep(FOLLOW_EVERY) => {}
            said = wire.rx.next() => match said {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error),
                None => return Ok(()),
            },
        }
    }
}
