//! kill -9 in the middle of anything that is done to a tree of snapshots: the pool opens, nothing is broken, and what was
//! written and flushed is there, in the volume and in each snapshot.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, OpenOptions},
    io::Write,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use ostler_storage::{Audit, DirPool, NewVolume, Pool, VolumeSource, Work};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::support::{nothing_is_locked_in, nothing_runs_on, qemu_io, qemu_io_reads};

const POOL: &str = "OSTLER_TEST_KILLED_POOL";
const SLOTS: usize = 8;
const SLOT: u64 = 1 << 20;

/// What the victim does, one at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Op {
    Write { slot: usize, value: u8 },
    Snapshot { id: Uuid, layer: Uuid },
    Revert { id: Uuid, layer: Uuid },
    Delete { id: Uuid },
    Clone { id: Uuid, volume: Uuid },
    Collect,
    Merge,
    Flatten,
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    op: Op,
    done: bool,
}

/// What must be in the pool, by the log of what was begun and done.
#[derive(Debug, Default)]
struct Model {
    slots: [u8; SLOTS],
    snapshots: BTreeMap<Uuid, [u8; SLOTS]>,
    /// Begun and not done.
    open: Option<Op>,
}

impl Model {
    fn load(log: &Path) -> Self {
        let mut model = Self::default();
        for line in fs::read_to_string(log).unwrap_or_default().lines() {
            let line: Line = serde_json::from_str(line).unwrap();
            if line.done { model.apply(line.op) } else { model.open = Some(line.op) }
        }
        model
    }

    fn apply(&mut self, op: Op) {
        self.open = None;
        match op {
            Op::Write { slot, value } => self.slots[slot] = value,
            Op::Snapshot { id, .. } => drop(self.snapshots.insert(id, self.slots)),
            Op::Revert { id, .. } => self.slots = self.snapshots[&id],
            Op::Delete { id } => drop(self.snapshots.remove(&id)),
            Op::Clone { .. } | Op::Collect | Op::Merge | Op::Flatten => {}
        }
    }

    fn choose(&self, random: &mut impl FnMut() -> usize) -> Op {
        let some = self.snapshots.keys().nth(random() % self.snapshots.len().max(1)).copied();
        let fresh = Uuid::now_v7();
        match (random() % 16, some) {
            (0..5, _) | (_, None) if self.snapshots.is_empty() && random().is_multiple_of(2) => {
                Op::Snapshot { id: Uuid::now_v7(), layer: fresh }
            }
            (0..5, _) | (_, None) => Op::Write { slot: random() % SLOTS, value: (random() % 255 + 1) as u8 },
            (5..8, Some(_)) if self.snapshots.len() < 8 => Op::Snapshot { id: Uuid::now_v7(), layer: fresh },
            (5..10, Some(id)) => Op::Delete { id },
            (10..12, Some(id)) => Op::Revert { id, layer: fresh },
            (12, Some(id)) => Op::Clone { id, volume: fresh },
            (13, Some(_)) => Op::Collect,
            (14, Some(_)) => Op::Merge,
            (_, Some(_)) => {
                if random().is_multiple_of(3) {
                    Op::Flatten
                } else {
                    Op::Merge
                }
            }
        }
    }
}

fn note(log: &Path, op: Op, done: bool) {
    let mut line = serde_json::to_vec(&Line { op, done }).unwrap();
    line.push(b'\n');
    OpenOptions::new().create(true).append(true).open(log).unwrap().write_all(&line).unwrap();
}

async fn perform(pool: &DirPool, volume: Uuid, op: Op) {
    match op {
        Op::Write { slot, value } => {
            let top = pool.volume_layers(volume).await.unwrap().remove(0).path;
            qemu_io(&top, &[&format!("write -P {value} {} {SLOT}", slot as u64 * SLOT), "flush"]);
        }
        Op::Snapshot { id, layer } => {
            pool.snapshot_prepare(volume, id, layer).await.unwrap();
            pool.snapshot_commit(volume, id).await.unwrap();
        }
        Op::Revert { id, layer } => {
            pool.snapshot_revert(volume, id, layer).await.unwrap();
        }
        Op::Delete { id } => pool.snapshot_delete(id).await.unwrap(),
        Op::Clone { id, volume } => {
            let size = SLOTS as u64 * SLOT;
            let clone = NewVolume { id: volume, size, source: VolumeSource::Snapshot { snapshot: id } };
            // Flattened before the kill, it is not what would be made now.
            if pool.volume_info(volume).await.unwrap().is_none() {
                pool.volume_create(&clone).await.unwrap();
            }
            pool.flatten(volume, &Work::default()).await.unwrap();
            pool.volume_delete(volume).await.unwrap();
        }
        Op::Collect => drop(pool.collect(&HashSet::new()).await.unwrap()),
        Op::Merge => {
            if let Some(merge) = pool.merge_candidates().await.unwrap().first() {
                pool.merge(merge.layer, merge.into_child, &Work::default()).await.unwrap();
            }
        }
        Op::Flatten => pool.flatten(volume, &Work::default()).await.unwrap(),
    }
}

/// Not a test of its own: the process that is killed.
#[tokio::test]
#[ignore = "run by the test below, as the process to be killed"]
async fn victim() {
    let Some(dir) = std::env::var_os(POOL) else { return };
    let (pool, log) = (DirPool::open(Path::new(&dir).join("pool")).unwrap(), Path::new(&dir).join("log"));
    let volume = pool.volume_list().await.unwrap()[0];
    let mut random = random();
    let mut model = Model::load(&log);
    loop {
        let op = model.choose(&mut random);
        note(&log, op, false);
        perform(&pool, volume, op).await;
        note(&log, op, true);
        model.apply(op);
    }
}

/// Numbers that are different in each process.
fn random() -> impl FnMut() -> usize {
    let mut state = Uuid::new_v4().as_u128() as u64 | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize
    }
}

/// Reads the volume and every snapshot.
async fn verify(pool: &DirPool, volume: Uuid, model: &Model) {
    assert_eq!(pool.audit().await.unwrap().broken, []);
    assert_eq!(pool.volume_list().await.unwrap(), [volume]);
    let reads = |slots: &[u8; SLOTS]| -> Vec<String> {
        let read = |(at, value): (usize, &u8)| format!("read -P {value} {} {SLOT}", at as u64 * SLOT);
        slots.iter().enumerate().map(read).collect()
    };
    let layers = pool.volume_layers(volume).await.unwrap();
    assert!(qemu_io_reads(&layers[0].path, &reads(&model.slots)), "the volume is not {:?}", model.slots);
    let listed = pool.snapshot_list().await.unwrap();
    let ids: Vec<Uuid> = model.snapshots.keys().copied().collect();
    let mut found: Vec<Uuid> = listed.iter().map(|snapshot| snapshot.id).collect();
    found.sort_unstable();
    assert_eq!(found, ids);
    for snapshot in listed {
        let path = layers[0].path.with_file_name(format!("{}.qcow2", snapshot.layer));
        let slots = &model.snapshots[&snapshot.id];
        assert!(!snapshot.prepared && qemu_io_reads(&path, &reads(slots)), "{snapshot:?} is not {slots:?}");
    }
}

#[tokio::test]
async fn a_tree_killed_anywhere_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (root, log) = (dir.path().join("pool"), dir.path().join("log"));
    let volume = Uuid::now_v7();
    let new = NewVolume { id: volume, size: SLOTS as u64 * SLOT, source: VolumeSource::Blank };
    DirPool::open(&root).unwrap().volume_create(&new).await.unwrap();
    let (mut random, mut cut) = (random(), 0);
    for round in 0..30 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash::victim", "--ignored", "--nocapture"])
            .env(POOL, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Somewhere in its work, which begins with the first line of this round.
        let begun = fs::metadata(&log).map_or(0, |metadata| metadata.len());
        let deadline = Instant::now() + Duration::from_secs(20);
        while fs::metadata(&log).map_or(0, |metadata| metadata.len()) == begun {
            assert!(Instant::now() < deadline, "the victim does nothing");
            assert!(child.try_wait().unwrap().is_none(), "the victim has ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros((random() % 250_000) as u64));
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        nothing_runs_on(dir.path());
        nothing_is_locked_in(&root.join("volumes"));
        let mut model = Model::load(&log);
        assert_eq!(ended, None, "round {round}: the victim failed in {:?}", model.open);

        let pool = DirPool::open(&root).unwrap();
        assert_eq!(pool.audit().await.unwrap().broken, [], "round {round}, in {:?}", model.open);
        pool.recover(volume).await.unwrap();
        // What was begun is done again, as its owner would.
        if let Some(op) = model.open {
            cut += 1;
            perform(&pool, volume, op).await;
            note(&log, op, true);
            model.apply(op);
        }
        verify(&pool, volume, &model).await;
        if round % 5 == 0 {
            let report = pool.volume_check(volume, true, &Work::default()).await.unwrap();
            assert!(report.clean, "{report:?}");
        }
    }
    assert!(cut > 10, "only {cut} of the rounds were cut in the middle of something");

    let pool = DirPool::open(&root).unwrap();
    pool.volume_delete(volume).await.unwrap();
    for snapshot in pool.snapshot_list().await.unwrap() {
        pool.snapshot_delete(snapshot.id).await.unwrap();
    }
    pool.collect(&HashSet::new()).await.unwrap();
    assert_eq!(pool.audit().await.unwrap(), Audit::default());
    assert_eq!(fs::read_dir(root.join("volumes")).unwrap().count(), 0);
}
