//! The suite that every pool passes. A pool that comes later runs `all` and needs no tests of its own for these rules.

mod snapshots;

use std::collections::HashSet;

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{ImageFormat, ImageRef, ImageSource, NewVolume, Pool, StorageError, VolumeSource, files::hex};

const MIB: u64 = 1 << 20;

/// Runs every check on an empty pool and leaves it empty. Panics with what does not hold.
pub async fn all(pool: &dyn Pool) {
    images_come_and_go(pool).await;
    images_are_checked(pool).await;
    creating_is_idempotent(pool).await;
    conflicts_are_refused(pool).await;
    sizes_are_checked(pool).await;
    layers_are_the_chain(pool).await;
    used_images_stay(pool).await;
    deleting_is_idempotent(pool).await;
    concurrent_creates_agree(pool).await;
    usage_counts_what_is_promised(pool).await;
    snapshots::all(pool).await;
    assert!(pool.volume_list().await.unwrap().is_empty(), "the suite leaves no volume");
    assert!(pool.image_list().await.unwrap().is_empty(), "the suite leaves no image");
}

/// A raw image of `sectors` sectors, different for each seed.
fn content(seed: u8, sectors: usize) -> Vec<u8> {
    let mut bytes = vec![0; sectors * 512];
    bytes[0] = b'X';
    bytes[1] = seed;
    bytes
}

fn reference(bytes: &[u8]) -> ImageRef {
    ImageRef { sha256: hex(&Sha256::digest(bytes)), format: ImageFormat::Raw }
}

fn stream(bytes: &[u8]) -> ImageSource {
    ImageSource::Stream(Box::new(std::io::Cursor::new(bytes.to_vec())))
}

async fn add_image(pool: &dyn Pool, seed: u8) -> ImageRef {
    let bytes = content(seed, 2048);
    let image = reference(&bytes);
    pool.image_add(&image, stream(&bytes)).await.unwrap();
    image
}

fn from_image(image: &ImageRef, size: u64) -> NewVolume {
    let source = VolumeSource::Image { image: image.clone(), virtual_size: MIB };
    NewVolume { id: Uuid::now_v7(), size, source }
}

fn blank(size: u64) -> NewVolume {
    NewVolume { id: Uuid::now_v7(), size, source: VolumeSource::Blank }
}

fn code<T: std::fmt::Debug>(result: Result<T, StorageError>) -> &'static str {
    result.expect_err("this must be refused").code()
}

async fn images_come_and_go(pool: &dyn Pool) {
    let bytes = content(1, 2048);
    let image = reference(&bytes);
    assert!(!pool.image_present(&image).await.unwrap());
    pool.image_add(&image, stream(&bytes)).await.unwrap();
    pool.image_add(&image, stream(&bytes)).await.expect("adding again is fine");
    assert!(pool.image_present(&image).await.unwrap());
    assert_eq!(pool.image_list().await.unwrap(), std::slice::from_ref(&image));
    pool.image_remove(&image).await.unwrap();
    pool.image_remove(&image).await.expect("removing again is fine");
    assert!(!pool.image_present(&image).await.unwrap());
}

async fn images_are_checked(pool: &dyn Pool) {
    let image = reference(&content(2, 2048));
    assert_eq!(code(pool.image_add(&image, stream(&content(3, 2048))).await), "checksum_mismatch");
    assert!(!pool.image_present(&image).await.unwrap(), "a wrong image leaves nothing");
    for name in ["", "../../../etc/passwd", "ABCDEF"] {
        let image = ImageRef { sha256: name.to_owned(), format: ImageFormat::Raw };
        assert_eq!(code(pool.image_add(&image, stream(b"x")).await), "invalid");
    }
    let image = ImageRef { format: ImageFormat::Vmdk, ..image };
    assert_eq!(code(pool.image_add(&image, stream(b"x")).await), "invalid");
}

async fn creating_is_idempotent(pool: &dyn Pool) {
    let image = add_image(pool, 4).await;
    let volumes = [blank(MIB), from_image(&image, MIB), from_image(&image, 3 * MIB)];
    for volume in &volumes {
        assert_eq!(pool.volume_info(volume.id).await.unwrap(), None);
        let made = pool.volume_create(volume).await.unwrap();
        assert_eq!((made.id, made.virtual_size), (volume.id, volume.size));
        let again = pool.volume_create(volume).await.expect("creating again is fine");
        assert_eq!(again.virtual_size, volume.size);
        let info = pool.volume_info(volume.id).await.unwrap().expect("it is there");
        assert_eq!((info.id, info.virtual_size), (volume.id, volume.size));
    }
    let listed: HashSet<Uuid> = pool.volume_list().await.unwrap().into_iter().collect();
    assert_eq!(listed, volumes.iter().map(|volume| volume.id).collect());
    clear(pool).await;
}

async fn conflicts_are_refused(pool: &dyn Pool) {
    let (image, other) = (add_image(pool, 5).await, add_image(pool, 6).await);
    let volume = from_image(&image, 2 * MIB);
    pool.volume_create(&volume).await.unwrap();
    for changed in [
        NewVolume { size: 3 * MIB, ..volume.clone() },
        NewVolume { source: VolumeSource::Blank, ..volume.clone() },
        NewVolume { id: volume.id, ..from_image(&other, 2 * MIB) },
    ] {
        assert_eq!(code(pool.volume_create(&changed).await), "conflict");
    }
    let info = pool.volume_info(volume.id).await.unwrap().expect("it is still there");
    assert_eq!(info.virtual_size, 2 * MIB);
    clear(pool).await;
}

async fn sizes_are_checked(pool: &dyn Pool) {
    let image = add_image(pool, 7).await;
    for size in [0, 511, 513, u64::MAX, u64::MAX - 511] {
        assert_eq!(code(pool.volume_create(&blank(size)).await), "invalid");
    }
    assert_eq!(code(pool.volume_create(&from_image(&image, MIB - 512)).await), "too_small");
    assert_eq!(code(pool.volume_create(&from_image(&reference(b"absent"), MIB)).await), "not_found");
    assert!(pool.volume_list().await.unwrap().is_empty(), "a refused volume leaves nothing");
    pool.volume_create(&blank(512)).await.expect("one sector is enough");
    pool.volume_create(&blank(16 << 40)).await.expect("16 TiB is not too much");
    clear(pool).await;
}

async fn layers_are_the_chain(pool: &dyn Pool) {
    let image = add_image(pool, 8).await;
    let (plain, layered) = (blank(MIB), from_image(&image, 2 * MIB));
    pool.volume_create(&plain).await.unwrap();
    pool.volume_create(&layered).await.unwrap();
    let layers = pool.volume_layers(plain.id).await.unwrap();
    assert_eq!(layers.iter().map(|layer| layer.format).collect::<Vec<_>>(), [ImageFormat::Qcow2]);
    let layers = pool.volume_layers(layered.id).await.unwrap();
    let formats: Vec<ImageFormat> = layers.iter().map(|layer| layer.format).collect();
    assert_eq!(formats, [ImageFormat::Qcow2, ImageFormat::Raw], "the top comes first");
    assert!(layers[0].path.to_string_lossy().contains(&layered.id.to_string()));
    assert!(layers[1].path.to_string_lossy().contains(&image.sha256));
    assert_eq!(code(pool.volume_layers(Uuid::now_v7()).await), "not_found");
    clear(pool).await;
}

async fn used_images_stay(pool: &dyn Pool) {
    let image = add_image(pool, 9).await;
    let volume = from_image(&image, MIB);
    pool.volume_create(&volume).await.unwrap();
    assert_eq!(code(pool.image_remove(&image).await), "in_use");
    assert!(pool.image_present(&image).await.unwrap());
    pool.volume_delete(volume.id).await.unwrap();
    pool.image_remove(&image).await.expect("nothing stands on it any more");
}

async fn deleting_is_idempotent(pool: &dyn Pool) {
    let volume = blank(MIB);
    pool.volume_create(&volume).await.unwrap();
    pool.volume_delete(volume.id).await.unwrap();
    pool.volume_delete(volume.id).await.expect("deleting again is fine");
    assert_eq!(pool.volume_info(volume.id).await.unwrap(), None);
    pool.volume_create(&volume).await.expect("the id is free again");
    clear(pool).await;
}

async fn concurrent_creates_agree(pool: &dyn Pool) {
    let image = add_image(pool, 10).await;
    let (small, large) = (from_image(&image, MIB), from_image(&image, 2 * MIB));
    let large = NewVolume { id: small.id, ..large };
    let (same, again, other) =
        tokio::join!(pool.volume_create(&small), pool.volume_create(&small), pool.volume_create(&large));
    let size = pool.volume_info(small.id).await.unwrap().expect("one of them made it").virtual_size;
    for (result, wanted) in [(same, small.size), (again, small.size), (other, large.size)] {
        match result {
            Ok(info) => assert_eq!((info.virtual_size, wanted), (size, size)),
            Err(error) => assert_eq!((error.code(), wanted != size), ("conflict", true)),
        }
    }
    clear(pool).await;
}

async fn usage_counts_what_is_promised(pool: &dyn Pool) {
    let before = pool.usage().await.unwrap();
    pool.volume_create(&blank(1 << 30)).await.unwrap();
    pool.volume_create(&blank(1 << 20)).await.unwrap();
    let after = pool.usage().await.unwrap();
    assert_eq!(after.provisioned, before.provisioned + (1 << 30) + (1 << 20));
    assert!(after.total > 0 && after.available <= after.total);
    clear(pool).await;
}

async fn clear(pool: &dyn Pool) {
    for id in pool.volume_list().await.unwrap() {
        pool.volume_delete(id).await.unwrap();
    }
    for image in pool.image_list().await.unwrap() {
        pool.image_remove(&image).await.unwrap();
    }
}
