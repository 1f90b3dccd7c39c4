//! Work on the layers of volumes: check, repair, resize, and putting a layer on another base.
//!
//! What always holds: our own reader has seen every header of the chain before, so `qemu-img` opens the named files and no
//! others; the sandbox sees to the same.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::{
    Disk, QemuImg, ToolError, failure, image_opts, last_progress,
    run::{self, Job, Output},
};
use crate::ImageFormat;

/// A layer to write to and the files under it.
#[derive(Debug, Clone)]
pub(crate) struct Stack {
    pub(crate) top: PathBuf,
    pub(crate) below: Vec<PathBuf>,
    /// Largest file that the top may become.
    pub(crate) max_size: u64,
}

/// What a check found; after a repair, what is left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Check {
    pub(crate) leaks: u64,
    pub(crate) corruptions: u64,
    pub(crate) repaired: u64,
}

/// What `qemu-img check --output=json` prints. Numbers that are zero are left out, except the first.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Printed {
    check_errors: u64,
    format: String,
    #[serde(default)]
    leaks: u64,
    #[serde(default)]
    corruptions: u64,
    #[serde(default)]
    leaks_fixed: u64,
    #[serde(default)]
    corruptions_fixed: u64,
}

fn options(path: &Path) -> OsString {
    image_opts(Disk { path, format: ImageFormat::Qcow2 })
}

impl Stack {
    fn job(&self, action: &'static str, args: Vec<OsString>, write: bool) -> Job {
        let (mut read, mut written) = (self.below.clone(), Vec::new());
        if write {
            written.push(self.top.clone())
        } else {
            read.push(self.top.clone())
        }
        let file_size = if write { self.max_size } else { 0 };
        Job { action, args, read, write: written, file_size }
    }
}

impl QemuImg {
    /// Walks all tables of the top, and repairs them if told so. Blocks the thread.
    pub(crate) fn check_layer(
        &self,
        stack: &Stack,
        repair: bool,
        cancel: &CancellationToken,
    ) -> Result<Check, ToolError> {
        let mut args: Vec<OsString> = vec!["check".into(), "--output=json".into()];
        if repair {
            args.extend(["-r", "all"].map(OsString::from));
        }
        args.extend(["--image-opts".into(), options(&stack.top)]);
        let job = stack.job("check", args, repair);
        let output = run::run(self, &job, cancel, &mut |_| {})?;
        // 0: clean; 2: corruptions; 3: leaks. With others, it did not come to its end.
        match output.status.code() {
            Some(0 | 2 | 3) => parse(&output).ok_or_else(|| ToolError::Failed {
                action: "check",
                status: output.status.to_string(),
                stderr: "it did not print the report that was expected".to_owned(),
            }),
            _ => Err(failure(&job, &output)),
        }
    }

    /// Makes the top larger. Blocks the thread.
    pub(crate) fn resize(
        &self,
        stack: &Stack,
        size: u64,
        cancel: &CancellationToken,
    ) -> Result<(), ToolError> {
        let args = vec!["resize".into(), "--image-opts".into(), options(&stack.top), size.to_string().into()];
        self.write(&stack.job("resize", args, true), cancel, |_| {})
    }

    /// Puts the top on another base of the same chain, by its name in the header, or on nothing. What the files between held
    /// is copied into the top first, so it reads the same at every moment.
    ///
    /// Written through, because with a write-back cache `qemu-img` changes the header before its own tables are in the file:
    /// killed between the two, the copied data would be lost.
    pub(crate) fn rebase(
        &self,
        stack: &Stack,
        base: Option<(&str, ImageFormat)>,
        cancel: &CancellationToken,
        progress: impl FnMut(u64),
    ) -> Result<(), ToolError> {
        let mut args: Vec<OsString> =
            ["rebase", "-p", "-t", "writethrough", "--image-opts", "-b"].map(OsString::from).to_vec();
        match base {
            Some((name, format)) => args.extend([name, "-F", format.as_str()].map(OsString::from)),
            None => args.push("".into()),
        }
        args.push(options(&stack.top));
        self.write(&stack.job("rebase", args, true), cancel, progress)
    }

    fn write(
        &self,
        job: &Job,
        cancel: &CancellationToken,
        mut progress: impl FnMut(u64),
    ) -> Result<(), ToolError> {
        let mut line = Vec::new();
        let output = run::run(self, job, cancel, &mut |bytes| {
            line.extend_from_slice(bytes);
            if let Some(done) = last_progress(&mut line) {
                progress(done);
            }
        })?;
        if output.status.success() { Ok(()) } else { Err(failure(job, &output)) }
    }
}

fn parse(output: &Output) -> Option<Check> {
    let printed: Printed = serde_json::from_slice(&output.stdout).ok()?;
    (printed.format == ImageFormat::Qcow2.as_str()).then_some(Check {
        leaks: printed.leaks,
        corruptions: printed.corruptions.saturating_add(printed.check_errors),
        repaired: printed.leaks_fixed.saturating_add(printed.corruptions_fixed),
    })
}
