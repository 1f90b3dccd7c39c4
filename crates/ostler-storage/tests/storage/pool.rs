//! Pools: the conformance suite on both, and what only a directory can get wrong.

use std::{fs, os::unix::fs::MetadataExt, path::Path, sync::Arc, time::Duration};

use ostler_storage::{
    DirPool, ImageFormat, ImageRef, ImageSource, NewVolume, Pool, SimFaults, SimPool, StorageError,
    VolumeSource, conformance,
};
use uuid::Uuid;

use crate::support::{Tmpfs, qemu_img, sha256};

const MIB: u64 = 1 << 20;

fn files_in(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

/// A qcow2 image with some content, stored under its digest.
fn stored_image(dir: &Path) -> (ImageRef, std::path::PathBuf) {
    let raw = dir.join("source.raw");
    fs::write(&raw, vec![0x5a; 4 << 20]).unwrap();
    let qcow2 = dir.join("source.qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    let image = ImageRef { sha256: sha256(&qcow2), format: ImageFormat::Qcow2 };
    let path = dir.join(format!("{}.qcow2", image.sha256));
    fs::rename(&qcow2, &path).unwrap();
    (image, path)
}

fn layered(image: &ImageRef, size: u64) -> NewVolume {
    let source = VolumeSource::Image { image: image.clone(), virtual_size: 4 * MIB };
    NewVolume { id: Uuid::now_v7(), size, source }
}

#[tokio::test]
async fn a_directory_passes_the_suite_and_is_left_empty() {
    let dir = tempfile::tempdir().unwrap();
    let pool = DirPool::open(dir.path()).unwrap();
    conformance::all(&pool).await;
    assert_eq!(files_in(&dir.path().join("images")), [""; 0]);
    assert_eq!(files_in(&dir.path().join("volumes")), [""; 0]);
}

#[tokio::test]
async fn a_simulated_pool_passes_the_suite() {
    conformance::all(&SimPool::new(1 << 40)).await;
}

#[tokio::test]
async fn a_simulated_pool_delays_and_fails_as_told() {
    let pool = SimPool::new(1 << 40);
    let volume = NewVolume { id: Uuid::now_v7(), size: MIB, source: VolumeSource::Blank };
    pool.set_faults(SimFaults {
        delay: Duration::from_millis(20),
        fault: Some(Arc::new(|operation, _| {
            (operation == "volume_create").then(|| StorageError::NoSpace { path: "/simulated".into() })
        })),
    });
    let started = std::time::Instant::now();
    assert_eq!(pool.volume_create(&volume).await.unwrap_err().code(), "no_space");
    assert!(started.elapsed() >= Duration::from_millis(20));
    pool.set_faults(SimFaults::default());
    pool.volume_create(&volume).await.unwrap();
}

#[tokio::test]
async fn a_volume_is_what_qemu_img_says_too() {
    let dir = tempfile::tempdir().unwrap();
    let pool = DirPool::open(dir.path().join("pool")).unwrap();
    let (image, path) = stored_image(dir.path());
    pool.image_add(&image, ImageSource::Path(path)).await.unwrap();
    for size in [4 * MIB, 4 * MIB + 512, 10 << 30] {
        let volume = layered(&image, size);
        pool.volume_create(&volume).await.unwrap();
        let layers = pool.volume_layers(volume.id).await.unwrap();
        let top = layers[0].path.to_str().unwrap();
        let info: serde_json::Value =
            serde_json::from_slice(&qemu_img(&["info", "--output=json", "-f", "qcow2", top])).unwrap();
        assert_eq!(info["virtual-size"], size);
        assert_eq!(info["backing-filename"], format!("../images/{}.qcow2", image.sha256));
        assert_eq!(info["backing-filename-format"], "qcow2");
        qemu_img(&["check", "-f", "qcow2", top]);
        let flat = dir.path().join("flat.raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", top, flat.to_str().unwrap()]);
        let flat = fs::File::open(flat).unwrap();
        let mut head = vec![0; 4 << 20];
        std::os::unix::fs::FileExt::read_exact_at(&flat, &mut head, 0).unwrap();
        assert!(head.iter().all(|byte| *byte == 0x5a), "the image shows through");
        assert_eq!(flat.metadata().unwrap().len(), size);
    }
    let blank = NewVolume { id: Uuid::now_v7(), size: 1 << 50, source: VolumeSource::Blank };
    pool.volume_create(&blank).await.unwrap();
    qemu_img(&[
        "check",
        "-f",
        "qcow2",
        pool.volume_layers(blank.id).await.unwrap()[0].path.to_str().unwrap(),
    ]);
}

#[tokio::test]
async fn an_image_on_the_same_file_system_is_linked() {
    let dir = tempfile::tempdir().unwrap();
    let pool = DirPool::open(dir.path().join("pool")).unwrap();
    let (image, path) = stored_image(dir.path());
    pool.image_add(&image, ImageSource::Path(path.clone())).await.unwrap();
    let linked = dir.path().join("pool/images").join(path.file_name().unwrap());
    assert_eq!(fs::metadata(linked).unwrap().ino(), fs::metadata(path).unwrap().ino());
}

#[tokio::test]
async fn an_image_from_another_file_system_is_copied_and_checked() {
    let Some(tmpfs) = Tmpfs::mount(64 << 20) else { return };
    let dir = tempfile::tempdir().unwrap();
    let pool = DirPool::open(tmpfs.path()).unwrap();
    let (image, path) = stored_image(dir.path());
    pool.image_add(&image, ImageSource::Path(path.clone())).await.unwrap();
    let copied = tmpfs.path().join("images").join(path.file_name().unwrap());
    assert_eq!(sha256(&copied), image.sha256);
    assert_eq!(fs::metadata(&copied).unwrap().mode() & 0o777, 0o444);

    let wrong = ImageRef { sha256: "0".repeat(64), ..image };
    let error = pool.image_add(&wrong, ImageSource::Path(path)).await.unwrap_err();
    assert_eq!(error.code(), "checksum_mismatch");
    assert_eq!(files_in(&tmpfs.path().join("images")).len(), 1, "nothing half-written is left");
}

#[tokio::test]
async fn an_image_that_is_not_what_its_name_says_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let pool = DirPool::open(dir.path().join("pool")).unwrap();
    let (image, path) = stored_image(dir.path());
    let raw = ImageRef { format: ImageFormat::Raw, ..image };
    assert_eq!(pool.image_add(&raw, ImageSource::Path(path.clone())).await.unwrap_err().code(), "damaged");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert_eq!(pool.image_add(&raw, ImageSource::Path(link)).await.unwrap_err().code(), "io");
}

#[tokio::test]
async fn a_volume_with_a_foreign_backing_file_is_never_opened() {
    let dir = tempfile::tempdir().unwrap();
    let pool = DirPool::open(dir.path()).unwrap();
    for name in ["/etc/passwd", "../images/../../etc/passwd", "json:{}", "nbd://host/disk"] {
        let id = Uuid::now_v7();
        let path = dir.path().join(format!("volumes/{id}.qcow2"));
        qemu_img(&["create", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path.to_str().unwrap(), "1M"]);
        assert_eq!(pool.volume_layers(id).await.unwrap_err().code(), "damaged", "{name}");
        fs::remove_file(path).unwrap();
    }
    let id = Uuid::now_v7();
    fs::write(dir.path().join(format!("volumes/{id}.qcow2")), b"not a disk at all").unwrap();
    assert_eq!(pool.volume_layers(id).await.unwrap_err().code(), "damaged");
    pool.volume_delete(id).await.expect("a damaged volume can be deleted");
}

#[tokio::test]
async fn a_volume_smaller_than_its_image_is_refused_whatever_the_caller_believes() {
    let dir = tempfile::tempdir().unwrap();
    let pool = DirPool::open(dir.path().join("pool")).unwrap();
    let (image, path) = stored_image(dir.path());
    pool.image_add(&image, ImageSource::Path(path)).await.unwrap();
    let source = VolumeSource::Image { image, virtual_size: 512 };
    let volume = NewVolume { id: Uuid::now_v7(), size: MIB, source };
    assert_eq!(pool.volume_create(&volume).await.unwrap_err().code(), "too_small");
}

#[tokio::test]
async fn a_full_disk_leaves_no_half_written_volume() {
    let Some(tmpfs) = Tmpfs::mount(1 << 20) else { return };
    let pool = DirPool::open(tmpfs.path()).unwrap();
    let error = fs::write(tmpfs.path().join("ballast"), vec![1; 2 << 20]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    let volume = NewVolume { id: Uuid::now_v7(), size: MIB, source: VolumeSource::Blank };
    assert_eq!(pool.volume_create(&volume).await.unwrap_err().code(), "no_space");
    assert_eq!(files_in(&tmpfs.path().join("volumes")), [""; 0]);
    fs::remove_file(tmpfs.path().join("ballast")).unwrap();
    pool.volume_create(&volume).await.expect("with room it works");
}

#[tokio::test]
async fn opening_a_pool_removes_what_a_killed_process_left() {
    let dir = tempfile::tempdir().unwrap();
    DirPool::open(dir.path()).unwrap();
    fs::write(dir.path().join("volumes/.new-1"), b"half").unwrap();
    fs::write(dir.path().join("images/.new-2"), b"half").unwrap();
    let pool = DirPool::open(dir.path()).unwrap();
    assert_eq!(files_in(&dir.path().join("volumes")), [""; 0]);
    assert_eq!(files_in(&dir.path().join("images")), [""; 0]);
    assert!(pool.volume_list().await.unwrap().is_empty());
}
