//! Images whose import this server has to begin, take up again after a restart, or clear away.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::Time;
use ostler_api::image::{Image, ImagePhase};
use tokio_util::sync::CancellationToken;

use super::pause;
use crate::cloud::Cloud;

const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// An image whose data has not come by then is given up.
const UPLOAD_MAX: Duration = Duration::from_secs(86_400);

pub(super) async fn run(cloud: Arc<Cloud>, stop: CancellationToken) {
    let mut changes = cloud.cache.read().images.subscribe();
    let keep: Vec<String> =
        cloud.cache.read().images.iter().map(|image| image.metadata.id.to_string()).collect();
    if let Err(error) = cloud.images.sweep(&keep).await {
        tracing::warn!(%error, "staging files of images that are gone could not be swept");
    }
    if let Err(error) = cloud.sweep_files().await {
        tracing::warn!(%error, internal = error.internal, "files of images that are gone could not be swept");
    }
    while !stop.is_cancelled() {
        let images: Vec<Arc<Image>> = cloud.cache.read().images.iter().cloned().collect();
        for image in images {
            look(&cloud, &image).await;
        }
        tokio::select! {
            () = stop.cancelled() => {}
            _ = changes.recv() => {}
            () = pause(&stop, LOOK_AGAIN) => {}
        }
    }
    cloud.imports.stop_all().await;
}

async fn look(cloud: &Arc<Cloud>, image: &Arc<Image>) {
    match image.status.phase {
        ImagePhase::Queued if image.spec.url.is_some() => cloud.import_begin(image),
        ImagePhase::Importing => cloud.import_begin(image),
        ImagePhase::Deleting => {
            if let Err(error) = cloud.image_clear(image).await {
                tracing::warn!(image = %image.metadata.id, %error, internal = error.internal, "an image could not be cleared away; trying again");
            }
        }
        ImagePhase::Queued | ImagePhase::Uploading => {
            if Time::now().since(image.metadata.created) > UPLOAD_MAX
                && let Err(error) = cloud.image_abandon(image).await
            {
                tracing::warn!(image = %image.metadata.id, %error, internal = error.internal, "an abandoned upload could not be ended; trying again");
            }
        }
        ImagePhase::Active | ImagePhase::Error => {}
    }
}
