//! `qemu-img` in a locked-down process.

use std::{path::PathBuf, time::Duration};

/// Limits of one run.
#[derive(Debug, Clone)]
pub struct ToolLimits {
    pub address_space: u64,
    pub cpu: Duration,
    /// Wall-clock time.
    pub deadline: Duration,
    /// Bytes of output kept from each of stdout and stderr.
    pub output: usize,
}

impl Default for ToolLimits {
    fn default() -> Self {
        Self {
            address_space: 2 << 30,
            cpu: Duration::from_secs(3600),
            deadline: Duration::from_secs(2 * 3600),
            output: 1 << 20,
        }
    }
}

/// Where `qemu-img` is and what it may use.
#[derive(Debug, Clone)]
pub struct QemuImg {
    pub program: PathBuf,
    pub limits: ToolLimits,
}

impl Default for QemuImg {
    fn default() -> Self {
        Self { program: PathBuf::from("/usr/bin/qemu-img"), limits: ToolLimits::default() }
    }
}

/// Why a run of `qemu-img` failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("{} is missing; install the package qemu-utils", program.display())]
    Missing { program: PathBuf },
    #[error("qemu-img {action} failed ({status}): {stderr}")]
    Failed { action: &'static str, status: String, stderr: String },
    #[error("qemu-img {action} was stopped after {seconds} seconds")]
    TimedOut { action: &'static str, seconds: u64 },
    #[error("no space left on the file system while qemu-img {action} was writing; free some or grow it")]
    NoSpace { action: &'static str },
    #[error("cancelled")]
    Cancelled,
    #[error("cannot run qemu-img {action}")]
    Io { action: &'static str, source: std::io::Error },
}

impl ToolError {
    /// Stable name of the kind of failure.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "tool_missing",
            Self::Failed { .. } => "tool_failed",
            Self::TimedOut { .. } => "timed_out",
            Self::NoSpace { .. } => "no_space",
            Self::Cancelled => "cancelled",
            Self::Io { .. } => "io",
        }
    }
}
