//! Brings images into this host's pool: from the control plane's store on the same host, or over the API.
//!
//! Called by volume creation and by starts that boot a kernel or have a CD. The same image is fetched once, however
//! many wait for it.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use ostler_api::Fault;
use ostler_api::image::ImageUse;
use ostler_storage::{ImageFormat, ImageRef, ImageSource, StorageError};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::Semaphore;

use crate::fault;
use crate::host::{Host, within};
use crate::machine_spec::image_format;

/// Images that come in at the same time.
const FETCHES_MAX: usize = 3;

type Flights = HashMap<ImageRef, Arc<tokio::sync::Mutex<()>>>;

#[derive(Debug)]
pub(crate) struct Images {
    flights: Mutex<Flights>,
    fetches: Semaphore,
}

impl Default for Images {
    fn default() -> Self {
        Self { flights: Mutex::default(), fetches: Semaphore::new(FETCHES_MAX) }
    }
}

pub(crate) fn image_ref(image: &ImageUse) -> ImageRef {
    ImageRef { sha256: image.sha256.clone(), format: image_format(image.format) }
}

impl Host {
    /// Makes sure that the pool has an image. `arrived` counts the bytes of a download.
    pub(crate) async fn image_ensure(&self, image: &ImageRef, arrived: &Arc<AtomicU64>) -> Result<(), Fault> {
        let flight = Arc::clone(self.images.flights.lock().entry(image.clone()).or_default());
        let result = {
            let _flight = flight.lock().await;
            self.image_bring(image, arrived).await
        };
        let mut flights = self.images.flights.lock();
        // The map's own, ours, and nobody else's.
        if Arc::strong_count(&flight) <= 2 {
            flights.remove(image);
        }
        result
    }

    async fn image_bring(&self, image: &ImageRef, arrived: &Arc<AtomicU64>) -> Result<(), Fault> {
        let times = &self.config.times;
        let failed =
            |error: StorageError| fault::storage_failed(&format!("{image} cannot be brought here"), &error);
        if within("looking for an image in the pool", times.pool, self.pool.image_present(image))
            .await?
            .map_err(failed)?
        {
            return Ok(());
        }
        let _slot = self.images.fetches.acquire().await;
        if let Some(store) = &self.config.image_source {
            let path = store.join(image.file_name().map_err(failed)?);
            if tokio::fs::try_exists(&path).await.unwrap_or(false) {
                let add = self.pool.image_add(image, ImageSource::Path(path));
                return within("copying an image into the pool", times.image, add).await?.map_err(failed);
            }
        }
        tracing::info!(%image, "downloading");
        let get = self.plane.image(&self.config.node_name, &image.sha256);
        let reader = within("asking for an image", times.request, get).await?;
        let reader =
            reader.map_err(|error| fault::fault("image_unavailable", format!("{image}: {error}")))?;
        let counted = Counted { reader, arrived: Arc::clone(arrived) };
        let add = self.pool.image_add(image, ImageSource::Stream(Box::new(counted)));
        within("downloading an image", times.image, add).await?.map_err(failed)
    }

    /// Drops an image that no resource needs. One that a volume still stands on stays until it is asked again.
    pub(crate) async fn image_drop(&self, sha256: &str) {
        for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
            let image = ImageRef { sha256: sha256.to_owned(), format };
            match within("dropping an image", self.config.times.pool, self.pool.image_remove(&image)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%image, error = fault::chain(&error), "an image stays"),
                Err(late) => tracing::warn!(%image, error = late.message, "an image stays"),
            }
        }
    }
}

impl Host {
    /// The cached images that are not among `known`: deleted while nobody told this node.
    pub(crate) async fn images_besides(&self, known: &[String]) -> Vec<ImageRef> {
        let listed =
            within("listing the pool's images", self.config.times.pool, self.pool.image_list()).await;
        let why = match listed {
            Ok(Ok(cached)) => {
                return cached.into_iter().filter(|image| !known.contains(&image.sha256)).collect();
            }
            Ok(Err(error)) => fault::chain(&error),
            Err(late) => late.message,
        };
        tracing::warn!(error = why, "the pool's images cannot be listed");
        Vec::new()
    }
}

/// Counts what passes.
struct Counted {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    arrived: Arc<AtomicU64>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let poll = Pin::new(&mut self.reader).poll_read(cx, buf);
        self.arrived.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
        poll
    }
}
