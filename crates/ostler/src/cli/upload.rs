//! Sending a file or a stream to the server in chunks, going on where it was after a break.

use std::io::SeekFrom;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use ostler_api::ErrorCode;
use ostler_api::image::{ImagePhase, UploadState};
use ostler_client::{Client, ClientError, body};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, Stdin};

use super::error::{CliError, Result};
use super::output::note;
use super::progress::Progress;

/// What is sent in one request and kept until the server has it.
const CHUNK: usize = 8 << 20;
const PIECE: usize = 128 << 10;
/// For one chunk.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(300);
/// Without any progress for this long it ends.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(500);

/// Data to send.
pub(crate) enum Upload {
    File { file: File, size: u64 },
    Stdin(Stdin),
}

impl Upload {
    pub(crate) async fn file(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path).await?;
        let metadata = file.metadata().await?;
        if metadata.is_dir() {
            return Err(std::io::Error::new(std::io::ErrorKind::IsADirectory, "it is a directory"));
        }
        Ok(Self::File { file, size: metadata.len() })
    }

    pub(crate) fn stdin() -> Self {
        Self::Stdin(tokio::io::stdin())
    }

    fn size(&self) -> Option<u64> {
        match self {
            // A device or a pipe has no size that we could know.
            Self::File { size, .. } => Some(*size).filter(|size| *size > 0),
            Self::Stdin(_) => None,
        }
    }

    async fn skip_to(&mut self, offset: u64) -> Result<()> {
        match self {
            Self::File { file, .. } => {
                file.seek(SeekFrom::Start(offset)).await.map_err(unreadable)?;
            }
            Self::Stdin(stdin) => {
                // The same stream from its beginning: what the server has is read and dropped.
                let mut first = stdin.take(offset);
                let read = tokio::io::copy(&mut first, &mut tokio::io::sink()).await.map_err(unreadable)?;
                if read < offset {
                    return Err(CliError::failed(format!(
                        "the server has {offset} bytes already and standard input ends after {read}"
                    ))
                    .hint("is it the same source?"));
                }
            }
        }
        Ok(())
    }

    /// A full chunk, or what is left; empty at the end.
    async fn chunk(&mut self) -> Result<Bytes> {
        let mut chunk = BytesMut::with_capacity(CHUNK);
        while chunk.len() < CHUNK {
            let read = match self {
                Self::File { file, .. } => file.read_buf(&mut chunk).await,
                Self::Stdin(stdin) => stdin.read_buf(&mut chunk).await,
            };
            if read.map_err(unreadable)? == 0 {
                break;
            }
        }
        // The buffer may have grown past a chunk by a little: that is sent along.
        Ok(chunk.freeze())
    }
}

fn unreadable(error: std::io::Error) -> CliError {
    CliError::failed("cannot read the source").why(error.to_string())
}

/// Sends all of `data` to the image and begins its import.
pub(crate) async fn upload(client: &Client, image: &str, title: &str, mut data: Upload) -> Result<()> {
    let mut progress = Progress::new(title);
    let total = data.size();
    let mut offset = client.image_upload_state(image).await?.offset;
    if let Some(total) = total.filter(|total| offset > *total) {
        return Err(CliError::failed(format!(
            "the server has {offset} bytes already and the source only {total}"
        ))
        .hint("is it the same source?"));
    }
    if offset > 0 {
        note(&format!("going on after {}", ostler_api::ByteSize(offset)));
        data.skip_to(offset).await?;
    }
    let mut chunk = data.chunk().await?;
    loop {
        // One chunk ahead, to know which one is the last.
        let next = if chunk.is_empty() { Bytes::new() } else { data.chunk().await? };
        let last = next.is_empty();
        let mut sender = Sender { client, image, total, progress: &mut progress };
        sender.send(offset, &chunk, last).await?;
        offset += chunk.len() as u64;
        if last {
            return Ok(());
        }
        chunk = next;
    }
}

struct Sender<'a> {
    client: &'a Client,
    image: &'a str,
    total: Option<u64>,
    progress: &'a mut Progress,
}

impl Sender<'_> {
    /// Sends until the server has the whole chunk.
    async fn send(&mut self, at: u64, chunk: &Bytes, last: bool) -> Result<()> {
        let end = at + chunk.len() as u64;
        let mut from = at;
        let mut stuck = Instant::now();
        loop {
            let rest = chunk.slice(usize::try_from(from - at).unwrap_or(chunk.len()).min(chunk.len())..);
            let error = match self.once(from, rest, last).await {
                Ok(state) if state.offset >= end => return Ok(()),
                Ok(state) => {
                    let text = format!("the server took {} of {end} bytes", state.offset);
                    ClientError::Protocol(text)
                }
                Err(error) if may_go_on(&error) => error,
                Err(error) => return Err(error.into()),
            };
            if stuck.elapsed() > PATIENCE {
                return Err(error.into());
            }
            tokio::time::sleep(PAUSE).await;
            match self.where_it_is().await {
                Ok(None) => return Ok(()),
                Ok(Some(offset)) if offset < at => {
                    return Err(
                        CliError::from(error).why(format!("the server lost what was before byte {at}"))
                    );
                }
                Ok(Some(offset)) => {
                    if offset > from {
                        stuck = Instant::now();
                    }
                    from = offset.min(end);
                }
                // Asked again with the next try, which fails until the server is back.
                Err(error) if may_go_on(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// How much the server has; `None` when it has everything and works on it already.
    async fn where_it_is(&self) -> Result<Option<u64>, ClientError> {
        let image = self.client.image_get(self.image).await?;
        match image.status.phase {
            ImagePhase::Queued | ImagePhase::Uploading => {
                Ok(Some(self.client.image_upload_state(self.image).await?.offset))
            }
            ImagePhase::Importing | ImagePhase::Active | ImagePhase::Error | ImagePhase::Deleting => Ok(None),
        }
    }

    async fn once(&mut self, from: u64, rest: Bytes, last: bool) -> Result<UploadState, ClientError> {
        let sent = Arc::new(AtomicU64::new(from));
        let counted = sent.clone();
        let pieces = pieces(rest).map(move |piece| {
            counted.fetch_add(piece.len() as u64, Ordering::Relaxed);
            Ok(piece)
        });
        let body = body::stream(futures::stream::iter(pieces));
        let sending =
            tokio::time::timeout(CHUNK_TIMEOUT, self.client.image_upload(self.image, from, last, body));
        tokio::pin!(sending);
        let mut tick = tokio::time::interval(Duration::from_millis(200));
        loop {
            tokio::select! {
                answer = &mut sending => {
                    self.progress.show("uploading", sent.load(Ordering::Relaxed), self.total);
                    return answer.unwrap_or(Err(ClientError::Timeout {
                        what: "sending a chunk".to_owned(),
                        after: CHUNK_TIMEOUT,
                    }));
                }
                _ = tick.tick() => self.progress.show("uploading", sent.load(Ordering::Relaxed), self.total),
            }
        }
    }
}

/// A break, or an offset that is not the server's: both are healed by asking where it is.
fn may_go_on(error: &ClientError) -> bool {
    error.is_passing() || error.code() == Some(ErrorCode::Conflict)
}

fn pieces(mut bytes: Bytes) -> impl Iterator<Item = Bytes> + Send + 'static {
    std::iter::from_fn(move || {
        let length = bytes.len().min(PIECE);
        (length > 0).then(|| bytes.split_to(length))
    })
}
