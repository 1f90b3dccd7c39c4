//! Images: making, uploading, fetching.

use ostler_api::image::{Image, ImageCreate, ImageFormat, ImagePatch, UploadState};
use ostler_api::operation::Accepted;

use crate::body::Body;
use crate::call::Call;
use crate::{Client, Delete, Result, Wait};

/// What an image is turned into on its way out.
pub type ExportFormat = ImageFormat;

/// All return the server's refusal as [`crate::ClientError::Api`].
impl Client {
    /// With a URL the server fetches it; else upload with [`Client::image_upload`].
    pub async fn image_create(&self, create: &ImageCreate, wait: Option<&Wait>) -> Result<Accepted<Image>> {
        self.json(self.scoped::<Image>(Call::post(&["images"], create)?.wait(wait))).await
    }

    pub async fn image_get(&self, image: &str) -> Result<Image> {
        self.get(image).await
    }

    pub async fn image_patch(&self, image: &str, patch: &ImagePatch, if_match: Option<u64>) -> Result<Image> {
        self.patch(image, patch, if_match).await
    }

    pub async fn image_delete(&self, image: &str, how: &Delete) -> Result<Accepted<Image>> {
        self.json(self.deletion::<Image>(image, how)).await
    }

    /// How much of it is there.
    pub async fn image_upload_state(&self, image: &str) -> Result<UploadState> {
        self.json(self.scoped::<Image>(Call::get(&["images", image, "upload"]))).await
    }

    /// Appends `body` at `offset`, which must be where the upload is. `last` begins the import. There is no time limit:
    /// a body may be of any length; after a break ask [`Client::image_upload_state`] where to go on.
    pub async fn image_upload(
        &self,
        image: &str,
        offset: u64,
        last: bool,
        body: Body,
    ) -> Result<UploadState> {
        let call = Call::upload(&["images", image, "upload"])
            .with("offset", &offset.to_string())
            .with("last", if last { "true" } else { "false" });
        self.json_of_stream(self.scoped::<Image>(call), body).await
    }

    /// The image's bytes, as stored or converted. The size is known when the server says it.
    pub async fn image_data(&self, image: &str, format: Option<ExportFormat>) -> Result<(Option<u64>, Body)> {
        let mut call = Call::get(&["images", image, "data"]);
        if let Some(format) = format {
            call = call.with("format", format.as_str());
        }
        // A conversion comes before the first byte and may take long.
        let answer = self.stream_unhurried(self.scoped::<Image>(call)).await?;
        let size =
            answer.headers().get(http::header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
        Ok((size, answer.into_body()))
    }
}
