//! Linked clones of an image, and of a snapshot, against `qemu-img create -b` on the same file system in the same run.
//!
//! `cargo bench -p ostler-storage --bench clone -- [--rounds N] [--dir DIR]`
//!
//! The images are sparse and made at once; what is cloned is a name in a header, so their size must not matter. Each round
//! makes one of each kind in turn, so that noise of the machine meets all of them; printed are the medians.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use ostler_storage::{DirPool, ImageFormat, ImageRef, NewVolume, Pool, VolumeSource};
use uuid::Uuid;

const GIB: u64 = 1 << 30;

struct Settings {
    rounds: usize,
    directory: PathBuf,
}

fn main() {
    let settings = match settings() {
        Ok(settings) => settings,
        Err(problem) => {
            eprintln!("{problem}\nusage: clone [--rounds N] [--dir DIR]");
            std::process::exit(2);
        }
    };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime starts");
    for gib in [1, 20, 100] {
        runtime.block_on(measure(gib, &settings));
    }
}

fn settings() -> Result<Settings, String> {
    let mut settings = Settings { rounds: 51, directory: std::env::temp_dir() };
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--rounds" => {
                settings.rounds = value.parse().map_err(|_| format!("{value} is not a number of rounds"))?;
            }
            "--dir" => settings.directory = value.into(),
            other => return Err(format!("{other} is not known")),
        }
    }
    if settings.rounds == 0 { Err("at least one round".to_owned()) } else { Ok(settings) }
}

/// Measures the three ways with an image of this size.
async fn measure(gib: u64, settings: &Settings) {
    let size = gib * GIB;
    let dir = tempfile::tempdir_in(&settings.directory).expect("the directory is writable");
    let pool = DirPool::open(dir.path().join("pool")).expect("the pool opens");
    let image = place_image(&dir.path().join("pool/images"), size);
    let source = VolumeSource::Image { image: image.clone(), virtual_size: size };
    let origin = NewVolume { id: Uuid::now_v7(), size, source: source.clone() };
    pool.volume_create(&origin).await.expect("the volume is made");
    let snapshot = Uuid::now_v7();
    pool.snapshot_prepare(origin.id, snapshot, Uuid::now_v7()).await.expect("the snapshot is prepared");
    pool.snapshot_commit(origin.id, snapshot).await.expect("the snapshot is committed");

    let (mut images, mut snapshots, mut tool) = (Vec::new(), Vec::new(), Vec::new());
    let backing = dir.path().join("pool/images").join(format!("{}.raw", image.sha256));
    for round in 0..settings.rounds {
        images.push(clone(&pool, source.clone(), size).await);
        snapshots.push(clone(&pool, VolumeSource::Snapshot { snapshot }, size).await);
        tool.push(qemu_img_create(&backing, &dir.path().join(format!("by-hand-{round}.qcow2"))));
    }
    let other = median(tool);
    report(&format!("linked clone of a {gib} GiB image"), median(images), other);
    report(&format!("linked clone of a {gib} GiB snapshot"), median(snapshots), other);
}

/// Puts a sparse image under a name of its own into the pool. Its digest is not looked at here, and reading 100 GiB for it
/// would be all that this measures.
fn place_image(images: &Path, size: u64) -> ImageRef {
    let image = ImageRef { sha256: format!("{size:064x}"), format: ImageFormat::Raw };
    let file = File::create(images.join(format!("{}.raw", image.sha256))).expect("the image is made");
    file.set_len(size).expect("the image is as large as told");
    image
}

async fn clone(pool: &DirPool, source: VolumeSource, size: u64) -> Duration {
    let volume = NewVolume { id: Uuid::now_v7(), size, source };
    let started = Instant::now();
    pool.volume_create(&volume).await.expect("the clone is made");
    started.elapsed()
}

fn qemu_img_create(backing: &Path, target: &Path) -> Duration {
    let started = Instant::now();
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([backing, target])
        .stdout(Stdio::null())
        .status()
        .expect("the package qemu-utils is installed");
    assert!(status.success(), "qemu-img create failed");
    started.elapsed()
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1000.0
}

fn report(figure: &str, ours: f64, other: f64) {
    println!(
        "BENCH {figure} | {ours:.2} ms | {other:.2} ms qemu-img create -b | {:.2}x | at most 1.5x",
        ours / other
    );
}
