//! Snapshots, clones, reverts, merges and care, as every pool must have them. Each call is made twice.

use std::collections::{HashMap, HashSet};

use uuid::Uuid;

use super::{MIB, add_image, blank, clear, code, from_image};
use crate::{
    Audit, CheckReport, Merge, NewVolume, Pool, SnapshotInfo, SnapshotPlan, VolumeInfo, VolumeSource, Work,
};

const NONE: [Uuid; 0] = [];

pub(super) async fn all(pool: &dyn Pool) {
    a_snapshot_is_prepared_and_committed(pool).await;
    what_was_prepared_can_be_aborted(pool).await;
    what_was_prepared_is_committed_after_a_crash(pool).await;
    a_tree_of_snapshots(pool).await;
    reverting_leaves_garbage(pool).await;
    clones_stand_on_snapshots(pool).await;
    snapshots_outlive_their_volume(pool).await;
    deleting_in_the_middle(pool).await;
    collecting_spares_what_is_in_use(pool).await;
    flattening(pool).await;
    growing(pool).await;
    chains_are_bounded(pool).await;
    wrong_snapshots_are_refused(pool).await;
}

/// Takes a snapshot of a closed volume, each step twice. Returns the snapshot and the new top.
async fn snapshot(pool: &dyn Pool, volume: Uuid) -> (Uuid, Uuid) {
    let (id, layer) = (Uuid::now_v7(), Uuid::now_v7());
    let plan = prepare(pool, volume, id, layer).await;
    assert_eq!(plan.overlay.id(), Some(layer));
    commit(pool, volume, id).await;
    (id, layer)
}

async fn prepare(pool: &dyn Pool, volume: Uuid, snapshot: Uuid, layer: Uuid) -> SnapshotPlan {
    let plan = pool.snapshot_prepare(volume, snapshot, layer).await.unwrap();
    let again = pool.snapshot_prepare(volume, snapshot, layer).await.expect("preparing again is fine");
    assert_eq!(plan, again);
    plan
}

async fn commit(pool: &dyn Pool, volume: Uuid, snapshot: Uuid) {
    pool.snapshot_commit(volume, snapshot).await.unwrap();
    pool.snapshot_commit(volume, snapshot).await.expect("committing again is fine");
}

async fn revert(pool: &dyn Pool, volume: Uuid, snapshot: Uuid) -> VolumeInfo {
    let layer = Uuid::now_v7();
    let info = pool.snapshot_revert(volume, snapshot, layer).await.unwrap();
    let again = pool.snapshot_revert(volume, snapshot, layer).await.expect("reverting again is fine");
    assert_eq!((info.top, again.top), (layer, layer));
    info
}

async fn delete(pool: &dyn Pool, snapshot: Uuid) {
    pool.snapshot_delete(snapshot).await.unwrap();
    pool.snapshot_delete(snapshot).await.expect("deleting again is fine");
}

async fn collect(pool: &dyn Pool) -> HashSet<Uuid> {
    let gone = pool.collect(&HashSet::new()).await.unwrap();
    assert!(pool.collect(&HashSet::new()).await.unwrap().is_empty(), "nothing is left to collect");
    gone.into_iter().collect()
}

async fn merge(pool: &dyn Pool, merge: Merge) {
    pool.merge(merge.layer, merge.into_child, &Work::default()).await.unwrap();
    pool.merge(merge.layer, merge.into_child, &Work::default()).await.expect("merging again is fine");
}

async fn made(pool: &dyn Pool, volume: NewVolume) -> Uuid {
    pool.volume_create(&volume).await.unwrap();
    volume.id
}

fn clone_of(snapshot: Uuid, size: u64) -> NewVolume {
    NewVolume { id: Uuid::now_v7(), size, source: VolumeSource::Snapshot { snapshot } }
}

async fn info(pool: &dyn Pool, volume: Uuid) -> VolumeInfo {
    pool.volume_info(volume).await.unwrap().expect("the volume is there")
}

/// The ids of the layers of a volume, top first.
async fn layers(pool: &dyn Pool, volume: Uuid) -> Vec<Uuid> {
    let layers = pool.volume_layers(volume).await.unwrap();
    let ids: Vec<Uuid> = layers.iter().filter_map(crate::Layer::id).collect();
    let info = info(pool, volume).await;
    assert_eq!((info.depth as usize, info.top), (ids.len(), ids[0]));
    ids
}

async fn snapshots(pool: &dyn Pool) -> HashMap<Uuid, SnapshotInfo> {
    pool.snapshot_list().await.unwrap().into_iter().map(|info| (info.id, info)).collect()
}

/// Deletes everything, and nothing may be left that does not add up.
async fn clear_all(pool: &dyn Pool) {
    assert_eq!(pool.audit().await.unwrap().broken, []);
    for id in pool.volume_list().await.unwrap() {
        pool.volume_delete(id).await.unwrap();
    }
    for id in snapshots(pool).await.into_keys() {
        delete(pool, id).await;
    }
    collect(pool).await;
    clear(pool).await;
    assert_eq!(pool.audit().await.unwrap(), Audit::default());
}

async fn a_snapshot_is_prepared_and_committed(pool: &dyn Pool) {
    let image = add_image(pool, 20).await;
    let volume = made(pool, from_image(&image, 2 * MIB)).await;
    let (id, layer) = (Uuid::now_v7(), Uuid::now_v7());
    let before = pool.volume_layers(volume).await.unwrap();
    let plan = prepare(pool, volume, id, layer).await;
    assert_eq!((&plan.frozen, plan.depth), (&before, 1));
    assert_eq!(pool.volume_layers(volume).await.unwrap(), before, "nothing has moved yet");
    assert!(snapshots(pool).await[&id].prepared);
    assert_eq!(code(pool.snapshot_delete(id).await), "busy");
    assert_eq!(code(pool.volume_create(&clone_of(id, 2 * MIB)).await), "busy");
    assert_eq!(code(pool.snapshot_prepare(volume, Uuid::now_v7(), Uuid::now_v7()).await), "busy");
    assert!(collect(pool).await.is_empty(), "the new layer is needed");

    commit(pool, volume, id).await;
    let after = pool.volume_layers(volume).await.unwrap();
    assert_eq!(after[0], plan.overlay);
    assert_eq!(after[1..], before);
    let expected = SnapshotInfo {
        id,
        volume,
        layer: volume,
        prepared: false,
        virtual_size: 2 * MIB,
        used: snapshots(pool).await[&id].used,
    };
    assert_eq!(snapshots(pool).await, HashMap::from([(id, expected)]));
    assert_eq!(prepare(pool, volume, id, layer).await, plan, "a late repeat changes nothing");
    assert_eq!(code(pool.snapshot_prepare(volume, id, Uuid::now_v7()).await), "conflict");
    assert_eq!(code(pool.snapshot_abort(volume, id).await), "conflict");
    assert_eq!(code(pool.image_remove(&image).await), "in_use");
    assert_eq!(pool.volume_list().await.unwrap(), [volume], "a layer is no volume");
    clear_all(pool).await;
}

async fn what_was_prepared_can_be_aborted(pool: &dyn Pool) {
    let volume = made(pool, blank(MIB)).await;
    let (id, layer) = (Uuid::now_v7(), Uuid::now_v7());
    for _ in 0..2 {
        prepare(pool, volume, id, layer).await;
        pool.snapshot_abort(volume, id).await.unwrap();
        pool.snapshot_abort(volume, id).await.expect("aborting again is fine");
        assert_eq!(layers(pool, volume).await, [volume]);
        assert!(snapshots(pool).await.is_empty());
    }
    assert_eq!(code(pool.snapshot_commit(volume, id).await), "not_found");
    assert_eq!(pool.audit().await.unwrap(), Audit::default());
    clear_all(pool).await;
}

async fn what_was_prepared_is_committed_after_a_crash(pool: &dyn Pool) {
    let volume = made(pool, blank(MIB)).await;
    let (id, layer) = (Uuid::now_v7(), Uuid::now_v7());
    prepare(pool, volume, id, layer).await;
    assert_eq!(pool.recover(volume).await.unwrap(), [id]);
    assert_eq!(pool.recover(volume).await.unwrap(), NONE);
    assert_eq!(layers(pool, volume).await, [layer, volume]);
    assert!(!snapshots(pool).await[&id].prepared);
    assert_eq!(pool.recover(Uuid::now_v7()).await.unwrap(), NONE, "a volume that is gone needs nothing");

    // The calls that need a closed volume do it themselves.
    let (second, next) = (Uuid::now_v7(), Uuid::now_v7());
    prepare(pool, volume, second, next).await;
    revert(pool, volume, id).await;
    assert!(!snapshots(pool).await[&second].prepared);
    let (third, next) = (Uuid::now_v7(), Uuid::now_v7());
    prepare(pool, volume, third, next).await;
    pool.volume_grow(volume, 2 * MIB).await.unwrap();
    assert_eq!(layers(pool, volume).await[0], next);
    assert_eq!(snapshots(pool).await[&third].virtual_size, MIB, "what is frozen does not grow");
    clear_all(pool).await;
}

async fn a_tree_of_snapshots(pool: &dyn Pool) {
    let volume = made(pool, blank(MIB)).await;
    let (first, one) = snapshot(pool, volume).await;
    let (second, two) = snapshot(pool, volume).await;
    assert_eq!(layers(pool, volume).await, [two, one, volume]);
    let branch = revert(pool, volume, first).await.top;
    assert_eq!(layers(pool, volume).await, [branch, volume]);
    let (third, three) = snapshot(pool, volume).await;
    assert_eq!(layers(pool, volume).await, [three, branch, volume]);
    let back = revert(pool, volume, second).await.top;
    assert_eq!(layers(pool, volume).await, [back, one, volume]);
    assert_eq!(collect(pool).await, HashSet::from([two, three]), "the tops that were left");
    let listed: HashMap<Uuid, Uuid> =
        snapshots(pool).await.into_values().map(|info| (info.id, info.layer)).collect();
    assert_eq!(listed, HashMap::from([(first, volume), (second, one), (third, branch)]));
    clear_all(pool).await;
}

async fn reverting_leaves_garbage(pool: &dyn Pool) {
    let volume = made(pool, blank(MIB)).await;
    let (id, one) = snapshot(pool, volume).await;
    let layer = Uuid::now_v7();
    pool.snapshot_revert(volume, id, layer).await.unwrap();
    let orphans = pool.audit().await.unwrap().orphans;
    assert_eq!(orphans.len(), 1, "{orphans:?}");
    assert!(orphans[0].path.to_string_lossy().contains(&one.to_string()));
    let (_, next) = snapshot(pool, volume).await;
    assert_eq!(code(pool.snapshot_revert(volume, id, layer).await), "conflict");
    assert_eq!(layers(pool, volume).await, [next, layer, volume], "a late repeat changes nothing");
    assert_eq!(collect(pool).await, HashSet::from([one]));
    clear_all(pool).await;
}

async fn clones_stand_on_snapshots(pool: &dyn Pool) {
    let image = add_image(pool, 21).await;
    let volume = made(pool, from_image(&image, 2 * MIB)).await;
    let (id, _) = snapshot(pool, volume).await;
    let (same, larger) = (clone_of(id, 2 * MIB), clone_of(id, 3 * MIB));
    for clone in [&same, &larger] {
        let made = pool.volume_create(clone).await.unwrap();
        assert_eq!((made.virtual_size, made.depth, made.top), (clone.size, 2, clone.id));
        let again = pool.volume_create(clone).await.expect("cloning again is fine");
        assert_eq!(again.top, clone.id);
        assert_eq!(layers(pool, clone.id).await, [clone.id, volume]);
    }
    assert_eq!(code(pool.volume_create(&clone_of(id, MIB)).await), "too_small");
    assert_eq!(code(pool.volume_create(&clone_of(Uuid::now_v7(), MIB)).await), "not_found");
    let blank = NewVolume { source: VolumeSource::Blank, ..same.clone() };
    assert_eq!(code(pool.volume_create(&blank).await), "conflict");
    // The snapshot goes, what the clones need of it stays, and so does what they are.
    delete(pool, id).await;
    assert!(collect(pool).await.is_empty());
    pool.volume_create(&same).await.expect("it is what was asked for still");
    let provisioned = pool.usage().await.unwrap().provisioned;
    assert_eq!(provisioned, 7 * MIB, "a volume counts once, however many layers it has");
    pool.volume_delete(volume).await.unwrap();
    assert_eq!(layers(pool, same.id).await, [same.id, volume]);
    clear_all(pool).await;
}

async fn snapshots_outlive_their_volume(pool: &dyn Pool) {
    let new = blank(MIB);
    let volume = made(pool, new.clone()).await;
    let (id, top) = snapshot(pool, volume).await;
    let (pending, next) = (Uuid::now_v7(), Uuid::now_v7());
    prepare(pool, volume, pending, next).await;
    pool.volume_delete(volume).await.unwrap();
    pool.volume_delete(volume).await.expect("deleting again is fine");
    assert_eq!(pool.volume_info(volume).await.unwrap(), None);
    assert!(pool.volume_list().await.unwrap().is_empty());
    assert_eq!(code(pool.volume_create(&new).await), "conflict");
    assert!(!snapshots(pool).await[&pending].prepared, "nobody is left to commit it");
    assert_eq!(collect(pool).await, HashSet::new());
    let clone = made(pool, clone_of(pending, MIB)).await;
    assert_eq!(layers(pool, clone).await, [clone, top, volume]);
    assert_eq!(code(pool.snapshot_revert(volume, id, Uuid::now_v7()).await), "not_found");
    pool.volume_delete(clone).await.unwrap();
    delete(pool, pending).await;
    assert_eq!(collect(pool).await, HashSet::from([top]));
    delete(pool, id).await;
    assert_eq!(collect(pool).await, HashSet::from([volume]));
    pool.volume_create(&new).await.expect("the id is free again");
    clear_all(pool).await;
}

async fn deleting_in_the_middle(pool: &dyn Pool) {
    let volume = made(pool, blank(MIB)).await;
    let (first, one) = snapshot(pool, volume).await;
    let (second, two) = snapshot(pool, volume).await;
    let (third, three) = snapshot(pool, volume).await;
    assert_eq!(pool.merge_candidates().await.unwrap(), []);
    assert_eq!(code(pool.merge(one, two, &Work::default()).await), "in_use");
    delete(pool, second).await;
    assert!(collect(pool).await.is_empty(), "the layer is in the middle of a chain");
    let candidate = Merge { layer: one, into_child: two };
    assert_eq!(pool.merge_candidates().await.unwrap(), [candidate]);
    let cancelled = Work::default();
    cancelled.cancel.cancel();
    assert_eq!(code(pool.merge(one, two, &cancelled).await), "cancelled");
    assert_eq!(layers(pool, volume).await, [three, two, one, volume]);
    merge(pool, candidate).await;
    assert_eq!(layers(pool, volume).await, [three, two, volume]);
    assert_eq!(collect(pool).await, HashSet::from([one]));
    let listed: HashSet<Uuid> = snapshots(pool).await.into_keys().collect();
    assert_eq!(listed, HashSet::from([first, third]));

    // The first one carries a clone, too, so that two layers stand on it: then it cannot go.
    let clone = made(pool, clone_of(first, MIB)).await;
    delete(pool, first).await;
    assert_eq!(pool.merge_candidates().await.unwrap(), []);
    assert_eq!(code(pool.merge(volume, two, &Work::default()).await), "in_use");
    pool.volume_delete(clone).await.unwrap();
    let candidate = Merge { layer: volume, into_child: two };
    assert_eq!(pool.merge_candidates().await.unwrap(), [candidate]);
    merge(pool, candidate).await;
    assert_eq!(layers(pool, volume).await, [three, two]);
    assert_eq!(collect(pool).await, HashSet::from([volume]));
    assert_eq!(code(pool.merge(two, volume, &Work::default()).await), "not_found");
    assert_eq!(pool.volume_list().await.unwrap(), [volume], "it is the same volume");
    clear_all(pool).await;
}

async fn collecting_spares_what_is_in_use(pool: &dyn Pool) {
    let volume = made(pool, blank(MIB)).await;
    let (first, one) = snapshot(pool, volume).await;
    let (second, two) = snapshot(pool, volume).await;
    revert(pool, volume, first).await;
    delete(pool, second).await;
    let open = HashSet::from([two]);
    assert_eq!(pool.collect(&open).await.unwrap(), NONE, "a machine has it open, and reads what is below");
    assert_eq!(collect(pool).await, HashSet::from([one, two]));
    clear_all(pool).await;
}

async fn flattening(pool: &dyn Pool) {
    let image = add_image(pool, 22).await;
    let volume = made(pool, from_image(&image, 2 * MIB)).await;
    let (id, top) = snapshot(pool, volume).await;
    let cancelled = Work::default();
    cancelled.cancel.cancel();
    assert_eq!(code(pool.flatten(volume, &cancelled).await), "cancelled");
    assert_eq!(layers(pool, volume).await, [top, volume]);
    for _ in 0..2 {
        let work = Work::default();
        pool.flatten(volume, &work).await.expect("flattening again is fine");
    }
    assert_eq!(pool.volume_layers(volume).await.unwrap().len(), 1);
    assert_eq!(info(pool, volume).await.virtual_size, 2 * MIB);
    let report = pool.volume_check(volume, false, &Work::default()).await.unwrap();
    assert_eq!(report, CheckReport { clean: true, ..CheckReport::default() });
    pool.volume_check(volume, true, &Work::default()).await.expect("there is nothing to repair");
    delete(pool, id).await;
    assert_eq!(collect(pool).await, HashSet::from([volume]));
    pool.image_remove(&image).await.expect("nothing stands on it any more");
    assert_eq!(code(pool.flatten(Uuid::now_v7(), &Work::default()).await), "not_found");
    assert_eq!(code(pool.volume_check(Uuid::now_v7(), false, &Work::default()).await), "not_found");
    clear_all(pool).await;
}

async fn growing(pool: &dyn Pool) {
    let volume = made(pool, blank(MIB)).await;
    for _ in 0..2 {
        assert_eq!(pool.volume_grow(volume, 2 * MIB).await.unwrap().virtual_size, 2 * MIB);
    }
    assert_eq!(pool.volume_grow(volume, 1 << 40).await.unwrap().virtual_size, 1 << 40);
    assert_eq!(code(pool.volume_grow(volume, MIB).await), "too_small");
    for size in [0, MIB + 1, u64::MAX] {
        assert_eq!(code(pool.volume_grow(volume, size).await), "invalid");
    }
    assert_eq!(code(pool.volume_grow(Uuid::now_v7(), MIB).await), "not_found");
    assert_eq!(info(pool, volume).await.virtual_size, 1 << 40);
    // A snapshot from before has the size of then, and so has the volume when it goes back.
    let (id, _) = snapshot(pool, volume).await;
    pool.volume_grow(volume, 2 << 40).await.unwrap();
    assert_eq!(revert(pool, volume, id).await.virtual_size, 1 << 40);
    clear_all(pool).await;
}

async fn chains_are_bounded(pool: &dyn Pool) {
    let volume = made(pool, blank(MIB)).await;
    let mut last = Uuid::nil();
    for depth in 1..64 {
        let (id, layer) = (Uuid::now_v7(), Uuid::now_v7());
        let plan = pool.snapshot_prepare(volume, id, layer).await.unwrap();
        assert_eq!(plan.depth, depth);
        pool.snapshot_commit(volume, id).await.unwrap();
        last = id;
    }
    assert_eq!(layers(pool, volume).await.len(), 64);
    assert_eq!(code(pool.snapshot_prepare(volume, Uuid::now_v7(), Uuid::now_v7()).await), "invalid");
    let clone = made(pool, clone_of(last, MIB)).await;
    assert_eq!(layers(pool, clone).await.len(), 64);
    pool.flatten(volume, &Work::default()).await.unwrap();
    snapshot(pool, volume).await;
    clear_all(pool).await;
}

async fn wrong_snapshots_are_refused(pool: &dyn Pool) {
    let (volume, other) = (made(pool, blank(MIB)).await, made(pool, blank(MIB)).await);
    let (id, top) = snapshot(pool, volume).await;
    let fresh = Uuid::now_v7;
    assert_eq!(code(pool.snapshot_prepare(other, id, fresh()).await), "conflict");
    assert_eq!(code(pool.snapshot_commit(other, id).await), "conflict");
    assert_eq!(code(pool.snapshot_abort(other, id).await), "conflict");
    assert_eq!(code(pool.snapshot_revert(other, id, fresh()).await), "conflict");
    assert_eq!(code(pool.snapshot_prepare(fresh(), fresh(), fresh()).await), "not_found");
    assert_eq!(code(pool.snapshot_commit(volume, fresh()).await), "not_found");
    assert_eq!(code(pool.snapshot_revert(volume, fresh(), fresh()).await), "not_found");
    // Ids of layers that hold something.
    for taken in [volume, other, top] {
        assert_eq!(code(pool.snapshot_prepare(volume, fresh(), taken).await), "conflict");
    }
    assert_eq!(code(pool.snapshot_revert(volume, id, other).await), "conflict");
    assert_eq!(layers(pool, volume).await, [top, volume]);
    assert_eq!(layers(pool, other).await, [other]);
    clear_all(pool).await;
}
