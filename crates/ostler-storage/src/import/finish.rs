//! From a complete upload to a stored image, on one thread from top to bottom.
//!
//! upload → checksum → unpack → probe → check (qcow2) or convert (vmdk, vdi, vhdx) → probe again → digest → record →
//! rename into place. Each step writes only to files of its own under `incoming/`, so a run that was killed anywhere is
//! simply begun again. The record is written before the rename: whoever asks again after a crash gets the same
//! result, from the record and whichever of the two names the file has by then.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    FinishOptions, ImageRef, ImportProgress, ImportStage, ImportedImage, check_digest,
    staging::{Staging, read_json, write_json},
    unpack::unpack,
};
use crate::{
    Compression, ImageFormat, ImportError, ProbeLimits, ProbedImage, QemuImg, StorageError,
    files::{self, Context, Scratch},
    probe::probe,
    qcow2,
    tool::{Disk, Target},
};

/// Room for tables and headers beside the guest's bytes.
const OVERHEAD: u64 = 64 << 20;

/// What was decided, before it is visible.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    result: ImportedImage,
    /// Name of the file under `incoming/` that becomes the stored one.
    file: String,
}

/// Progress and cancellation of the running import.
pub(super) struct Step<'a> {
    pub(super) progress: &'a watch::Sender<ImportProgress>,
    pub(super) cancel: &'a CancellationToken,
}

impl Step<'_> {
    pub(super) fn check(&self) -> Result<(), StorageError> {
        if self.cancel.is_cancelled() { Err(StorageError::Cancelled) } else { Ok(()) }
    }

    pub(super) fn report(&self, progress: ImportProgress) {
        self.progress.send_replace(progress);
    }

    fn bytes(&self, stage: ImportStage, total: u64) -> impl FnMut(u64) {
        move |done| self.report(ImportProgress { stage, done, total: Some(total) })
    }
}

/// Runs the import `staging` to its end. Blocks the thread.
pub(super) fn finish(
    dir: &Path,
    staging: &Staging,
    tool: &QemuImg,
    options: &FinishOptions,
    cancel: &CancellationToken,
) -> Result<ImportedImage, ImportError> {
    if let Some(expected) = &options.expected_sha256 {
        check_digest(expected)?;
    }
    let _lock = staging.lock()?;
    if let Some(result) = resume(dir, staging)? {
        return Ok(result);
    }
    staging.remove_intermediate()?;
    let step = Step { progress: &options.progress, cancel };
    let outcome = import(dir, staging, tool, options, &step);
    if outcome.is_err() {
        // The first error is the one that counts; what stays is swept later.
        let _ = staging.remove_intermediate();
    }
    outcome
}

/// The way from a record to a stored file; `None` when there is no record that still holds.
fn resume(dir: &Path, staging: &Staging) -> Result<Option<ImportedImage>, ImportError> {
    let Some(record) = read_json::<Record>(&staging.done())? else { return Ok(None) };
    let name = record.result.image_ref().file_name()?;
    let (stored, work) = (dir.join(name), staging.incoming().join(&record.file));
    if !stored.exists() {
        if !work.exists() {
            // Stored once and deleted since.
            files::remove(&staging.done())?;
            return Ok(None);
        }
        publish(&work, &stored)?;
    }
    staging.remove_sources()?;
    Ok(Some(record.result))
}

fn publish(work: &Path, stored: &Path) -> Result<(), StorageError> {
    let file = files::open_regular(work)?;
    files::set_mode(&file, work, 0o444)?;
    file.sync_all().context("sync", work)?;
    // The same bytes may have come in under another id meanwhile: then the name is taken by their equal.
    files::rename_new(work, stored)?;
    files::sync_dir(stored.parent().expect("a stored image has a folder"))
}

fn import(
    dir: &Path,
    staging: &Staging,
    tool: &QemuImg,
    options: &FinishOptions,
    step: &Step<'_>,
) -> Result<ImportedImage, ImportError> {
    let limits = &options.limits;
    let upload_path = staging.upload();
    let mut upload = match open_rw(&upload_path) {
        Err(StorageError::NotFound { .. }) => {
            return Err(StorageError::NotFound { what: format!("the upload {}", staging.id()) }.into());
        }
        other => other?,
    };
    let source_sha256 = hash(&upload, &upload_path, ImportStage::Checksum, step)?;
    if let Some(expected) = &options.expected_sha256
        && *expected != source_sha256
    {
        return Err(StorageError::Checksum {
            what: "the uploaded file".to_owned(),
            expected: expected.clone(),
            actual: source_sha256,
        }
        .into());
    }

    let mut work = upload_path.clone();
    let mut sha256 = source_sha256.clone();
    let compression = detect_compression(&mut upload, &upload_path)?;
    if compression != Compression::None {
        work = staging.plain();
        let scratch = Scratch::create(work.clone())?;
        upload.seek(SeekFrom::Start(0)).context("read", &upload_path)?;
        unpack(&upload, &upload_path, compression, &scratch, unpacked_limit(limits), step)?;
        scratch.keep();
    }
    let source = probe_file(&work, limits)?;
    let mut probed = source.clone();
    match source.format {
        ImageFormat::Raw => {}
        ImageFormat::Qcow2 => {
            step.report(ImportProgress { stage: ImportStage::Check, done: 0, total: None });
            tool.check(&work, step.cancel)??;
        }
        ImageFormat::Vmdk | ImageFormat::Vdi | ImageFormat::Vhdx => {
            let from = Disk { path: &work, format: source.format };
            let converted = convert(staging, tool, from, source.virtual_size, step)?;
            probed = probe_file(&converted, limits)?;
            if (probed.format, probed.virtual_size) != (ImageFormat::Qcow2, source.virtual_size) {
                return Err(StorageError::Damaged {
                    path: converted,
                    why: format!("the conversion made {} of {} bytes", probed.format, probed.virtual_size),
                }
                .into());
            }
            work = converted;
        }
    }
    if work != upload_path {
        let file = open_rw(&work)?;
        sha256 = hash(&file, &work, ImportStage::Store, step)?;
    }
    step.check()?;
    let stored_size = std::fs::metadata(&work).context("look at", &work)?.size();
    let result = ImportedImage {
        sha256,
        source_sha256,
        format: probed.format,
        source_format: source.format,
        content: probed.content,
        virtual_size: probed.virtual_size,
        stored_size,
    };
    store(dir, staging, &work, result)
}

/// Records the result, gives the file its name and clears away the rest.
fn store(
    dir: &Path,
    staging: &Staging,
    work: &Path,
    result: ImportedImage,
) -> Result<ImportedImage, ImportError> {
    let image: ImageRef = result.image_ref();
    let stored = dir.join(image.file_name()?);
    // On disk before the record says that they are.
    files::open_regular(work)?.sync_all().context("sync", work)?;
    let file =
        work.file_name().and_then(|name| name.to_str()).expect("staging files have plain names").to_owned();
    write_json(&staging.done(), &Record { result: result.clone(), file })?;
    publish(work, &stored)?;
    staging.remove_sources()?;
    Ok(result)
}

fn convert(
    staging: &Staging,
    tool: &QemuImg,
    source: Disk<'_>,
    virtual_size: u64,
    step: &Step<'_>,
) -> Result<PathBuf, ImportError> {
    let path = staging.converted();
    let scratch = Scratch::create(path.clone())?;
    qcow2::Empty::new(virtual_size, None).write(&scratch.file).context("write", &path)?;
    let target = Target::Prepared(Disk { path: &path, format: ImageFormat::Qcow2 });
    tool.convert(source, target, stored_limit(virtual_size), step.cancel, |done| {
        step.report(ImportProgress { stage: ImportStage::Convert, done, total: Some(10_000) });
    })?;
    scratch.keep();
    Ok(path)
}

/// Opens a file of ours that must be there, also for digging holes.
fn open_rw(path: &Path) -> Result<File, StorageError> {
    use std::os::unix::fs::OpenOptionsExt;
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .context("open", path)
}

fn hash(file: &File, path: &Path, stage: ImportStage, step: &Step<'_>) -> Result<String, StorageError> {
    let total = file.metadata().context("look at", path)?.len();
    files::digest(file, path, true, step.cancel, step.bytes(stage, total))
}

fn detect_compression(file: &mut File, path: &Path) -> Result<Compression, StorageError> {
    let mut head = [0u8; 8];
    file.seek(SeekFrom::Start(0)).context("read", path)?;
    let read = files::read_full(file as &mut dyn Read, &mut head).context("read", path)?;
    Ok(Compression::detect(&head[..read]))
}

fn probe_file(path: &Path, limits: &ProbeLimits) -> Result<ProbedImage, ImportError> {
    let mut file = files::open_regular(path)?;
    Ok(probe(&mut file, limits)?)
}

/// Bytes that a compressed upload may unpack to: the largest image and its tables.
fn unpacked_limit(limits: &ProbeLimits) -> u64 {
    stored_limit(limits.max_virtual_size)
}

/// Bytes that a file with this many guest bytes may have.
pub(super) fn stored_limit(virtual_size: u64) -> u64 {
    virtual_size.saturating_add(virtual_size / 512).saturating_add(OVERHEAD).min(i64::MAX as u64)
}
