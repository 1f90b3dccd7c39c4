//! Images: uploads, what is refused, deletion against use.

use std::sync::Arc;

use bytes::Bytes;
use futures::stream;
use ostler_api::image::{Image, ImageCreate, ImagePhase};
use ostler_api::operation::{Operation, OperationPhase};
use ostler_api::{ByteSize, ErrorCode};

use super::{controllers, until};
use crate::testing::{TestCloud, name};

fn request(image: &str) -> ImageCreate {
    ImageCreate { name: name(image), labels: Default::default(), url: None, expected_sha256: None }
}

fn image(test: &TestCloud, name: &str) -> Arc<Image> {
    test.cloud.get::<Image>(&test.admin, None, name).unwrap()
}

async fn upload(
    test: &TestCloud,
    name: &str,
    offset: u64,
    last: bool,
    bytes: &[u8],
) -> Result<u64, ErrorCode> {
    let body = stream::iter([Ok(Bytes::copy_from_slice(bytes))]);
    let result = test.cloud.image_upload(&test.admin, None, name, offset, last, body).await;
    result.map(|state| state.offset).map_err(|error| error.code)
}

#[tokio::test]
async fn an_upload_in_pieces_becomes_active() {
    let test = TestCloud::new().await;
    let _act = controllers(&test);
    let made = test.cloud.image_create(&test.admin, None, request("raw"), None).await.unwrap();
    let half = vec![7u8; 1 << 20];
    assert_eq!(upload(&test, "raw", 0, false, &half).await, Ok(1 << 20));
    assert_eq!(upload(&test, "raw", 5, false, &half).await, Err(ErrorCode::Conflict), "a wrong offset");
    assert_eq!(test.cloud.image_upload_offset(&test.admin, None, "raw").await.unwrap().offset, 1 << 20);
    assert_eq!(upload(&test, "raw", 1 << 20, true, &half).await, Ok(2 << 20));
    until(&test, "active", || image(&test, "raw").status.phase == ImagePhase::Active).await;
    let data = image(&test, "raw").status.data.clone().unwrap();
    assert_eq!(data.virtual_size, ByteSize::mib(2));
    let file = test.cloud.image_file(&test.admin, None, "raw").unwrap();
    assert_eq!(std::fs::read(&file.path).unwrap(), vec![7u8; 2 << 20]);
    let operation = made.operation.unwrap().metadata.id.to_string();
    let done = || test.cloud.get::<Operation>(&test.admin, None, &operation).unwrap().status.phase;
    assert_eq!(done(), OperationPhase::Succeeded);
    assert_eq!(upload(&test, "raw", 0, true, b"x").await, Err(ErrorCode::Conflict), "data comes once");
}

#[tokio::test]
async fn a_wrong_checksum_is_an_error_that_says_so() {
    let test = TestCloud::new().await;
    let _act = controllers(&test);
    let request = ImageCreate { expected_sha256: Some("0".repeat(64)), ..request("bad") };
    test.cloud.image_create(&test.admin, None, request, None).await.unwrap();
    upload(&test, "bad", 0, true, &[1u8; 4096]).await.unwrap();
    until(&test, "error", || image(&test, "bad").status.phase == ImagePhase::Error).await;
    assert_eq!(image(&test, "bad").status.reason.clone().unwrap().code, "checksum_mismatch");
    test.cloud.image_delete(&test.admin, None, "bad", None).await.unwrap();
    assert!(test.cloud.get::<Image>(&test.admin, None, "bad").is_err());
}

#[tokio::test]
async fn an_image_in_use_stays() {
    let test = TestCloud::new().await;
    test.image("img").await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    let error = test.cloud.image_delete(&test.admin, None, "img", None).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InUse);
    assert!(error.detail.contains("a-root"), "{}", error.detail);
    assert_eq!(image(&test, "img").status.phase, ImagePhase::Active);
}

/// Whoever wins: there is never a VM whose image is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_and_delete_at_once_never_both_succeed() {
    for round in 0..40 {
        let test = TestCloud::new().await;
        test.image("img").await;
        let (cloud, admin) = (Arc::clone(&test.cloud), test.admin.clone());
        let create =
            tokio::spawn(async move { cloud.vm_create(&admin, None, TestCloud::create("a"), None).await });
        let (cloud, admin) = (Arc::clone(&test.cloud), test.admin.clone());
        let delete = tokio::spawn(async move { cloud.image_delete(&admin, None, "img", None).await });
        let (created, deleted) = (create.await.unwrap(), delete.await.unwrap());
        let there = test.cloud.get::<Image>(&test.admin, None, "img").is_ok();
        assert_eq!(created.is_ok(), there, "round {round}: {created:?} {deleted:?}");
    }
}

#[tokio::test]
async fn files_that_no_image_needs_are_swept_and_shared_ones_stay() {
    let test = TestCloud::new().await;
    let _act = controllers(&test);
    for one in ["x", "y"] {
        test.cloud.image_create(&test.admin, None, request(one), None).await.unwrap();
        upload(&test, one, 0, true, &[9u8; 8192]).await.unwrap();
        until(&test, "active", || image(&test, one).status.phase == ImagePhase::Active).await;
    }
    until(&test, "imports ended", || test.cloud.imports.quiet().is_some()).await;
    assert_eq!(test.cloud.images.list().unwrap().len(), 1, "the same bytes are stored once");
    test.cloud.image_delete(&test.admin, None, "x", None).await.unwrap();
    assert_eq!(test.cloud.images.list().unwrap().len(), 1, "y needs it");
    test.cloud.image_delete(&test.admin, None, "y", None).await.unwrap();
    assert!(test.cloud.images.list().unwrap().is_empty());
}

#[tokio::test]
async fn only_http_is_fetched() {
    let test = TestCloud::new().await;
    for url in ["file:///etc/passwd", "ftp://x/y", "json:{}"] {
        let request = ImageCreate { url: Some(url.into()), ..request("u") };
        let error = test.cloud.image_create(&test.admin, None, request, None).await.unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (ErrorCode::Invalid, Some("url")));
    }
}

#[tokio::test]
async fn an_upload_that_never_came_is_given_up() {
    let test = TestCloud::new().await;
    let made = test.cloud.image_create(&test.admin, None, request("late"), None).await.unwrap();
    upload(&test, "late", 0, false, b"some").await.unwrap();
    let id = made.resource.metadata.id;
    // A day goes by.
    test.cloud
        .commit(|tables, change| {
            let old = tables.images.get(id).unwrap();
            let mut new = Image::clone(old);
            new.metadata.created = ostler_api::Time(jiff::Timestamp::UNIX_EPOCH);
            change.update(old.as_ref(), &new)
        })
        .await
        .unwrap();
    let _act = controllers(&test);
    until(&test, "given up", || image(&test, "late").status.phase == ImagePhase::Error).await;
    assert_eq!(image(&test, "late").status.reason.clone().unwrap().code, "abandoned");
}
