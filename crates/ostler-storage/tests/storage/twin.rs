//! The directory pool and its simulated twin, told the same in any order, with ids that collide: both answer the same and
//! hold the same tree.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use ostler_storage::{
    DirPool, ImageFormat, ImageRef, ImageSource, Layer, NewVolume, Pool, SimPool, StorageError, VolumeSource,
    Work,
};
use proptest::prelude::*;
use uuid::Uuid;

const MIB: u64 = 1 << 20;

/// One call. Numbers stand for ids; volumes and layers share theirs.
#[derive(Debug, Clone)]
enum Call {
    Create { volume: u8, mib: u64, from: Base },
    Delete { volume: u8 },
    Grow { volume: u8, mib: u64 },
    Flatten { volume: u8 },
    Check { volume: u8, repair: bool },
    Prepare { volume: u8, snapshot: u8, layer: u8 },
    Commit { volume: u8, snapshot: u8 },
    Abort { volume: u8, snapshot: u8 },
    Recover { volume: u8 },
    Revert { volume: u8, snapshot: u8, layer: u8 },
    Drop { snapshot: u8 },
    Collect { open: Option<u8> },
    Merge { layer: u8, child: u8 },
    MergeFirst,
    RemoveImage,
}

#[derive(Debug, Clone, Copy)]
enum Base {
    Blank,
    Image,
    Snapshot(u8),
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let volume = || 0..4u8;
    let snapshot = || 0..5u8;
    let layer = || 0..12u8;
    let from = prop_oneof![
        Just(Base::Blank),
        Just(Base::Image),
        snapshot().prop_map(Base::Snapshot),
        snapshot().prop_map(Base::Snapshot)
    ];
    let call = prop_oneof![
        4 => (volume(), 1..4u64, from).prop_map(|(volume, mib, from)| Call::Create { volume, mib, from }),
        1 => volume().prop_map(|volume| Call::Delete { volume }),
        1 => (volume(), 1..5u64).prop_map(|(volume, mib)| Call::Grow { volume, mib }),
        1 => volume().prop_map(|volume| Call::Flatten { volume }),
        1 => (volume(), any::<bool>()).prop_map(|(volume, repair)| Call::Check { volume, repair }),
        6 => (volume(), snapshot(), layer())
            .prop_map(|(volume, snapshot, layer)| Call::Prepare { volume, snapshot, layer }),
        4 => (volume(), snapshot()).prop_map(|(volume, snapshot)| Call::Commit { volume, snapshot }),
        1 => (volume(), snapshot()).prop_map(|(volume, snapshot)| Call::Abort { volume, snapshot }),
        3 => volume().prop_map(|volume| Call::Recover { volume }),
        3 => (volume(), snapshot(), layer())
            .prop_map(|(volume, snapshot, layer)| Call::Revert { volume, snapshot, layer }),
        2 => snapshot().prop_map(|snapshot| Call::Drop { snapshot }),
        1 => proptest::option::of(layer()).prop_map(|open| Call::Collect { open }),
        1 => (layer(), layer()).prop_map(|(layer, child)| Call::Merge { layer, child }),
        2 => Just(Call::MergeFirst),
        1 => Just(Call::RemoveImage),
    ];
    proptest::collection::vec(call, 1..40)
}

fn id(number: u8) -> Uuid {
    Uuid::from_u128(u128::from(number) + 1)
}

fn snapshot_id(number: u8) -> Uuid {
    Uuid::from_u128(u128::from(number) + 1000)
}

/// What a caller sees of an answer: the error's code, or the ids and sizes in it.
fn seen<T>(result: Result<T, StorageError>, show: impl FnOnce(T) -> String) -> String {
    result.map_or_else(|error| error.code().to_owned(), show)
}

async fn perform(pool: &dyn Pool, image: &ImageRef, call: &Call) -> String {
    let work = Work::default();
    let done = |()| String::from("done");
    let info = |info: ostler_storage::VolumeInfo| {
        format!("{} {} {} {}", info.id, info.virtual_size, info.depth, info.top)
    };
    let sorted = |mut ids: Vec<Uuid>| {
        ids.sort_unstable();
        format!("{ids:?}")
    };
    match *call {
        Call::Create { volume, mib, from } => {
            let source = match from {
                Base::Blank => VolumeSource::Blank,
                Base::Image => VolumeSource::Image { image: image.clone(), virtual_size: MIB },
                Base::Snapshot(snapshot) => VolumeSource::Snapshot { snapshot: snapshot_id(snapshot) },
            };
            seen(pool.volume_create(&NewVolume { id: id(volume), size: mib * MIB, source }).await, info)
        }
        Call::Delete { volume } => seen(pool.volume_delete(id(volume)).await, done),
        Call::Grow { volume, mib } => seen(pool.volume_grow(id(volume), mib * MIB).await, info),
        Call::Flatten { volume } => seen(pool.flatten(id(volume), &work).await, done),
        Call::Check { volume, repair } => {
            seen(pool.volume_check(id(volume), repair, &work).await, |report| format!("{report:?}"))
        }
        Call::Prepare { volume, snapshot, layer } => {
            let plan = pool.snapshot_prepare(id(volume), snapshot_id(snapshot), id(layer)).await;
            seen(plan, |plan| format!("{:?} {:?} {}", ids(&plan.frozen), plan.overlay.id(), plan.depth))
        }
        Call::Commit { volume, snapshot } => {
            seen(pool.snapshot_commit(id(volume), snapshot_id(snapshot)).await, done)
        }
        Call::Abort { volume, snapshot } => {
            seen(pool.snapshot_abort(id(volume), snapshot_id(snapshot)).await, done)
        }
        Call::Recover { volume } => seen(pool.recover(id(volume)).await, sorted),
        Call::Revert { volume, snapshot, layer } => {
            seen(pool.snapshot_revert(id(volume), snapshot_id(snapshot), id(layer)).await, info)
        }
        Call::Drop { snapshot } => seen(pool.snapshot_delete(snapshot_id(snapshot)).await, done),
        Call::Collect { open } => seen(pool.collect(&open.map(id).into_iter().collect()).await, sorted),
        Call::Merge { layer, child } => seen(pool.merge(id(layer), id(child), &work).await, done),
        Call::MergeFirst => match pool.merge_candidates().await.unwrap().first() {
            Some(first) => seen(pool.merge(first.layer, first.into_child, &work).await, done),
            None => String::from("nothing to merge"),
        },
        Call::RemoveImage => seen(pool.image_remove(image).await, done),
    }
}

fn ids(layers: &[Layer]) -> Vec<Option<Uuid>> {
    layers.iter().map(Layer::id).collect()
}

/// All that can be asked of a pool. Nothing may be broken, ever.
async fn state(pool: &dyn Pool) -> String {
    let mut volumes = BTreeMap::new();
    for id in pool.volume_list().await.unwrap() {
        let info = pool.volume_info(id).await.unwrap().expect("a listed volume is there");
        let layers = ids(&pool.volume_layers(id).await.unwrap());
        volumes.insert(id, (info.virtual_size, info.depth, info.top, layers));
    }
    let snapshots: BTreeMap<Uuid, _> = pool
        .snapshot_list()
        .await
        .unwrap()
        .into_iter()
        .map(|info| (info.id, (info.volume, info.layer, info.prepared, info.virtual_size)))
        .collect();
    let audit = pool.audit().await.unwrap();
    assert_eq!(audit.broken, []);
    let orphans: BTreeSet<String> = audit
        .orphans
        .iter()
        .map(|orphan| orphan.path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    let merges = pool.merge_candidates().await.unwrap();
    let provisioned = pool.usage().await.unwrap().provisioned;
    format!("{volumes:#?}\n{snapshots:#?}\n{orphans:#?}\n{merges:#?}\n{provisioned}")
}

async fn agree(calls: &[Call]) {
    let dir = tempfile::tempdir().unwrap();
    let (real, simulated) = (DirPool::open(dir.path()).unwrap(), SimPool::new(1 << 40));
    let content = vec![7u8; MIB as usize];
    let sha256 = crate::support::hex(&<sha2::Sha256 as sha2::Digest>::digest(&content));
    let image = ImageRef { sha256, format: ImageFormat::Raw };
    let pools: [&dyn Pool; 2] = [&real, &simulated];
    for pool in pools {
        let stream = ImageSource::Stream(Box::new(std::io::Cursor::new(content.clone())));
        pool.image_add(&image, stream).await.unwrap();
    }
    for (at, call) in calls.iter().enumerate() {
        let answers = [perform(pools[0], &image, call).await, perform(pools[1], &image, call).await];
        assert_eq!(answers[0], answers[1], "call {at}: {call:?}");
        assert_eq!(state(pools[0]).await, state(pools[1]).await, "after call {at}: {call:?}");
    }
    for pool in pools {
        for volume in pool.volume_list().await.unwrap() {
            pool.volume_delete(volume).await.unwrap();
        }
        for snapshot in pool.snapshot_list().await.unwrap() {
            pool.snapshot_delete(snapshot.id).await.unwrap();
        }
        pool.collect(&HashSet::new()).await.unwrap();
    }
    for folder in ["volumes", "snapshots"] {
        assert_eq!(std::fs::read_dir(dir.path().join(folder)).unwrap().count(), 0, "{folder} is empty");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_answer_the_same(calls in calls()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(agree(&calls));
    }
}
