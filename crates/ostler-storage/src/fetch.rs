//! Download by URL into an upload.
//!
//! Who calls it: the image service, before `ImageStore::finish`. Only http and https. Each host's name is resolved once and
//! the connection goes to the addresses found then, so that what was checked is what is connected to; every redirect is
//! checked as the first URL was. A connection that breaks is taken up where it broke, if the server can prove that
//! the file is still the same.

mod address;
mod connect;
mod target;

use std::{net::IpAddr, time::Duration};

use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::{connect::Connector, target::Target};
use crate::{ImportProgress, ImportStage, StorageError, Upload, UploadSource};

/// What a download may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchPolicy {
    /// Allow targets on private, loopback and link-local addresses.
    pub allow_private: bool,
    /// Single addresses that are allowed although they are private, such as a mirror's.
    pub allowed: Vec<IpAddr>,
    /// Bytes of the downloaded file.
    pub max_size: u64,
    /// For the resolution of the name, the connection and the TLS handshake, each.
    pub connect_timeout: Duration,
    /// Longest time without a byte.
    pub idle_timeout: Duration,
    pub max_redirects: u32,
    /// Attempts in a row that bring no byte before the download fails.
    pub max_retries: u32,
}

impl Default for FetchPolicy {
    fn default() -> Self {
        Self {
            allow_private: false,
            allowed: Vec::new(),
            max_size: 2 << 40,
            connect_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(60),
            max_redirects: 5,
            max_retries: 5,
        }
    }
}

/// Why a download failed. What has come so far stays in the upload.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("invalid URL {url:?}: {why}")]
    InvalidUrl { url: String, why: String },
    #[error(
        "{host} has the address {address}, which is not public; the operator can allow private addresses"
    )]
    Forbidden { host: String, address: IpAddr },
    #[error("the name {host} could not be resolved: {why}")]
    Unresolved { host: String, why: String },
    #[error("the server answered {status} for {url}")]
    Status { status: u16, url: String },
    #[error("more than {max} redirects")]
    TooManyRedirects { max: u32 },
    #[error("the file is larger than the limit of {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("the download from {host} broke off: {why}")]
    Broken { host: String, why: String },
    #[error("no answer from {host} within {seconds} seconds")]
    TimedOut { host: String, seconds: u64 },
    #[error("cancelled")]
    Cancelled,
    #[error(transparent)]
    Storage(#[from] StorageError),
}

impl FetchError {
    /// Stable name of the kind of failure.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidUrl { .. } => "invalid_url",
            Self::Forbidden { .. } => "forbidden_address",
            Self::Unresolved { .. } => "unresolved",
            Self::Status { .. } => "http_status",
            Self::TooManyRedirects { .. } => "too_many_redirects",
            Self::TooLarge { .. } => "too_large",
            Self::Broken { .. } => "broken_download",
            Self::TimedOut { .. } => "timed_out",
            Self::Cancelled => "cancelled",
            Self::Storage(error) => error.code(),
        }
    }

    /// True when the same request may go better a moment later.
    fn is_passing(&self) -> bool {
        match self {
            Self::Broken { .. } | Self::TimedOut { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            Self::Unresolved { .. }
            | Self::InvalidUrl { .. }
            | Self::Forbidden { .. }
            | Self::TooManyRedirects { .. }
            | Self::TooLarge { .. }
            | Self::Cancelled
            | Self::Storage(_) => false,
        }
    }
}

/// First pause before another attempt; it doubles up to `MAX_BACKOFF`.
const BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// Bytes after which the download is made safe, so that a crash of the machine costs no more.
const SYNC_EVERY: u64 = 64 << 20;

/// Downloads `url` into `upload`, from where it was left if the server still has the same file.
pub async fn fetch(
    url: &str,
    policy: &FetchPolicy,
    upload: &mut Upload,
    progress: &watch::Sender<ImportProgress>,
    cancel: &CancellationToken,
) -> Result<(), FetchError> {
    let target = Target::parse(url)?;
    let mut download = Download { target, policy, connector: Connector::new(policy), upload, progress };
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(FetchError::Cancelled),
        outcome = download.run() => outcome,
    }
}

struct Download<'a> {
    target: Target,
    policy: &'a FetchPolicy,
    connector: Connector<'a>,
    upload: &'a mut Upload,
    progress: &'a watch::Sender<ImportProgress>,
}

impl Download<'_> {
    async fn run(&mut self) -> Result<(), FetchError> {
        let (mut failures, mut pause) = (0, BACKOFF);
        // Only what goes beyond all before counts as getting on: a server that makes us begin again and again does not.
        let mut farthest = self.upload.offset();
        loop {
            match self.attempt().await {
                Ok(()) => {
                    self.upload.sync().await?;
                    return Ok(());
                }
                Err(error) if error.is_passing() => {
                    if self.upload.offset() > farthest {
                        farthest = self.upload.offset();
                        (failures, pause) = (0, BACKOFF);
                    }
                    failures += 1;
                    if failures > self.policy.max_retries {
                        return Err(error);
                    }
                    tracing::info!(url = %self.target, offset = self.upload.offset(), %error, "download goes on after a pause");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_BACKOFF);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One request, with its redirects, as far as it goes.
    async fn attempt(&mut self) -> Result<(), FetchError> {
        // Bytes of unknown origin, or of another URL, cannot be continued.
        let resumable = self.upload.source().filter(|source| source.url == self.target.to_string()).cloned();
        if resumable.is_none() && self.upload.offset() > 0 {
            self.upload.restart().await?;
        }
        let mut target = self.target.clone();
        let mut redirects = 0;
        let response = loop {
            let range = resumable.as_ref().map(|source| (self.upload.offset(), source.validator.as_str()));
            let response = self.connector.get(&target, range.filter(|(offset, _)| *offset > 0)).await?;
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                break response;
            }
            redirects += 1;
            if redirects > self.policy.max_redirects {
                return Err(FetchError::TooManyRedirects { max: self.policy.max_redirects });
            }
            let location = text(response.headers(), header::LOCATION).ok_or_else(|| FetchError::Broken {
                host: target.host().to_owned(),
                why: format!("a redirect ({}) without a location", response.status()),
            })?;
            target = target.join(location)?;
        };
        match response.status() {
            StatusCode::OK => {
                if self.upload.offset() > 0 {
                    self.upload.restart().await?;
                }
                let validator = validator(response.headers());
                let source =
                    validator.map(|validator| UploadSource { url: self.target.to_string(), validator });
                if self.upload.source() != source.as_ref() {
                    self.upload.set_source(source).await?;
                }
            }
            StatusCode::PARTIAL_CONTENT => {
                let start = content_range_start(response.headers());
                if start != Some(self.upload.offset()) {
                    self.upload.restart().await?;
                    return Err(FetchError::Broken {
                        host: target.host().to_owned(),
                        why: format!("the server sent another part than the one asked for ({start:?})"),
                    });
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE if self.upload.offset() > 0 => {
                let complete = format!("bytes */{}", self.upload.offset());
                if text(response.headers(), header::CONTENT_RANGE) == Some(complete.as_str()) {
                    return Ok(());
                }
                self.upload.restart().await?;
                return Err(FetchError::Broken {
                    host: target.host().to_owned(),
                    why: "the server's file is shorter than what was downloaded before".to_owned(),
                });
            }
            status => return Err(FetchError::Status { status: status.as_u16(), url: target.to_string() }),
        }
        self.receive(&target, response).await
    }

    async fn receive(&mut self, target: &Target, response: Response<Incoming>) -> Result<(), FetchError> {
        let limit = self.policy.max_size;
        let length =
            text(response.headers(), header::CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
        let total = length.map(|length| self.upload.offset().saturating_add(length));
        if total.is_some_and(|total| total > limit) {
            return Err(FetchError::TooLarge { limit });
        }
        let mut body = response.into_body();
        let mut unsynced = 0;
        loop {
            self.progress.send_replace(ImportProgress {
                stage: ImportStage::Transfer,
                done: self.upload.offset(),
                total,
            });
            let idle = self.policy.idle_timeout;
            let frame = tokio::time::timeout(idle, body.frame()).await.map_err(|_| FetchError::TimedOut {
                host: target.host().to_owned(),
                seconds: idle.as_secs(),
            })?;
            let Some(frame) = frame else { break };
            let frame = frame
                .map_err(|error| FetchError::Broken { host: target.host().to_owned(), why: chain(&error) })?;
            let Ok(data) = frame.into_data() else { continue };
            if self.upload.offset() + data.len() as u64 > limit {
                return Err(FetchError::TooLarge { limit });
            }
            unsynced += data.len() as u64;
            self.upload.write(data).await?;
            if unsynced >= SYNC_EVERY {
                self.upload.sync().await?;
                unsynced = 0;
            }
        }
        match total {
            Some(total) if total != self.upload.offset() => Err(FetchError::Broken {
                host: target.host().to_owned(),
                why: format!("{} of {total} bytes came", self.upload.offset()),
            }),
            _ => Ok(()),
        }
    }
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// What `If-Range` may carry: a strong entity tag, else the date of the last change.
fn validator(headers: &HeaderMap) -> Option<String> {
    let tag = text(headers, header::ETAG).filter(|tag| tag.starts_with('"'));
    tag.or_else(|| text(headers, header::LAST_MODIFIED)).map(str::to_owned)
}

/// The first byte's position in `bytes 5-9/10`.
fn content_range_start(headers: &HeaderMap) -> Option<u64> {
    let range = text(headers, header::CONTENT_RANGE)?.strip_prefix("bytes ")?;
    range.split_once('-')?.0.parse().ok()
}

/// An error's text with those of its causes, since hyper's own says little.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
