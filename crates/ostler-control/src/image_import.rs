//! Imports under way: one task per image, found again after a restart, cancelled by people, by deletion or by the
//! server's end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ostler_api::event::Severity;
use ostler_api::image::{Image, ImageData, ImagePhase};
use ostler_api::operation::Progress;
use ostler_api::{ApiError, ByteSize, Fault, OperationId};
use ostler_storage::{
    FetchPolicy, FinishOptions, ImportError, ImportProgress, ImportedImage, ProbeLimits, StorageError,
};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cloud::Cloud;
use crate::commit::Change;
use crate::event::target;
use crate::image::{content, from_storage};
use crate::operation::{Step, advance};

/// How often progress is written.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct Job {
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

/// The imports of this server.
#[derive(Debug, Default)]
pub(crate) struct Imports {
    jobs: Mutex<Jobs>,
}

#[derive(Debug, Default)]
struct Jobs {
    running: HashMap<Uuid, Job>,
    /// Files are being swept: nothing may begin.
    sweeping: bool,
    stopped: bool,
}

/// While it lives no import begins.
#[derive(Debug)]
pub(crate) struct Quiet<'a>(&'a Imports);

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        self.0.jobs.lock().sweeping = false;
    }
}

impl Imports {
    /// Keeps imports from beginning; none when one is under way.
    pub(crate) fn quiet(&self) -> Option<Quiet<'_>> {
        let mut jobs = self.jobs.lock();
        if jobs.sweeping || !jobs.running.is_empty() {
            return None;
        }
        jobs.sweeping = true;
        Some(Quiet(self))
    }

    /// Ends the import of one image, without a word about it.
    pub(crate) async fn stop(&self, image: Uuid) {
        let job = self.jobs.lock().running.remove(&image);
        if let Some(job) = job {
            job.cancel.cancel();
            // However it ended.
            let _ = job.task.await;
        }
    }

    /// Ends all, for the server's end; they are taken up again at the next start.
    pub(crate) async fn stop_all(&self) {
        let jobs = {
            let mut jobs = self.jobs.lock();
            jobs.stopped = true;
            std::mem::take(&mut jobs.running)
        };
        for job in jobs.into_values() {
            job.cancel.cancel();
            let _ = job.task.await;
        }
    }
}

/// How an import ended, when it was not cut short.
enum End {
    Imported(Box<ImportedImage>),
    Failed(Fault),
    /// Somebody cancelled the operation.
    Cancelled,
    /// The image is deleted or the server stops: nothing to write.
    Stopped,
}

impl Cloud {
    /// Begins or takes up the import of an image; does nothing when it is under way.
    pub(crate) fn import_begin(self: &Arc<Self>, image: &Arc<Image>) {
        let id = image.metadata.id;
        let mut jobs = self.imports.jobs.lock();
        if jobs.stopped || jobs.sweeping || jobs.running.contains_key(&id) {
            // The images' controller comes again.
            return;
        }
        let cancel = CancellationToken::new();
        let task = tokio::spawn(import(Arc::clone(self), Arc::clone(image), cancel.clone()));
        jobs.running.insert(id, Job { cancel, task });
    }

    /// Wakes the import that works for a cancelled operation.
    pub(crate) fn image_cancel(&self, operation: Uuid) {
        let tables = self.cache.read();
        let Some(operation) = tables.operations.get(operation).filter(|operation| operation.spec.cancel)
        else {
            return;
        };
        let id = operation.spec.target.id;
        if let Some(job) = self.imports.jobs.lock().running.get(&id) {
            job.cancel.cancel();
        }
    }

    fn import_operation(&self, image: Uuid) -> Option<(OperationId, bool)> {
        let tables = self.cache.read();
        tables
            .open_on(image)
            .filter_map(|id| tables.operations.get(id.into()))
            .find(|operation| operation.spec.action == "image.import")
            .map(|operation| (operation.metadata.id.into(), operation.spec.cancel))
    }
}

async fn import(cloud: Arc<Cloud>, image: Arc<Image>, cancel: CancellationToken) {
    let id = image.metadata.id;
    let (progress, seen) = watch::channel(ImportProgress::default());
    let told = tokio::spawn(tell(Arc::clone(&cloud), id, seen));
    let end = run(&cloud, &image, progress, &cancel).await;
    told.abort();
    let stopped = matches!(end, End::Stopped);
    if !stopped && let Err(error) = finish(&cloud, id, end).await {
        tracing::warn!(image = %id, %error, internal = error.internal, "the end of an import could not be written; trying again");
    }
    if !stopped {
        cloud.imports.jobs.lock().running.remove(&id);
        let still =
            cloud.cache.read().images.get(id).is_some_and(|image| image.status.phase == ImagePhase::Active);
        if still && let Err(error) = cloud.images.discard(&id.to_string()).await {
            tracing::warn!(image = %id, %error, "the staging files of an import could not be removed");
        }
    }
}

async fn run(
    cloud: &Arc<Cloud>,
    image: &Image,
    progress: watch::Sender<ImportProgress>,
    cancel: &CancellationToken,
) -> End {
    let id = image.metadata.id;
    let limits = ProbeLimits { max_virtual_size: cloud.config.image_max.0 };
    if let (Some(url), ImagePhase::Queued) = (&image.spec.url, image.status.phase) {
        let policy = FetchPolicy {
            allow_private: cloud.config.fetch_private,
            max_size: cloud.config.image_max.0,
            ..FetchPolicy::default()
        };
        let mut upload = match cloud.images.upload(&id.to_string()).await {
            Ok(upload) => upload,
            Err(error) => return failed(error.code(), &error),
        };
        match ostler_storage::fetch(url, &policy, &mut upload, &progress, cancel).await {
            Ok(()) => {}
            Err(ostler_storage::FetchError::Cancelled) => return cut(cloud, id),
            Err(error) => return failed(error.code(), &error),
        }
        drop(upload);
        if let Err(error) = cloud.image_phase(id, &[ImagePhase::Queued], ImagePhase::Importing).await {
            return failed("store", &error);
        }
    }
    let options = FinishOptions {
        expected_sha256: image.spec.expected_sha256.clone(),
        limits,
        progress,
        cancel: cancel.clone(),
    };
    match cloud.images.finish(&id.to_string(), options).await {
        Ok(imported) => End::Imported(Box::new(imported)),
        Err(ImportError::Storage(StorageError::Cancelled)) => cut(cloud, id),
        Err(_) if cancel.is_cancelled() => cut(cloud, id),
        Err(error) => failed(error.code(), &error),
    }
}

fn failed(code: &str, error: &dyn std::error::Error) -> End {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !message.contains(&cause_text) {
            message = format!("{message}: {cause_text}");
        }
        source = cause.source();
    }
    End::Failed(Fault::new(code, message))
}

/// Why the work was cut short.
fn cut(cloud: &Cloud, image: Uuid) -> End {
    match cloud.import_operation(image) {
        Some((_, true)) => End::Cancelled,
        Some((_, false)) | None => End::Stopped,
    }
}

async fn finish(cloud: &Cloud, id: Uuid, end: End) -> Result<(), ApiError> {
    cloud
        .commit(|tables, change: &mut Change| {
            let Some(old) = tables.images.get(id).filter(|old| old.metadata.deleted.is_none()) else {
                return Ok(());
            };
            let mut new = Image::clone(old);
            let name = &old.metadata.name;
            let (severity, code, message, step) = match &end {
                End::Imported(imported) => {
                    new.status.phase = ImagePhase::Active;
                    new.status.reason = None;
                    new.status.data = Some(data(imported));
                    (Severity::Info, "image.active", format!("image {name} is active"), Step::Succeeded)
                }
                End::Failed(fault) => {
                    new.status.phase = ImagePhase::Error;
                    new.status.reason = Some(fault.clone());
                    let message = format!("image {name} could not be imported: {}", fault.message);
                    (Severity::Error, "image.failed", message, Step::Failed(fault.clone()))
                }
                End::Cancelled => {
                    let fault = Fault::new("cancelled", "its import was cancelled; delete it");
                    new.status.phase = ImagePhase::Error;
                    new.status.reason = Some(fault.clone());
                    let message = format!("the import of image {name} was cancelled");
                    (Severity::Warning, "image.cancelled", message, Step::Cancelled(fault))
                }
                End::Stopped => return Ok(()),
            };
            for operation in tables.open_on(id) {
                advance(tables, change, operation, step.clone())?;
            }
            change.update(old.as_ref(), &new)?;
            change.event(old.metadata.project.clone(), severity, code, target(old.as_ref()), message)
        })
        .await
}

fn data(imported: &ImportedImage) -> ImageData {
    ImageData {
        sha256: imported.sha256.clone(),
        source_sha256: imported.source_sha256.clone(),
        format: from_storage(imported.format),
        source_format: from_storage(imported.source_format),
        content: content(imported.content),
        virtual_size: ByteSize(imported.virtual_size),
        size: ByteSize(imported.stored_size),
    }
}

/// Writes progress into the operation, now and then.
async fn tell(cloud: Arc<Cloud>, image: Uuid, mut seen: watch::Receiver<ImportProgress>) {
    while seen.changed().await.is_ok() {
        let now = *seen.borrow_and_update();
        if let Some((operation, _)) = cloud.import_operation(image) {
            let progress =
                Progress { stage: now.stage.as_str().to_owned(), done: now.done, total: now.total };
            let step = Step::Progress(progress);
            let written =
                cloud.commit(|tables, change| advance(tables, change, operation, step.clone())).await;
            if let Err(error) = written {
                tracing::debug!(%image, %error, "progress could not be written");
            }
        }
        tokio::time::sleep(PROGRESS_EVERY).await;
    }
}
