//! `qemu-img` in a locked-down process: checks and converts, never told a file name that it could interpret.
//!
//! Who calls it: the import pipeline, the export of images and the care of volumes, on a thread of their own. Formats are always given by name
//! and files by option (`file.filename`), so that nothing is probed and no `json:` or protocol prefix has a meaning.

mod layers;
mod run;
mod sandbox;
#[cfg(test)]
mod tests;

use std::{
    ffi::OsString,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use self::run::{Job, Output};
pub(crate) use layers::Stack;

use crate::{ImageFormat, Refusal};

/// Limits of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolLimits {
    /// Bytes of address space.
    pub address_space: u64,
    /// Processor time.
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
            output: 64 << 10,
        }
    }
}

/// Where `qemu-img` is and what it may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuImg {
    pub program: PathBuf,
    pub limits: ToolLimits,
}

impl Default for QemuImg {
    /// The first `qemu-img` in `PATH`, or where Debian has it.
    fn default() -> Self {
        let found = std::env::var_os("PATH").and_then(|path| {
            std::env::split_paths(&path).map(|dir| dir.join("qemu-img")).find(|file| file.is_file())
        });
        Self {
            program: found.unwrap_or_else(|| PathBuf::from("/usr/bin/qemu-img")),
            limits: ToolLimits::default(),
        }
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

/// A file and the driver that opens it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Disk<'a> {
    pub(crate) path: &'a Path,
    pub(crate) format: ImageFormat,
}

/// How the target of a conversion comes to be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target<'a> {
    /// A file that we made: empty qcow2, or raw of the right length; reads as zeroes.
    Prepared(Disk<'a>),
    /// An empty file in which `qemu-img` makes the container.
    Fresh(Disk<'a>),
}

/// Characters of error text that go into a message.
const MAX_STDERR: usize = 2000;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct CheckReport {
    corruptions: u64,
    check_errors: u64,
}

impl QemuImg {
    /// Has `qemu-img check` walk all tables of a qcow2 file. Leaked clusters are fine. Blocks the thread.
    pub(crate) fn check(
        &self,
        path: &Path,
        cancel: &CancellationToken,
    ) -> Result<Result<(), Refusal>, ToolError> {
        let job = Job {
            action: "check",
            args: vec![
                "check".into(),
                "--output=json".into(),
                "--image-opts".into(),
                image_opts(Disk { path, format: ImageFormat::Qcow2 }),
            ],
            read: vec![path.to_owned()],
            write: Vec::new(),
            file_size: 0,
        };
        let output = run::run(self, &job, cancel, &mut |_| {})?;
        // 0: clean; 2: corruptions; 3: leaks.
        match output.status.code() {
            Some(0 | 3) => Ok(Ok(())),
            Some(2) => {
                let report: CheckReport = serde_json::from_slice(&output.stdout).unwrap_or_default();
                Ok(Err(Refusal::Corrupt { corruptions: (report.corruptions + report.check_errors).max(1) }))
            }
            _ => Err(failure(&job, &output)),
        }
    }

    /// Converts `source` into `target`, whose file exists and may grow to `max_size` bytes. `progress` hears hundredths of
    /// a percent. Blocks the thread.
    pub(crate) fn convert(
        &self,
        source: Disk<'_>,
        target: Target<'_>,
        max_size: u64,
        cancel: &CancellationToken,
        mut progress: impl FnMut(u64),
    ) -> Result<(), ToolError> {
        let mut args: Vec<OsString> = vec!["convert".into(), "-p".into(), "--image-opts".into()];
        let path = match target {
            Target::Prepared(disk) => {
                args.extend(["-n", "--target-is-zero", "--target-image-opts"].map(OsString::from));
                args.extend([image_opts(source), image_opts(disk)]);
                disk.path
            }
            Target::Fresh(disk) => {
                // An absolute path: its leading slash keeps any prefix from being read as a protocol.
                debug_assert!(disk.path.is_absolute());
                args.extend(["-O".into(), disk.format.as_str().into()]);
                if disk.format == ImageFormat::Vmdk {
                    args.extend(["-o", "subformat=streamOptimized"].map(OsString::from));
                }
                args.extend([image_opts(source), disk.path.into()]);
                disk.path
            }
        };
        let job = Job {
            action: "convert",
            args,
            read: vec![source.path.to_owned()],
            write: vec![path.to_owned()],
            file_size: max_size,
        };
        let mut line = Vec::new();
        let output = run::run(self, &job, cancel, &mut |bytes| {
            line.extend_from_slice(bytes);
            if let Some(done) = last_progress(&mut line) {
                progress(done);
            }
        })?;
        if output.status.success() { Ok(()) } else { Err(failure(&job, &output)) }
    }
}

/// `driver=…,file.driver=file,file.filename=…` with commas doubled, as QEMU's option syntax wants.
fn image_opts(disk: Disk<'_>) -> OsString {
    let mut text = format!("driver={},file.driver=file,file.filename=", disk.format).into_bytes();
    for byte in disk.path.as_os_str().as_bytes() {
        text.push(*byte);
        if *byte == b',' {
            text.push(b',');
        }
    }
    OsString::from_vec(text)
}

/// The last complete `(12.34/100%)` in what came so far, in hundredths of a percent; consumes what it has read.
fn last_progress(line: &mut Vec<u8>) -> Option<u64> {
    let end = line.iter().rposition(|byte| *byte == b'%')?;
    let text = String::from_utf8_lossy(&line[..end]).into_owned();
    line.drain(..=end);
    let (_, number) = text.rsplit_once('(')?;
    let percent: f64 = number.strip_suffix("/100")?.trim().parse().ok()?;
    Some((percent.clamp(0.0, 100.0) * 100.0) as u64)
}

fn failure(job: &Job, output: &Output) -> ToolError {
    let mut stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if stderr.contains("No space left on device") || stderr.contains("Disk quota exceeded") {
        return ToolError::NoSpace { action: job.action };
    }
    if stderr.len() > MAX_STDERR {
        stderr = stderr.chars().take(MAX_STDERR).collect();
    }
    if stderr.is_empty() {
        stderr.push_str("it said nothing");
    }
    ToolError::Failed { action: job.action, status: output.status.to_string(), stderr }
}
