//! A stored image out of the store, in any of the formats.

use std::{fs::File, path::Path};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{ImportProgress, ImportStage, finish::stored_limit};
use crate::{
    ImageFormat, ProbeLimits, QemuImg, StorageError,
    files::{self, Context, Scratch},
    probe::probe,
    qcow2,
    tool::{Disk, Target},
};

/// Writes `path` to the new file `to`. Blocks the thread.
pub(super) fn export(
    tool: &QemuImg,
    path: &Path,
    from: ImageFormat,
    format: ImageFormat,
    to: &Path,
    progress: &watch::Sender<ImportProgress>,
    cancel: &CancellationToken,
) -> Result<(), StorageError> {
    let to = std::path::absolute(to).context("resolve", to)?;
    let source = files::open_regular(path)?;
    let part = Scratch::create(part_of(&to)?)?;
    if from == format {
        copy(&source, path, &part, progress, cancel)?;
    } else {
        // The image is ours and was probed when it came in; this reads its size and looks again.
        let probed = probe(&mut &source, &ProbeLimits { max_virtual_size: u64::MAX })
            .map_err(|refusal| StorageError::Damaged { path: path.to_owned(), why: refusal.to_string() })?;
        let disk = Disk { path: &part.path, format };
        let target = prepare(disk, &part.file, probed.virtual_size).context("write", &part.path)?;
        let source = Disk { path, format: from };
        tool.convert(source, target, stored_limit(probed.virtual_size), cancel, |done| {
            progress.send_replace(ImportProgress { stage: ImportStage::Convert, done, total: Some(10_000) });
        })?;
    }
    if part.publish(&to, 0o644)? {
        Ok(())
    } else {
        Err(StorageError::Conflict {
            what: to.display().to_string(),
            difference: "an export never replaces a file".to_owned(),
        })
    }
}

fn copy(
    source: &File,
    path: &Path,
    part: &Scratch,
    progress: &watch::Sender<ImportProgress>,
    cancel: &CancellationToken,
) -> Result<(), StorageError> {
    if files::reflink(source, &part.file) {
        return Ok(());
    }
    let total = Some(source.metadata().context("look at", path)?.len());
    files::copy_sparse(source, path, &part.file, &part.path, cancel, |done| {
        progress.send_replace(ImportProgress { stage: ImportStage::Store, done, total });
    })?;
    Ok(())
}

/// Makes the target ourselves where we know how.
fn prepare<'a>(disk: Disk<'a>, file: &File, virtual_size: u64) -> std::io::Result<Target<'a>> {
    match disk.format {
        ImageFormat::Raw => {
            file.set_len(virtual_size)?;
            Ok(Target::Prepared(disk))
        }
        ImageFormat::Qcow2 => {
            qcow2::Empty::new(virtual_size, None).write(file)?;
            Ok(Target::Prepared(disk))
        }
        ImageFormat::Vmdk | ImageFormat::Vdi | ImageFormat::Vhdx => Ok(Target::Fresh(disk)),
    }
}

/// A hidden name beside the target, on the same file system.
fn part_of(to: &Path) -> Result<std::path::PathBuf, StorageError> {
    let name = to.file_name().ok_or_else(|| StorageError::Invalid {
        what: "export path",
        why: format!("{} names no file", to.display()),
    })?;
    let mut part = std::ffi::OsString::from(format!(".{}-", uuid::Uuid::new_v4().simple()));
    part.push(name);
    part.push(".part");
    Ok(to.with_file_name(part))
}
