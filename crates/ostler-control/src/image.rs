//! Images: their records, uploads, downloads and end. The import itself is in `image_import`.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use ostler_api::image::{
    Image, ImageContent, ImageCreate, ImageData, ImageFormat, ImagePatch, ImagePhase, ImageSpec, ImageStatus,
    UploadState,
};
use ostler_api::metadata::labels_check;
use ostler_api::operation::{Accepted, OperationPhase};
use ostler_api::{ApiError, ErrorCode, Fault, ImageId, Kind, Metadata, OperationId, Time};
use ostler_storage::{ImageRef, ImportProgress, StorageError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::event::target;
use crate::idempotency::{Idempotency, remember};
use crate::operation::{Step, advance, begin};
use crate::permission::{Owner, Verb};
use crate::vm_act::check_match;
use crate::vm_create::{check_rename, taken};

/// A stored image's file, for sending.
#[derive(Debug, Clone)]
pub struct ImageFile {
    pub path: PathBuf,
    pub size: u64,
    pub sha256: String,
    pub format: ImageFormat,
}

/// How the storage driver names it.
pub(crate) const fn to_storage(format: ImageFormat) -> ostler_storage::ImageFormat {
    match format {
        ImageFormat::Raw => ostler_storage::ImageFormat::Raw,
        ImageFormat::Qcow2 => ostler_storage::ImageFormat::Qcow2,
        ImageFormat::Vmdk => ostler_storage::ImageFormat::Vmdk,
        ImageFormat::Vdi => ostler_storage::ImageFormat::Vdi,
        ImageFormat::Vhdx => ostler_storage::ImageFormat::Vhdx,
    }
}

pub(crate) const fn from_storage(format: ostler_storage::ImageFormat) -> ImageFormat {
    match format {
        ostler_storage::ImageFormat::Raw => ImageFormat::Raw,
        ostler_storage::ImageFormat::Qcow2 => ImageFormat::Qcow2,
        ostler_storage::ImageFormat::Vmdk => ImageFormat::Vmdk,
        ostler_storage::ImageFormat::Vdi => ImageFormat::Vdi,
        ostler_storage::ImageFormat::Vhdx => ImageFormat::Vhdx,
    }
}

pub(crate) const fn content(content: ostler_storage::ImageContent) -> ImageContent {
    match content {
        ostler_storage::ImageContent::Disk => ImageContent::Disk,
        ostler_storage::ImageContent::Iso => ImageContent::Iso,
        ostler_storage::ImageContent::Kernel => ImageContent::Kernel,
        ostler_storage::ImageContent::Initrd => ImageContent::Initrd,
    }
}

pub(crate) fn image_ref(data: &ImageData) -> ImageRef {
    ImageRef { sha256: data.sha256.clone(), format: to_storage(data.format) }
}

/// What a caller learns of a fault of the image store.
pub(crate) fn storage_error(error: &StorageError) -> ApiError {
    match error {
        StorageError::NoSpace { .. } => ApiError::new(ErrorCode::NoSpace, error.to_string())
            .hint("free space, then go on from where it was"),
        StorageError::Busy { .. } => ApiError::conflict("somebody else is uploading this image")
            .hint("wait until that upload ends, or create another image"),
        StorageError::Cancelled => ApiError::conflict("it was cancelled"),
        _ => ApiError::internal(format!("{error}: {error:?}")),
    }
}

fn check(request: &ImageCreate) -> Result<(), ApiError> {
    labels_check(&request.labels).map_err(|error| ApiError::invalid("labels", error))?;
    if let Some(url) = &request.url {
        if !(url.starts_with("http://") || url.starts_with("https://")) {
            return Err(ApiError::invalid("url", "only http and https addresses can be fetched")
                .hint("upload a file: ostler image import NAME FILE"));
        }
        if url.len() > 2048 {
            return Err(ApiError::invalid("url", "an address has at most 2048 characters"));
        }
    }
    if let Some(sha256) = &request.expected_sha256
        && !(sha256.len() == 64 && sha256.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
    {
        return Err(ApiError::invalid("expected_sha256", "a SHA-256 is 64 lower-case hexadecimal digits"));
    }
    Ok(())
}

/// Who uses an image: the first few by name, and how many.
pub(crate) fn users(tables: &Tables, image: ImageId) -> Vec<String> {
    let volumes = tables
        .volumes
        .iter()
        .filter(|volume| volume.spec.image.as_ref().is_some_and(|used| used.image == image));
    let vms = tables.vms.iter().filter(|vm| {
        let boots = vm.spec.kernel.as_ref().is_some_and(|kernel| {
            kernel.kernel.image == image || kernel.initrd.as_ref().is_some_and(|initrd| initrd.image == image)
        });
        boots || vm.spec.cdrom.as_ref().is_some_and(|cdrom| cdrom.image == image)
    });
    let volumes = volumes.map(|volume| format!("volume {}", volume.metadata.name));
    volumes.chain(vms.map(|vm| format!("VM {}", vm.metadata.name))).collect()
}

fn in_use(name: &str, users: &[String]) -> ApiError {
    let some = users.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
    let more = users.len().saturating_sub(3);
    let rest = if more == 0 { String::new() } else { format!(" and {more} more") };
    ApiError::new(ErrorCode::InUse, format!("image {name} is used by {some}{rest}"))
        .hint("delete those first")
}

impl Cloud {
    /// A new image without data. With a URL the server fetches it, else it is uploaded.
    pub async fn image_create(
        &self,
        caller: &Caller,
        project: Option<&str>,
        request: ImageCreate,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted<Arc<Image>>, ApiError> {
        check(&request)?;
        if let Some(made) = self.made_before(caller, idempotency.as_ref()).await? {
            return self.accepted(caller, made.id, made.operation);
        }
        let (id, operation) = (ImageId::new(), OperationId::new());
        self.commit(|tables, change| {
            let project = self.project(tables, caller, project, Verb::Create, Kind::Image)?;
            if tables.images.named(Some(&project), &request.name).is_some() {
                return Err(taken(Kind::Image, &request.name));
            }
            let mut metadata = Metadata::new(id.into(), request.name.clone(), Some(project.clone()));
            metadata.labels = request.labels.clone();
            let image = Image {
                metadata,
                spec: ImageSpec {
                    url: request.url.clone(),
                    expected_sha256: request.expected_sha256.clone(),
                },
                status: ImageStatus { phase: ImagePhase::Queued, reason: None, data: None },
            };
            change.create(&image)?;
            let begun =
                begin(operation, Some(project), "image.import", target(&image), OperationPhase::Pending)?;
            change.create(&begun)?;
            remember(change, caller, idempotency.as_ref(), id.into(), Some(operation))
        })
        .await?;
        self.accepted(caller, id.into(), Some(operation))
    }

    pub async fn image_patch(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        if_match: Option<u64>,
        patch: ImagePatch,
    ) -> Result<Arc<Image>, ApiError> {
        if let Some(labels) = &patch.labels {
            labels_check(labels).map_err(|error| ApiError::invalid("labels", error))?;
        }
        let id = self
            .commit(|tables, change| {
                let image = self.find::<Image>(tables, caller, Verb::Update, project, name)?;
                check_match(image.metadata.revision, if_match)?;
                let mut new = Image::clone(&image);
                if let Some(name) = &patch.name {
                    check_rename(tables, image.as_ref(), name)?;
                    new.metadata.name = name.clone();
                }
                if let Some(labels) = &patch.labels {
                    new.metadata.labels.clone_from(labels);
                }
                if new != *image {
                    change.update(image.as_ref(), &new)?;
                }
                Ok(image.metadata.id)
            })
            .await?;
        self.get::<Image>(caller, Some("*"), &id.to_string())
    }

    /// An image that waits for its data from this caller.
    fn uploadable(&self, caller: &Caller, project: Option<&str>, name: &str) -> Result<Arc<Image>, ApiError> {
        let image = self.find::<Image>(&self.cache.read(), caller, Verb::Update, project, name)?;
        match image.status.phase {
            ImagePhase::Queued | ImagePhase::Uploading if image.spec.url.is_none() => Ok(image),
            ImagePhase::Queued | ImagePhase::Uploading => {
                Err(ApiError::conflict(format!("image {} is fetched by the server", image.metadata.name)))
            }
            phase => Err(ApiError::conflict(format!("image {} is {phase}", image.metadata.name))
                .hint("data is uploaded once; create another image")),
        }
    }

    /// How many bytes are safely here.
    pub async fn image_upload_offset(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
    ) -> Result<UploadState, ApiError> {
        let image = self.uploadable(caller, project, name)?;
        let id = image.metadata.id.to_string();
        let upload = self.images.upload(&id).await.map_err(|error| storage_error(&error))?;
        Ok(UploadState { offset: upload.offset() })
    }

    /// Appends `body` at `offset`. What came before a break is kept. With `last` the import begins.
    pub async fn image_upload(
        self: &Arc<Self>,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        offset: u64,
        last: bool,
        body: impl Stream<Item = io::Result<Bytes>> + Send,
    ) -> Result<UploadState, ApiError> {
        let image = self.uploadable(caller, project, name)?;
        let id = image.metadata.id;
        let mut upload = self.images.upload(&id.to_string()).await.map_err(|error| storage_error(&error))?;
        if upload.offset() != offset {
            let at = upload.offset();
            return Err(ApiError::conflict(format!(
                "{at} bytes are here; the data goes on there, not at {offset}"
            ))
            .hint("ask for the offset: GET /v1/images/{image}/upload"));
        }
        self.image_phase(id, &[ImagePhase::Queued], ImagePhase::Uploading).await?;
        let mut body = std::pin::pin!(body);
        let result = loop {
            match body.next().await {
                None => break Ok(()),
                Some(Err(error)) => {
                    break Err(ApiError::invalid("body", "the upload broke off")
                        .log(error)
                        .hint("go on from the offset: GET /v1/images/{image}/upload"));
                }
                Some(Ok(bytes)) => {
                    // Compressed data is smaller than the image; larger than the largest image it cannot be.
                    if upload.offset() + bytes.len() as u64 > self.config.image_max.0 {
                        break Err(ApiError::new(
                            ErrorCode::TooLarge,
                            format!("an image has at most {}", self.config.image_max),
                        ));
                    }
                    if let Err(error) = upload.write(bytes).await {
                        break Err(storage_error(&error));
                    }
                }
            }
        };
        upload.sync().await.map_err(|error| storage_error(&error))?;
        let state = UploadState { offset: upload.offset() };
        drop(upload);
        result?;
        if last {
            self.image_phase(id, &[ImagePhase::Queued, ImagePhase::Uploading], ImagePhase::Importing).await?;
            if let Some(image) = self.cache.read().images.get(id).cloned() {
                self.import_begin(&image);
            }
        }
        Ok(state)
    }

    /// Moves an image on, if it is in one of these phases.
    pub(crate) async fn image_phase(
        &self,
        id: uuid::Uuid,
        from: &[ImagePhase],
        to: ImagePhase,
    ) -> Result<(), ApiError> {
        self.commit(|tables, change| {
            let Some(old) = tables.images.get(id).filter(|old| from.contains(&old.status.phase)) else {
                return Ok(());
            };
            let mut new = Image::clone(old);
            new.status.phase = to;
            change.update(old.as_ref(), &new)
        })
        .await
    }

    /// The file of an active image.
    pub fn image_file(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
    ) -> Result<ImageFile, ApiError> {
        let image = self.find::<Image>(&self.cache.read(), caller, Verb::Read, project, name)?;
        match (&image.status.phase, &image.status.data) {
            (ImagePhase::Active, Some(data)) => Ok(self.file(data)),
            (phase, _) => {
                Err(ApiError::conflict(format!("image {} is {phase} and has no data", image.metadata.name)))
            }
        }
    }

    fn file(&self, data: &ImageData) -> ImageFile {
        ImageFile {
            path: self.images.path(&image_ref(data)),
            size: data.size.0,
            sha256: data.sha256.clone(),
            format: data.format,
        }
    }

    /// The file of an image that something on this node needs, by its checksum.
    pub fn node_image(&self, caller: &Caller, node: &str, sha256: &str) -> Result<ImageFile, ApiError> {
        caller.may(Verb::Serve, Kind::Node, Owner::Node(node), node)?;
        let tables = self.cache.read();
        let missing = || ApiError::not_found(Kind::Image, sha256);
        let name = ostler_api::Name::new(node).map_err(|_| missing())?;
        let on_node = tables.on_node.get(&name).ok_or_else(missing)?;
        let volumes = on_node.volumes.iter().filter_map(|id| tables.volumes.get(*id));
        let by_volume = volumes.filter_map(|volume| volume.spec.image.as_ref());
        let vms = on_node.vms.iter().filter_map(|id| tables.vms.get(*id));
        let by_vm = vms.flat_map(|vm| {
            let kernel = vm.spec.kernel.as_ref();
            let initrd = kernel.and_then(|kernel| kernel.initrd.as_ref());
            kernel.map(|kernel| &kernel.kernel).into_iter().chain(initrd).chain(vm.spec.cdrom.as_ref())
        });
        let used = by_volume.chain(by_vm).find(|used| used.sha256 == sha256).ok_or_else(missing)?;
        let image = tables.images.get(used.image.into()).ok_or_else(missing)?;
        image.status.data.as_ref().map(|data| self.file(data)).ok_or_else(missing)
    }

    /// An active image in another format, as a new file that the caller removes.
    pub async fn image_export(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        format: ImageFormat,
        cancel: CancellationToken,
    ) -> Result<ImageFile, ApiError> {
        let file = self.image_file(caller, project, name)?;
        let source = ImageRef { sha256: file.sha256.clone(), format: to_storage(file.format) };
        // Beside the uploads, where what a killed server leaves is swept.
        let dir = file
            .path
            .parent()
            .map(|dir| dir.join("incoming"))
            .ok_or_else(|| ApiError::internal("no directory"))?;
        let path = dir.join(format!("export-{}", uuid::Uuid::now_v7()));
        let (progress, _) = watch::channel(ImportProgress::default());
        self.images
            .export(&source, to_storage(format), &path, &progress, &cancel)
            .await
            .map_err(|error| storage_error(&error))?;
        let size = tokio::fs::metadata(&path).await.map_err(ApiError::internal)?.len();
        Ok(ImageFile { path, size, sha256: file.sha256, format })
    }

    /// Deletes an image that nothing uses.
    pub async fn image_delete(
        self: &Arc<Self>,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        if_match: Option<u64>,
    ) -> Result<Accepted<Arc<Image>>, ApiError> {
        let fresh = OperationId::new();
        let before = self
            .commit(|tables, change| {
                let image = self.find::<Image>(tables, caller, Verb::Delete, project, name)?;
                check_match(image.metadata.revision, if_match)?;
                let users = users(tables, image.metadata.id.into());
                if !users.is_empty() {
                    return Err(in_use(image.metadata.name.as_str(), &users));
                }
                if image.metadata.deleted.is_none() {
                    // From here on no new VM can take it: creating one compares the image's revision.
                    let mut new = Image::clone(&image);
                    new.metadata.deleted = Some(Time::now());
                    new.status.phase = ImagePhase::Deleting;
                    change.update(image.as_ref(), &new)?;
                    let project = image.metadata.project.clone();
                    let begun = begin(
                        fresh,
                        project,
                        "image.delete",
                        target(image.as_ref()),
                        OperationPhase::Running,
                    )?;
                    change.create(&begun)?;
                }
                Ok(image)
            })
            .await?;
        let id = before.metadata.id;
        let marked = self.cache.read().images.get(id).cloned();
        if let Some(image) = marked {
            self.image_clear(&image).await?;
        }
        Ok(self.going(before, Some(fresh)))
    }

    /// Gives up an image whose data never came. Somebody who is just sending it keeps it.
    pub(crate) async fn image_abandon(&self, image: &Image) -> Result<(), ApiError> {
        let id = image.metadata.id;
        match self.images.upload(&id.to_string()).await {
            Ok(_) => {}
            Err(StorageError::Busy { .. }) => return Ok(()),
            Err(error) => return Err(storage_error(&error)),
        }
        self.commit(|tables, change| {
            let waits =
                |image: &Image| matches!(image.status.phase, ImagePhase::Queued | ImagePhase::Uploading);
            let Some(old) = tables.images.get(id).filter(|old| waits(old)) else { return Ok(()) };
            let fault =
                Fault::new("abandoned", "its data did not come within a day; delete it and import it again");
            for operation in tables.open_on(id) {
                advance(tables, change, operation, Step::Failed(fault.clone()))?;
            }
            let mut new = Image::clone(old);
            new.status.phase = ImagePhase::Error;
            new.status.reason = Some(fault);
            change.update(old.as_ref(), &new)
        })
        .await?;
        self.images.discard(&id.to_string()).await.map_err(|error| storage_error(&error))
    }

    /// Finishes the deletion of an image: its import stops, its record goes, its file is swept.
    pub(crate) async fn image_clear(&self, image: &Image) -> Result<(), ApiError> {
        let id = image.metadata.id;
        self.imports.stop(id).await;
        let used = self
            .commit(|tables, change| {
                let Some(old) = tables.images.get(id).filter(|old| old.metadata.deleted.is_some()) else {
                    return Ok(None);
                };
                let users = users(tables, id.into());
                let fault = Fault::new("cancelled", "the image is deleted");
                let mut imports = Vec::new();
                for operation in tables.open_on(id) {
                    imports.push(operation);
                }
                if users.is_empty() {
                    for operation in imports {
                        let delete = tables
                            .operations
                            .get(operation.into())
                            .is_some_and(|operation| operation.spec.action == "image.delete");
                        let step = if delete { Step::Succeeded } else { Step::Cancelled(fault.clone()) };
                        advance(tables, change, operation, step)?;
                    }
                    change.delete(old.as_ref());
                    return Ok(None);
                }
                // A VM was created from it in the moment before the mark: it stays.
                for operation in imports {
                    let fault = Fault::new("in_use", format!("it is used by {}", users.join(", ")));
                    advance(tables, change, operation, Step::Failed(fault))?;
                }
                let mut new = Image::clone(old);
                new.metadata.deleted = None;
                new.status.phase =
                    if new.status.data.is_some() { ImagePhase::Active } else { ImagePhase::Error };
                change.update(old.as_ref(), &new)?;
                Ok(Some(users))
            })
            .await?;
        if let Some(users) = used {
            return Err(in_use(image.metadata.name.as_str(), &users));
        }
        self.images.discard(&id.to_string()).await.map_err(|error| storage_error(&error))?;
        self.sweep_files().await
    }

    /// Removes files that no image refers to, unless an import is about to make one refer to its file.
    pub(crate) async fn sweep_files(&self) -> Result<(), ApiError> {
        let Some(_quiet) = self.imports.quiet() else { return Ok(()) };
        let stored = self.images.list().map_err(|error| storage_error(&error))?;
        for file in stored {
            let wanted = self
                .cache
                .read()
                .images
                .iter()
                .any(|image| image.status.data.as_ref().is_some_and(|data| data.sha256 == file.sha256));
            if !wanted {
                self.images.delete(&file).await.map_err(|error| storage_error(&error))?;
            }
        }
        Ok(())
    }
}
