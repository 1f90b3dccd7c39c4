//! Snapshots in a directory with data in them: what a guest wrote is where it should be after each change of the tree, and
//! damage is found, told and never made worse.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use ostler_storage::{
    Broken, DirPool, ImageFormat, ImageRef, ImageSource, Layer, Merge, NewVolume, Pool, StorageError,
    VolumeSource, Work,
};
use uuid::Uuid;

use crate::support::{Tmpfs, qemu_img, qemu_io, qemu_io_reads, sha256};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

/// A pool with one volume, as a test writes to it.
struct Rig {
    _dir: tempfile::TempDir,
    root: PathBuf,
    pool: DirPool,
    volume: Uuid,
}

impl Rig {
    async fn blank(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("pool");
        let pool = DirPool::open(&root).unwrap();
        let volume = Uuid::now_v7();
        pool.volume_create(&NewVolume { id: volume, size, source: VolumeSource::Blank }).await.unwrap();
        Self { _dir: dir, root, pool, volume }
    }

    /// A volume over an image that reads as 0x5a in its first four megabytes.
    async fn over_image() -> Self {
        let rig = Self::blank(MIB).await;
        let raw = rig.root.join("../source.raw");
        fs::write(&raw, vec![0x5a; 4 << 20]).unwrap();
        let image = ImageRef { sha256: sha256(&raw), format: ImageFormat::Raw };
        let path = raw.with_file_name(format!("{}.raw", image.sha256));
        fs::rename(&raw, &path).unwrap();
        rig.pool.image_add(&image, ImageSource::Path(path)).await.unwrap();
        let source = VolumeSource::Image { image, virtual_size: 4 * MIB };
        let volume = Uuid::now_v7();
        rig.pool.volume_create(&NewVolume { id: volume, size: 8 * MIB, source }).await.unwrap();
        Self { volume, ..rig }
    }

    fn layer(&self, id: Uuid) -> PathBuf {
        self.root.join(format!("volumes/{id}.qcow2"))
    }

    async fn top(&self, volume: Uuid) -> PathBuf {
        self.pool.volume_layers(volume).await.unwrap().remove(0).path
    }

    async fn write(&self, value: u8, at: u64, len: u64) {
        qemu_io(&self.top(self.volume).await, &[&format!("write -P {value} {at} {len}"), "flush"]);
    }

    async fn snapshot(&self) -> Uuid {
        let id = Uuid::now_v7();
        self.pool.snapshot_prepare(self.volume, id, Uuid::now_v7()).await.unwrap();
        self.pool.snapshot_commit(self.volume, id).await.unwrap();
        id
    }

    async fn reads(&self, volume: Uuid, expected: &[(u8, u64, u64)]) {
        assert!(reads(&self.top(volume).await, expected), "the volume does not read as {expected:?}");
    }

    async fn collect(&self) -> HashSet<Uuid> {
        self.pool.collect(&HashSet::new()).await.unwrap().into_iter().collect()
    }

    async fn clone_of(&self, snapshot: Uuid, size: u64) -> Uuid {
        let id = Uuid::now_v7();
        let source = VolumeSource::Snapshot { snapshot };
        self.pool.volume_create(&NewVolume { id, size, source }).await.unwrap();
        id
    }
}

fn reads(layer: &Path, expected: &[(u8, u64, u64)]) -> bool {
    let reads: Vec<String> =
        expected.iter().map(|(value, at, len)| format!("read -P {value} {at} {len}")).collect();
    qemu_io_reads(layer, &reads)
}

fn code<T: std::fmt::Debug>(result: Result<T, StorageError>) -> &'static str {
    result.expect_err("this must be refused").code()
}

#[tokio::test]
async fn each_point_of_a_tree_reads_as_it_was() {
    let rig = Rig::over_image().await;
    let zero = (0, 4 * MIB, 4 * MIB);
    rig.write(1, 0, MIB).await;
    let first = rig.snapshot().await;
    rig.write(2, MIB / 2, MIB).await;
    let second = rig.snapshot().await;
    rig.write(3, 0, 4096).await;
    let at_first = [(1, 0, MIB), (0x5a, MIB, 3 * MIB), zero];
    let at_second = [(1, 0, MIB / 2), (2, MIB / 2, MIB), (0x5a, 3 * MIB / 2, 5 * MIB / 2), zero];
    rig.reads(rig.volume, &[(3, 0, 4096), (1, 4096, MIB / 2 - 4096), (2, MIB / 2, MIB), zero]).await;

    let clone = rig.clone_of(second, 16 * MIB).await;
    rig.reads(clone, &at_second).await;
    rig.reads(clone, &[(0, 8 * MIB, 8 * MIB)]).await;
    rig.pool.snapshot_revert(rig.volume, first, Uuid::now_v7()).await.unwrap();
    rig.reads(rig.volume, &at_first).await;
    rig.write(4, 2 * MIB, MIB).await;
    let third = rig.snapshot().await;
    rig.pool.snapshot_revert(rig.volume, second, Uuid::now_v7()).await.unwrap();
    rig.reads(rig.volume, &at_second).await;
    rig.collect().await;

    // Away with what lies in the middle; the rest reads as before.
    rig.pool.snapshot_delete(first).await.unwrap();
    rig.pool.snapshot_delete(third).await.unwrap();
    rig.collect().await;
    let merges = rig.pool.merge_candidates().await.unwrap();
    assert_eq!(merges.len(), 1, "the first layer, into that of the second snapshot");
    for Merge { layer, into_child } in merges {
        rig.pool.merge(layer, into_child, &Work::default()).await.unwrap();
        assert_eq!(rig.collect().await, HashSet::from([layer]));
    }
    rig.reads(clone, &at_second).await;
    rig.reads(rig.volume, &at_second).await;
    rig.pool.snapshot_delete(second).await.unwrap();
    rig.pool.volume_delete(rig.volume).await.unwrap();
    rig.collect().await;
    rig.reads(clone, &at_second).await;
    rig.pool.flatten(clone, &Work::default()).await.unwrap();
    rig.collect().await;
    rig.reads(clone, &at_second).await;
    let layers = rig.pool.volume_layers(clone).await.unwrap();
    assert_eq!(layers.iter().map(Layer::id).collect::<Vec<_>>(), [Some(clone)]);
    qemu_img(&["check", "-f", "qcow2", layers[0].path.to_str().unwrap()]);
}

#[tokio::test]
async fn whether_qemu_switched_or_not_nothing_is_lost() {
    for switched in [false, true] {
        let rig = Rig::blank(4 * MIB).await;
        rig.write(1, 0, MIB).await;
        let (id, layer) = (Uuid::now_v7(), Uuid::now_v7());
        let plan = rig.pool.snapshot_prepare(rig.volume, id, layer).await.unwrap();
        let written = if switched { plan.overlay } else { plan.frozen[0].clone() };
        qemu_io(&written.path, &[&format!("write -P 2 {MIB} {MIB}"), "flush"]);
        let pool = DirPool::open(&rig.root).unwrap();
        assert_eq!(pool.recover(rig.volume).await.unwrap(), [id]);
        rig.reads(rig.volume, &[(1, 0, MIB), (2, MIB, MIB), (0, 2 * MIB, 2 * MIB)]).await;
        let then = u8::from(!switched) * 2;
        assert!(reads(&rig.layer(rig.volume), &[(1, 0, MIB), (then, MIB, MIB)]));
    }
}

#[tokio::test]
async fn used_is_what_nobody_else_needs() {
    let rig = Rig::blank(64 * MIB).await;
    rig.write(1, 0, 8 * MIB).await;
    let used = async |id| rig.pool.volume_info(id).await.unwrap().unwrap().used;
    assert!(used(rig.volume).await >= 8 * MIB);
    let id = rig.snapshot().await;
    rig.write(2, 8 * MIB, 4 * MIB).await;
    let whole = used(rig.volume).await;
    assert!(whole >= 12 * MIB, "its own snapshots count: {whole}");
    assert!(rig.pool.snapshot_list().await.unwrap()[0].used >= 8 * MIB);
    let clone = rig.clone_of(id, 64 * MIB).await;
    assert!(used(clone).await < MIB, "what it shares does not count");
    assert!((4 * MIB..5 * MIB).contains(&used(rig.volume).await), "the clone needs the first layer, too");
    rig.pool.volume_delete(clone).await.unwrap();
    assert_eq!(used(rig.volume).await, whole);
}

#[tokio::test]
async fn a_grown_volume_reads_zeroes_at_its_end() {
    let rig = Rig::over_image().await;
    rig.write(1, 7 * MIB, MIB).await;
    rig.snapshot().await;
    rig.pool.volume_grow(rig.volume, 4 << 30).await.unwrap();
    rig.reads(rig.volume, &[(0x5a, 0, 4 * MIB), (1, 7 * MIB, MIB), (0, 8 * MIB, 64 * MIB)]).await;
    rig.write(2, (4 << 30) - MIB, MIB).await;
    rig.pool.flatten(rig.volume, &Work::default()).await.unwrap();
    rig.reads(rig.volume, &[(0x5a, 0, 4 * MIB), (1, 7 * MIB, MIB), (2, (4 << 30) - MIB, MIB)]).await;
}

#[tokio::test]
async fn a_check_finds_leaks_and_corruption_and_repairs_them() {
    let rig = Rig::blank(4 * MIB).await;
    rig.write(1, 0, MIB).await;
    rig.snapshot().await;
    rig.write(2, 0, MIB).await;
    let work = Work::default();
    let check = async |repair| rig.pool.volume_check(rig.volume, repair, &work).await.unwrap();
    assert!(check(false).await.clean);
    assert_eq!(work.progress(), 10_000);
    let top = fs::OpenOptions::new().write(true).read(true).open(rig.top(rig.volume).await).unwrap();
    let refcounts = 2 * CLUSTER;
    let last = top.metadata().unwrap().len() / CLUSTER;
    top.set_len((last + 1) * CLUSTER).unwrap();
    top.write_all_at(&1u16.to_be_bytes(), refcounts + 2 * last).unwrap();
    let report = check(false).await;
    assert_eq!((report.clean, report.leaks, report.repaired), (true, 1, 0), "a leak only takes room");
    // The first data cluster, as nobody's.
    top.write_all_at(&0u16.to_be_bytes(), refcounts + 2 * (last - 1)).unwrap();
    let report = check(false).await;
    assert!(!report.clean && report.corruptions > 0, "{report:?}");
    let report = check(true).await;
    assert!(report.clean && report.leaks == 0 && report.repaired >= 2, "{report:?}");
    assert_eq!(check(true).await.repaired, 0);
    rig.reads(rig.volume, &[(2, 0, MIB)]).await;

    // Marked as corrupt by QEMU, it is opened by nobody before it is repaired.
    top.write_all_at(&2u64.to_be_bytes(), 72).unwrap();
    assert_eq!(code(rig.pool.volume_layers(rig.volume).await), "damaged");
    assert_eq!(rig.pool.audit().await.unwrap().broken.len(), 1);
    assert!(check(true).await.clean);
    rig.reads(rig.volume, &[(2, 0, MIB)]).await;
}

#[tokio::test]
async fn nothing_is_collected_while_a_layer_is_missing() {
    let rig = Rig::blank(4 * MIB).await;
    rig.write(1, 0, MIB).await;
    let first = rig.snapshot().await;
    let middle = rig.top(rig.volume).await;
    let second = rig.snapshot().await;
    let garbage = Uuid::now_v7();
    rig.pool.snapshot_revert(rig.volume, first, garbage).await.unwrap();
    rig.pool.snapshot_revert(rig.volume, second, Uuid::now_v7()).await.unwrap();
    let away = rig.root.join("../away");
    fs::rename(&middle, &away).unwrap();

    assert_eq!(code(rig.pool.collect(&HashSet::new()).await), "damaged");
    assert_eq!(code(rig.pool.volume_layers(rig.volume).await), "damaged");
    let broken = rig.pool.audit().await.unwrap().broken;
    let whys: Vec<&String> = broken
        .iter()
        .map(|broken| match broken {
            Broken::Volume { id, why } if *id == rig.volume => why,
            Broken::Snapshot { id, why } if *id == second => why,
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(whys.len() == 2 && whys.iter().all(|why| why.contains("is missing")), "{whys:?}");

    fs::rename(&away, &middle).unwrap();
    assert!(rig.collect().await.contains(&garbage));
    rig.reads(rig.volume, &[(1, 0, MIB)]).await;
    assert!(rig.pool.audit().await.unwrap().broken.is_empty());
}

#[tokio::test]
async fn chains_that_we_never_made_are_refused() {
    let rig = Rig::blank(MIB).await;
    let base = |child: Uuid, parent: Uuid| {
        let (child, parent) = (rig.layer(child), format!("{parent}.qcow2"));
        qemu_img(&[
            "create",
            "-q",
            "-u",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            &parent,
            child.to_str().unwrap(),
            "1M",
        ]);
    };
    let (a, b) = (Uuid::now_v7(), Uuid::now_v7());
    base(a, b);
    assert_eq!(code(rig.pool.volume_layers(a).await), "damaged", "a layer is missing");
    base(b, a);
    let error = rig.pool.volume_layers(a).await.unwrap_err();
    assert!(error.to_string().contains("circle"), "{error}");
    fs::remove_file(rig.layer(b)).unwrap();
    fs::remove_file(rig.layer(a)).unwrap();
    let chain: Vec<Uuid> = (0..64).map(|_| Uuid::now_v7()).collect();
    chain.windows(2).for_each(|pair| base(pair[0], pair[1]));
    base(chain[63], rig.volume);
    let error = rig.pool.volume_layers(chain[0]).await.unwrap_err();
    assert!(error.to_string().contains("more than 64"), "{error}");
    assert_eq!(rig.pool.volume_layers(chain[1]).await.unwrap().len(), 64);
}

#[tokio::test]
async fn pointers_and_records_are_read_strictly() {
    let rig = Rig::blank(MIB).await;
    let id = rig.snapshot().await;
    let (pointer, record) = (
        rig.root.join(format!("volumes/{}.json", rig.volume)),
        rig.root.join(format!("snapshots/{id}.json")),
    );
    for (path, texts) in [
        (&pointer, ["{}", "", "{\"top\":\"../../etc/passwd\"}", "{\"top\":null}"]),
        (&record, ["{}", "", "{\"volume\":1}", "[]"]),
    ] {
        let good = fs::read(path).unwrap();
        for text in texts {
            fs::write(path, text).unwrap();
            assert_eq!(rig.pool.audit().await.unwrap().broken.len(), 1, "{text}");
            assert_eq!(code(rig.pool.collect(&HashSet::new()).await), "damaged");
        }
        fs::remove_file(path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", path).unwrap();
        assert_eq!(code(rig.pool.collect(&HashSet::new()).await), "io", "links are not followed");
        fs::remove_file(path).unwrap();
        fs::write(path, good).unwrap();
    }
    assert!(rig.pool.audit().await.unwrap().broken.is_empty());
    // A damaged record keeps a volume from starting only while it may name that volume's newest layer.
    let other = NewVolume { id: Uuid::now_v7(), size: MIB, source: VolumeSource::Blank };
    rig.pool.volume_create(&other).await.unwrap();
    let pending = Uuid::now_v7();
    rig.pool.snapshot_prepare(rig.volume, pending, Uuid::now_v7()).await.unwrap();
    fs::write(rig.root.join(format!("snapshots/{pending}.json")), "?").unwrap();
    assert_eq!(code(rig.pool.recover(rig.volume).await), "damaged");
    assert!(rig.pool.recover(other.id).await.unwrap().is_empty());
}

#[tokio::test]
async fn the_audit_finds_files_of_nobody() {
    let rig = Rig::blank(MIB).await;
    let strays = ["volumes/notes.txt", "images/disk.img", "snapshots/x.json", "volumes/ABC.qcow2"];
    strays.iter().for_each(|name| fs::write(rig.root.join(name), vec![1; 5000]).unwrap());
    let mut found: Vec<PathBuf> = rig
        .pool
        .audit()
        .await
        .unwrap()
        .orphans
        .into_iter()
        .map(|orphan| {
            assert!(orphan.bytes >= 5000);
            orphan.path
        })
        .collect();
    found.sort();
    let mut expected: Vec<PathBuf> = strays.iter().map(|name| rig.root.join(name)).collect();
    expected.sort();
    assert_eq!(found, expected);
    rig.collect().await;
    assert!(strays.iter().all(|name| rig.root.join(name).exists()), "nothing of it is deleted");
}

#[tokio::test]
async fn two_do_not_work_on_one_layer() {
    let rig = Rig::over_image().await;
    rig.write(1, 0, MIB).await;
    let first = rig.snapshot().await;
    rig.pool.snapshot_delete(first).await.unwrap();
    let top = rig.pool.volume_info(rig.volume).await.unwrap().unwrap().top;
    let lock = |id: Uuid| {
        let path = rig.root.join(format!("locks/{id}.lock"));
        let file = fs::File::create(path).unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
        file
    };
    let work = Work::default();
    let held = lock(top);
    assert_eq!(code(rig.pool.merge(rig.volume, top, &work).await), "busy");
    assert_eq!(code(rig.pool.flatten(rig.volume, &work).await), "busy");
    assert_eq!(code(rig.pool.volume_grow(rig.volume, 16 * MIB).await), "busy");
    assert_eq!(code(rig.pool.volume_check(rig.volume, false, &work).await), "busy");
    assert_eq!(code(rig.pool.snapshot_prepare(rig.volume, Uuid::now_v7(), Uuid::now_v7()).await), "busy");
    drop(held);
    let held = lock(rig.volume);
    assert_eq!(code(rig.pool.merge(rig.volume, top, &work).await), "busy", "what it reads from is written");
    drop(held);
    rig.pool.merge(rig.volume, top, &work).await.unwrap();
    let held = lock(rig.volume);
    assert!(rig.collect().await.is_empty(), "someone works on it");
    drop(held);
    assert_eq!(rig.collect().await, HashSet::from([rig.volume]));
    DirPool::open(&rig.root).unwrap();
    assert_eq!(fs::read_dir(rig.root.join("locks")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_full_disk_stops_a_merge_and_harms_nothing() {
    let Some(tmpfs) = Tmpfs::mount(24 << 20) else { return };
    let pool = DirPool::open(tmpfs.path()).unwrap();
    let volume = Uuid::now_v7();
    pool.volume_create(&NewVolume { id: volume, size: 64 * MIB, source: VolumeSource::Blank }).await.unwrap();
    let path = |id: Uuid| tmpfs.path().join(format!("volumes/{id}.qcow2"));
    qemu_io(&path(volume), &[&format!("write -P 1 0 {}", 14 * MIB), "flush"]);
    let (id, layer) = (Uuid::now_v7(), Uuid::now_v7());
    pool.snapshot_prepare(volume, id, layer).await.unwrap();
    pool.snapshot_commit(volume, id).await.unwrap();
    pool.snapshot_delete(id).await.unwrap();
    for _ in 0..2 {
        assert_eq!(code(pool.merge(volume, layer, &Work::default()).await), "no_space");
        assert_eq!(pool.volume_layers(volume).await.unwrap().len(), 2);
        assert!(reads(&path(layer), &[(1, 0, 14 * MIB)]));
    }
    assert!(pool.audit().await.unwrap().broken.is_empty());
    let other = pool.snapshot_prepare(volume, Uuid::now_v7(), Uuid::now_v7()).await;
    match other {
        Ok(_) => {}
        Err(error) => assert_eq!(error.code(), "no_space"),
    }
    assert!(reads(&path(layer), &[(1, 0, 14 * MIB)]));
}
