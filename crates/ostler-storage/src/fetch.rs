//! Download by URL into an upload.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{ImportProgress, StorageError, Upload};

/// What a download may do.
#[derive(Debug, Clone)]
pub struct FetchPolicy {
    /// Allow targets on private, loopback and link-local addresses.
    pub allow_private: bool,
    /// Bytes of the downloaded file.
    pub max_size: u64,
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
        "{host} resolves to {address}, which is not a public address; the operator can allow private addresses for imports"
    )]
    Forbidden { host: String, address: std::net::IpAddr },
    #[error("the name {host} could not be resolved")]
    Unresolved { host: String },
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
}

/// Downloads `url` into `upload`, from where it was left if the server still has the same file.
pub async fn fetch(
    _url: &str,
    _policy: &FetchPolicy,
    _upload: &mut Upload,
    _progress: &watch::Sender<ImportProgress>,
    _cancel: &CancellationToken,
) -> Result<(), FetchError> {
    unimplemented!()
}
