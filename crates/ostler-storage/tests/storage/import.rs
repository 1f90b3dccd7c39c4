//! The way of an image into the store and out of it again.

use std::{
    fs,
    io::Write,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use ostler_storage::{
    FinishOptions, ImageContent, ImageFormat, ImageRef, ImageStore, ImportError, ImportProgress, ImportStage,
    ImportedImage, ProbeLimits, QemuImg,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::support::{MIB, Tmpfs, disk, hex, image, noise, qemu_img, sha256};
use sha2::{Digest, Sha256};

pub(crate) fn options() -> FinishOptions {
    FinishOptions {
        expected_sha256: None,
        limits: ProbeLimits::default(),
        progress: watch::Sender::new(ImportProgress::default()),
        cancel: CancellationToken::new(),
    }
}

pub(crate) async fn upload(store: &ImageStore, id: &str, bytes: &[u8]) {
    let mut upload = store.upload(id).await.unwrap();
    assert_eq!(upload.offset(), 0);
    for chunk in bytes.chunks(MIB) {
        upload.write(Bytes::copy_from_slice(chunk)).await.unwrap();
    }
    upload.sync().await.unwrap();
    assert_eq!(upload.offset(), bytes.len() as u64);
}

async fn import(store: &ImageStore, bytes: &[u8]) -> Result<ImportedImage, ImportError> {
    upload(store, "test", bytes).await;
    let result = store.finish("test", options()).await;
    store.discard("test").await.unwrap();
    result
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 1).unwrap()
}

fn incoming(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir.join("incoming")).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

async fn exported(store: &ImageStore, dir: &Path, image: &ImageRef) -> Vec<u8> {
    let path = dir.join("exported.raw");
    let (progress, cancel) = (watch::Sender::new(ImportProgress::default()), CancellationToken::new());
    store.export(image, ImageFormat::Raw, &path, &progress, &cancel).await.unwrap();
    let bytes = fs::read(&path).unwrap();
    fs::remove_file(path).unwrap();
    bytes
}

#[tokio::test]
async fn every_format_in_every_wrapping() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().join("store")).unwrap();
    let content = disk(5 * MIB + 512);
    for (format, variant) in [
        ("raw", vec![]),
        ("qcow2", vec![]),
        ("vmdk", vec![]),
        ("vmdk", vec!["subformat=streamOptimized"]),
        ("vdi", vec![]),
        ("vhdx", vec![]),
    ] {
        let plain = fs::read(image(dir.path(), &content, format, &variant)).unwrap();
        for (number, bytes) in [plain.clone(), gzip(&plain), xz(&plain), zstd(&plain)].into_iter().enumerate()
        {
            let made =
                import(&store, &bytes).await.unwrap_or_else(|error| panic!("{format} {number}: {error}"));
            let stored = if format == "raw" { ImageFormat::Raw } else { ImageFormat::Qcow2 };
            assert_eq!((made.format, made.source_format.as_str()), (stored, format));
            assert_eq!((made.content, made.virtual_size), (ImageContent::Disk, content.len() as u64));
            assert_eq!(made.source_sha256, hex(&Sha256::digest(&bytes)));
            let path = store.path(&made.image_ref());
            assert_eq!(made.sha256, sha256(&path));
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!((metadata.mode() & 0o777, metadata.len()), (0o444, made.stored_size));
            if stored == ImageFormat::Raw || format == "qcow2" {
                assert_eq!(made.sha256, hex(&Sha256::digest(&plain)), "kept as it came");
            }
            store.verify(&made.image_ref()).await.unwrap();
            assert_eq!(exported(&store, dir.path(), &made.image_ref()).await, content, "{format} {number}");
            store.delete(&made.image_ref()).await.unwrap();
            store.delete(&made.image_ref()).await.expect("deleting again is fine");
        }
    }
    assert!(store.list().unwrap().is_empty());
    assert_eq!(incoming(&dir.path().join("store")), [""; 0]);
}

#[tokio::test]
async fn kernels_and_ramdisks_keep_their_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).unwrap();
    let initrd = [b"070701".to_vec(), noise(70_001)].concat();
    let made = import(&store, &gzip(&initrd)).await.unwrap();
    assert_eq!((made.content, made.format), (ImageContent::Initrd, ImageFormat::Raw));
    assert_eq!(fs::read(store.path(&made.image_ref())).unwrap(), initrd);
    assert_eq!((made.stored_size, made.virtual_size), (70_007, 70_144));
}

#[tokio::test]
async fn zeroes_take_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).unwrap();
    let content = disk(32 * MIB);
    for bytes in [content.clone(), gzip(&content)] {
        let made = import(&store, &bytes).await.unwrap();
        let metadata = fs::metadata(store.path(&made.image_ref())).unwrap();
        assert_eq!(metadata.len(), content.len() as u64);
        assert!(metadata.blocks() * 512 < 2 * MIB as u64, "{} blocks", metadata.blocks());
        store.delete(&made.image_ref()).await.unwrap();
    }
}

#[tokio::test]
async fn an_upload_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let content = disk(3 * MIB);
    let store = ImageStore::open(dir.path()).unwrap();
    let mut first = store.upload("u").await.unwrap();
    first.write(Bytes::copy_from_slice(&content[..MIB])).await.unwrap();
    first.sync().await.unwrap();
    first.write(Bytes::copy_from_slice(&content[MIB..MIB + 10])).await.unwrap();
    assert_eq!(store.upload("u").await.unwrap_err().code(), "busy");
    drop(first);

    // Another process in the same boot of the machine: everything that was written is there.
    let store = ImageStore::open(dir.path()).unwrap();
    assert_eq!(store.upload("u").await.unwrap().offset(), MIB as u64 + 10);

    // After a crash of the machine: only what was synced.
    let mark = dir.path().join("incoming/u.mark");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&mark).unwrap()).unwrap();
    json["boot"] = "another".into();
    fs::write(&mark, json.to_string()).unwrap();
    let mut second = store.upload("u").await.unwrap();
    assert_eq!(second.offset(), MIB as u64);
    second.write(Bytes::copy_from_slice(&content[MIB..])).await.unwrap();
    drop(second);
    let made = store.finish("u", options()).await.unwrap();
    assert_eq!(fs::read(store.path(&made.image_ref())).unwrap(), content);
}

#[tokio::test]
async fn finishing_again_gives_the_same_answer() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).unwrap();
    upload(&store, "a", &disk(MIB)).await;
    let made = store.finish("a", options()).await.unwrap();
    assert_eq!(store.finish("a", options()).await.unwrap(), made);
    assert_eq!(store.list().unwrap(), [made.image_ref()]);
    // The same bytes under another id end in the same file.
    upload(&store, "b", &disk(MIB)).await;
    assert_eq!(store.finish("b", options()).await.unwrap(), made);
    // Deleted since: the old answer no longer holds.
    store.delete(&made.image_ref()).await.unwrap();
    assert_eq!(store.finish("a", options()).await.unwrap_err().code(), "not_found");
    store.discard("b").await.unwrap();
    store.discard("b").await.expect("discarding again is fine");
    assert_eq!(store.finish("b", options()).await.unwrap_err().code(), "not_found");
}

#[tokio::test]
async fn a_wrong_checksum_is_told_and_the_upload_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).unwrap();
    upload(&store, "u", &disk(MIB)).await;
    let wrong = FinishOptions { expected_sha256: Some("0".repeat(64)), ..options() };
    let error = store.finish("u", wrong).await.unwrap_err();
    assert_eq!((error.code(), error.is_final()), ("checksum_mismatch", true));
    let malformed = FinishOptions { expected_sha256: Some("beef".to_owned()), ..options() };
    assert_eq!(store.finish("u", malformed).await.unwrap_err().code(), "invalid");
    let right = FinishOptions { expected_sha256: Some(hex(&Sha256::digest(disk(MIB)))), ..options() };
    store.finish("u", right).await.unwrap();
}

#[tokio::test]
async fn bombs_and_broken_streams_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).unwrap();
    let zeroes = vec![0; 80 * MIB];
    for (bomb, name) in [(gzip(&zeroes), "gzip"), (xz(&zeroes), "xz"), (zstd(&zeroes), "zstd")] {
        upload(&store, "bomb", &bomb).await;
        let small = FinishOptions { limits: ProbeLimits { max_virtual_size: MIB as u64 }, ..options() };
        let error = store.finish("bomb", small).await.unwrap_err();
        assert_eq!((error.code(), error.is_final()), ("too_large", true), "{name}");
        assert_eq!(incoming(dir.path()), ["bomb.lock", "bomb.mark", "bomb.upload"], "{name}");
        store.discard("bomb").await.unwrap();
    }
    let content = noise(MIB);
    for packed in [gzip(&content), xz(&content), zstd(&content)] {
        assert_eq!(import(&store, &packed[..packed.len() / 2]).await.unwrap_err().code(), "bad_compression");
        let mut damaged = packed.clone();
        let middle = packed.len() / 2;
        damaged[middle..middle + 64].fill(0xff);
        assert_eq!(import(&store, &damaged).await.unwrap_err().code(), "bad_compression");
        assert_eq!(import(&store, &gzip(&packed)).await.unwrap_err().code(), "nested_compression");
    }
    // Several members one after the other are one file.
    let made = import(&store, &[gzip(&content), gzip(&content)].concat()).await.unwrap();
    assert_eq!(made.stored_size, 2 * MIB as u64);
}

#[tokio::test]
async fn what_the_prober_refuses_is_not_imported() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().join("store")).unwrap();
    let path = dir.path().join("overlay");
    qemu_img(&[
        "create",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "/etc/passwd",
        "-F",
        "raw",
        path.to_str().unwrap(),
        "1M",
    ]);
    let overlay = fs::read(&path).unwrap();
    assert_eq!(import(&store, &overlay).await.unwrap_err().code(), "backing_file");
    assert_eq!(import(&store, &zstd(&overlay)).await.unwrap_err().code(), "backing_file");
    assert_eq!(import(&store, b"").await.unwrap_err().code(), "empty");
    // Tables that only `qemu-img check` walks: a data cluster that lies on the refcount table.
    let mut bytes = fs::read(image(dir.path(), &disk(5 * MIB), "qcow2", &[])).unwrap();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let l2 = (u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2..l2 + 8].copy_from_slice(&(1u64 << 63 | 0x10000).to_be_bytes());
    assert_eq!(import(&store, &bytes).await.unwrap_err().code(), "corrupt");
    assert!(store.list().unwrap().is_empty());
}

/// Waits until an import is in `stage`.
async fn reach(progress: &mut watch::Receiver<ImportProgress>, stage: ImportStage) {
    progress.wait_for(|now| now.stage == stage && now.done > 0).await.unwrap();
}

#[tokio::test]
async fn an_import_can_be_cancelled_or_dropped_in_the_middle() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).unwrap();
    let packed = gzip(&vec![0; 256 * MIB]);
    upload(&store, "u", &packed).await;
    let cancelled = options();
    let (mut progress, cancel) = (cancelled.progress.subscribe(), cancelled.cancel.clone());
    let (outcome, ()) = tokio::join!(store.finish("u", cancelled), async {
        reach(&mut progress, ImportStage::Unpack).await;
        cancel.cancel();
    });
    assert_eq!(outcome.unwrap_err().code(), "cancelled");
    assert_eq!(incoming(dir.path()), ["u.lock", "u.mark", "u.upload"]);

    let dropped = options();
    let mut progress = dropped.progress.subscribe();
    tokio::select! {
        _ = store.finish("u", dropped) => panic!("it cannot be done yet"),
        () = reach(&mut progress, ImportStage::Unpack) => {}
    }
    // Waits for the thread to let go.
    let made = store.finish("u", options()).await.unwrap();
    assert_eq!(made.virtual_size, 256 * MIB as u64);
}

#[tokio::test]
async fn a_full_disk_is_told_and_leaves_only_the_upload() {
    let Some(tmpfs) = Tmpfs::mount(16 * MIB) else { return };
    let store = ImageStore::open(tmpfs.path()).unwrap();
    let content = noise(10 * MIB);
    let dir = tempfile::tempdir().unwrap();
    let vmdk = fs::read(image(dir.path(), &content, "vmdk", &[])).unwrap();
    for bytes in [vmdk, gzip(&content)] {
        upload(&store, "u", &bytes).await;
        let error = store.finish("u", options()).await.unwrap_err();
        assert_eq!((error.code(), error.is_final()), ("no_space", false), "{error}");
        assert_eq!(incoming(tmpfs.path()), ["u.lock", "u.mark", "u.upload"]);
        store.discard("u").await.unwrap();
        // The kernel keeps the files of a confined process a moment longer than the process.
        tmpfs.wait_until_free(15 * MIB);
    }
    let mut upload = store.upload("u").await.unwrap();
    let error = upload.write(Bytes::from(noise(20 * MIB))).await.unwrap_err();
    assert_eq!(error.code(), "no_space");
}

/// The control plane's database is often on the same file system and must be able to record a delete.
#[tokio::test]
async fn an_upload_leaves_the_last_bytes_to_others() {
    let Some(tmpfs) = Tmpfs::mount(16 * MIB) else { return };
    let store = ImageStore::open(tmpfs.path()).unwrap();
    let mut upload = store.upload("u").await.unwrap();
    let piece = Bytes::from(noise(MIB / 8));
    let error = loop {
        if let Err(error) = upload.write(piece.clone()).await {
            break error;
        }
    };
    assert_eq!(error.code(), "no_space");
    assert!(upload.offset() > 14 * MIB as u64, "{}", upload.offset());
    upload.sync().await.unwrap();
    fs::write(tmpfs.path().join("database"), vec![1; MIB / 4]).unwrap();
}

#[tokio::test]
async fn a_missing_tool_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let tool = QemuImg { program: PathBuf::from("/nonexistent/qemu-img"), ..QemuImg::default() };
    let store = ImageStore::open_with(dir.path().join("store"), tool).unwrap();
    let vdi = fs::read(image(dir.path(), &disk(MIB), "vdi", &[])).unwrap();
    let error = import(&store, &vdi).await.unwrap_err();
    assert_eq!(error.code(), "tool_missing");
    import(&store, &disk(MIB)).await.expect("raw images need no tool");
}

#[tokio::test]
async fn sweeping_keeps_what_is_named_and_what_is_held() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).unwrap();
    for id in ["kept", "left"] {
        upload(&store, id, b"bytes").await;
    }
    let held = store.upload("held").await.unwrap();
    fs::write(dir.path().join("incoming/unrelated file"), b"x").unwrap();
    assert_eq!(store.sweep(&["kept".to_owned()]).await.unwrap(), ["left"]);
    drop(held);
    assert_eq!(store.sweep(&["kept".to_owned()]).await.unwrap(), ["held"]);
    assert_eq!(incoming(dir.path()), ["kept.lock", "kept.mark", "kept.upload", "unrelated file"]);
    for id in ["", "../x", "a/b", "a.b", &"x".repeat(65)] {
        assert_eq!(store.upload(id).await.unwrap_err().code(), "invalid");
    }
}

#[tokio::test]
async fn images_are_exported_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path().join("store")).unwrap();
    let content = disk(5 * MIB);
    let (progress, cancel) = (watch::Sender::new(ImportProgress::default()), CancellationToken::new());
    for source in ["raw", "qcow2"] {
        let made =
            import(&store, &fs::read(image(dir.path(), &content, source, &[])).unwrap()).await.unwrap();
        for format in ImageFormat::ALL {
            let to = dir.path().join(format!("out, {source}.{format}"));
            store.export(&made.image_ref(), format, &to, &progress, &cancel).await.unwrap();
            let again = import(&store, &fs::read(&to).unwrap()).await.unwrap();
            assert_eq!(again.source_format, format);
            assert_eq!(
                exported(&store, dir.path(), &again.image_ref()).await,
                content,
                "{source} to {format}"
            );
            let twice = store.export(&made.image_ref(), format, &to, &progress, &cancel).await;
            assert_eq!(twice.unwrap_err().code(), "conflict");
        }
    }
    let absent = ImageRef { sha256: "0".repeat(64), format: ImageFormat::Raw };
    let to = dir.path().join("absent");
    let error = store.export(&absent, ImageFormat::Raw, &to, &progress, &cancel).await.unwrap_err();
    assert_eq!(error.code(), "not_found");
    assert!(!to.exists());
}

#[tokio::test]
async fn verify_finds_a_changed_image() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).unwrap();
    let made = import(&store, &disk(MIB)).await.unwrap();
    let path = store.path(&made.image_ref());
    fs::remove_file(&path).unwrap();
    fs::write(&path, vec![1; MIB]).unwrap();
    assert_eq!(store.verify(&made.image_ref()).await.unwrap_err().code(), "checksum_mismatch");
}
