//! The cases about disks of running machines. Their machines have a disk on the SCSI controller from the start, since
//! QEMU takes SCSI disks from a guest without asking it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::{Fixture, PATIENCE, clean_up, start, survey_of};
use crate::disk::{
    Commit, DiskBus, DiskLayer, DiskLimits, DiskSpec, DiskState, Rate, SnapshotDisk, Stream, StreamBase,
};
use crate::error::{DiskError, Error};
use crate::machine::{Machine, Progress, Survey};
use crate::spec::{MachineSpec, StartOptions};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;
/// How long a guest gets that will not answer.
const SHORT: Duration = Duration::from_millis(300);

async fn disk(fixture: &dyn Fixture, id: &str, layer: &str, bus: DiskBus) -> DiskSpec {
    let layers = vec![fixture.disk_file(layer, SIZE).await];
    DiskSpec { id: id.into(), layers, bus, ..DiskSpec::default() }
}

async fn start_with_scsi(fixture: &dyn Fixture) -> (MachineSpec, Arc<dyn Machine>) {
    let mut spec = fixture.spec();
    spec.disks.push(disk(fixture, "first", "first0", DiskBus::Scsi).await);
    let machine = start(fixture, &spec, StartOptions::default()).await;
    (spec, machine)
}

async fn find(machine: &Arc<dyn Machine>, id: &str) -> Option<DiskState> {
    let disks = machine.disks().await.expect("disks can be read");
    assert!(disks.is_sorted_by(|a, b| a.id < b.id), "{disks:?}");
    disks.into_iter().find(|disk| disk.id == id)
}

async fn top(machine: &Arc<dyn Machine>, id: &str) -> Option<String> {
    find(machine, id).await.expect("the disk is attached").top
}

fn disk_error<T: std::fmt::Debug>(result: Result<T, Error>) -> DiskError {
    match result {
        Err(Error::Disk(error)) => error,
        other => panic!("{other:?}"),
    }
}

async fn stream(machine: &Arc<dyn Machine>, id: &str, base: Option<StreamBase>) -> Result<(), Error> {
    let (_keep, cancel) = watch::channel(false);
    let stream = Stream { base, ..Stream::default() };
    machine.disk_stream(id, stream, watch::channel(Progress::default()).0, cancel).await
}

async fn overlay(fixture: &dyn Fixture, id: &str, layer: &str) -> SnapshotDisk {
    SnapshotDisk { id: id.into(), overlay: fixture.disk_file(layer, SIZE).await }
}

pub(super) async fn disks_come_and_go(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_with_scsi(fixture).await;
    let before = machine.disks().await.unwrap();
    assert_eq!(before.len(), spec.disks.len());
    for _ in 0..2 {
        let more = disk(fixture, "more", "more0", DiskBus::Scsi).await;
        for _ in 0..2 {
            machine.disk_attach(more.clone()).await.expect("attaching twice is no error");
        }
        let there = find(&machine, "more").await.unwrap();
        assert_eq!((there.top.as_deref(), there.virtual_size), (Some("more0"), SIZE));
        assert!(!there.read_only && there.limits.is_none(), "{there:?}");
        let other = DiskSpec { layers: vec![fixture.disk_file("other0", SIZE).await], ..more };
        let error = disk_error(machine.disk_attach(other).await);
        assert!(matches!(error, DiskError::OtherAttached { .. }), "{error:?}");
        for _ in 0..2 {
            machine.disk_detach("more", PATIENCE).await.expect("detaching twice is no error");
        }
        assert_eq!(machine.disks().await.unwrap(), before, "nothing is left");
    }
    clean_up(fixture, spec.id).await;
}

pub(super) async fn disks_are_found_by_another_agent(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_with_scsi(fixture).await;
    machine.disk_attach(disk(fixture, "more", "more0", DiskBus::Scsi).await).await.unwrap();
    machine.disk_attach(disk(fixture, "fast", "fast0", DiskBus::Virtio).await).await.unwrap();
    machine.disks_snapshot(vec![overlay(fixture, "more", "more1").await]).await.unwrap();
    let before = machine.disks().await.unwrap();
    drop(machine);
    fixture.restart_agent().await;
    let Some(Survey::Running(machine)) = survey_of(fixture, spec.id).await else {
        panic!("it is found again")
    };
    assert_eq!(machine.disks().await.unwrap(), before);
    machine.disk_detach("more", PATIENCE).await.unwrap();
    assert!(find(&machine, "more").await.is_none());
    // Its files are free for another machine or this one.
    machine.disk_attach(disk(fixture, "more", "more0", DiskBus::Scsi).await).await.unwrap();
    clean_up(fixture, spec.id).await;
}

pub(super) async fn a_guest_may_keep_its_disk(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_with_scsi(fixture).await;
    fixture.guest_keeps_disks(&machine).await;
    machine.disk_attach(disk(fixture, "fast", "fast0", DiskBus::Virtio).await).await.unwrap();
    let before = find(&machine, "fast").await;
    for _ in 0..2 {
        let error = disk_error(machine.disk_detach("fast", SHORT).await);
        assert!(matches!(error, DiskError::GuestDidNotRelease { .. }), "{error:?}");
        assert_eq!(find(&machine, "fast").await, before, "it is still there");
    }
    machine.disks_snapshot(vec![overlay(fixture, "fast", "fast1").await]).await.expect("and of use");
    clean_up(fixture, spec.id).await;
}

pub(super) async fn disks_that_do_not_fit_are_refused(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_with_scsi(fixture).await;
    let before = machine.disks().await.unwrap();
    let good = disk(fixture, "more", "more0", DiskBus::Scsi).await;
    for bus in [DiskBus::Sata, DiskBus::Ide] {
        let error = disk_error(machine.disk_attach(DiskSpec { bus, ..good.clone() }).await);
        assert!(matches!(error, DiskError::NotHotPluggable { .. }), "{error:?}");
    }
    let bad = [
        DiskSpec { id: "A,b".into(), ..good.clone() },
        DiskSpec { layers: Vec::new(), ..good.clone() },
        DiskSpec { serial: Some("x".repeat(21)), ..good.clone() },
        DiskSpec { layers: vec![good.layers[0].clone().named("a.b")], ..good.clone() },
    ];
    for disk in bad {
        let error = disk_error(machine.disk_attach(disk).await);
        assert!(matches!(error, DiskError::Invalid { .. }), "{error:?}");
    }
    assert_eq!(machine.disks().await.unwrap(), before);
    clean_up(fixture, spec.id).await;

    let spec = fixture.spec();
    let machine = start(fixture, &spec, StartOptions::default()).await;
    let error = disk_error(machine.disk_attach(good).await);
    assert!(error.to_string().contains("no SCSI controller"), "{error}");
    let mut attached = 0;
    let error = loop {
        let id = format!("d{attached}");
        match machine.disk_attach(disk(fixture, &id, &id, DiskBus::Virtio).await).await {
            Ok(()) => attached += 1,
            other => break disk_error(other),
        }
    };
    assert!(matches!(error, DiskError::NoPlace { .. }), "{error:?}");
    assert!(attached >= 2, "there is room for two at least");
    clean_up(fixture, spec.id).await;
}

pub(super) async fn disks_grow_and_never_shrink(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_with_scsi(fixture).await;
    for _ in 0..2 {
        machine.disk_resize("first", SIZE + MIB).await.unwrap();
        assert_eq!(find(&machine, "first").await.unwrap().virtual_size, SIZE + MIB);
    }
    let error = disk_error(machine.disk_resize("first", SIZE).await);
    assert!(matches!(error, DiskError::Shrink { .. }), "{error:?}");
    let error = disk_error(machine.disk_resize("first", SIZE + MIB + 1).await);
    assert!(matches!(error, DiskError::Invalid { .. }), "{error:?}");
    let error = disk_error(machine.disk_resize("nothing", SIZE).await);
    assert!(matches!(error, DiskError::NotAttached { .. }), "{error:?}");
    assert_eq!(find(&machine, "first").await.unwrap().virtual_size, SIZE + MIB);
    clean_up(fixture, spec.id).await;
}

pub(super) async fn limits_are_set_and_lifted(fixture: &mut dyn Fixture) {
    let limits = DiskLimits {
        iops_total: Rate { sustained: 500, burst: 2000 },
        bps_write: Rate::sustained(10 * MIB),
        burst_seconds: 5,
        ..DiskLimits::default()
    };
    let mut spec = fixture.spec();
    for (id, bus) in [("first", DiskBus::Scsi), ("fast", DiskBus::Virtio), ("old", DiskBus::Sata)] {
        let limited = DiskSpec { limits, ..disk(fixture, id, &format!("{id}0"), bus).await };
        spec.disks.push(limited);
    }
    let machine = start(fixture, &spec, StartOptions::default()).await;
    machine
        .disk_attach(DiskSpec { limits, ..disk(fixture, "more", "more0", DiskBus::Virtio).await })
        .await
        .unwrap();
    for id in ["first", "fast", "old", "more"] {
        assert_eq!(find(&machine, id).await.unwrap().limits, limits, "{id}");
        let other = DiskLimits { iops_read: Rate::sustained(7), ..DiskLimits::default() };
        for limits in [other, DiskLimits::default()] {
            machine.disk_limits(id, limits).await.unwrap();
            assert_eq!(find(&machine, id).await.unwrap().limits, limits, "{id}");
        }
        let bad = DiskLimits { burst_seconds: 5, ..DiskLimits::default() };
        let error = disk_error(machine.disk_limits(id, bad).await);
        assert!(matches!(error, DiskError::Invalid { .. }), "{error:?}");
    }
    // They stay with the disk, not with the layer.
    machine.disk_limits("fast", limits).await.unwrap();
    machine.disks_snapshot(vec![overlay(fixture, "fast", "fast1").await]).await.unwrap();
    assert_eq!(find(&machine, "fast").await.unwrap().limits, limits);
    clean_up(fixture, spec.id).await;
}

pub(super) async fn snapshots_are_of_all_disks_or_none(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_with_scsi(fixture).await;
    machine.disk_attach(disk(fixture, "fast", "fast0", DiskBus::Virtio).await).await.unwrap();
    let seed = DiskSpec { read_only: true, ..disk(fixture, "seed", "seed0", DiskBus::Scsi).await };
    machine.disk_attach(seed).await.unwrap();
    let before = machine.disks().await.unwrap();

    let good = overlay(fixture, "first", "first1").await;
    let small = fixture.disk_file("small1", SIZE / 2).await;
    let unnamed = DiskLayer { name: None, ..fixture.disk_file("fast1", SIZE).await };
    let of = |id: &str, overlay: DiskLayer| SnapshotDisk { id: id.into(), overlay };
    let bad = [
        of("nothing", fixture.disk_file("x", SIZE).await),
        of("seed", fixture.disk_file("seed1", SIZE).await),
        of("fast", small),
        of("fast", unnamed),
        of("first", fixture.disk_file("first2", SIZE).await),
    ];
    for disk in bad {
        let told = format!("{disk:?}");
        disk_error(machine.disks_snapshot(vec![good.clone(), disk]).await);
        assert_eq!(machine.disks().await.unwrap(), before, "{told}");
    }
    let wanted = vec![good, overlay(fixture, "fast", "fast1").await];
    for _ in 0..2 {
        machine.disks_snapshot(wanted.clone()).await.expect("the same again is no error");
        assert_eq!(top(&machine, "first").await.as_deref(), Some("first1"));
        assert_eq!(top(&machine, "fast").await.as_deref(), Some("fast1"));
    }
    // What holds for the disks still holds with the new layers.
    machine.disk_resize("first", SIZE + MIB).await.unwrap();
    let one_more = vec![overlay(fixture, "fast", "fast2").await];
    machine.disks_snapshot(one_more).await.unwrap();
    assert_eq!(top(&machine, "fast").await.as_deref(), Some("fast2"));
    let mixed = vec![wanted[0].clone(), overlay(fixture, "fast", "fast3").await];
    let error = disk_error(machine.disks_snapshot(mixed).await);
    assert!(matches!(error, DiskError::PartOfSnapshot { .. }), "{error:?}");
    clean_up(fixture, spec.id).await;
}

pub(super) async fn streams_shorten_the_chain(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_with_scsi(fixture).await;
    for layer in ["first1", "first2", "first3"] {
        machine.disks_snapshot(vec![overlay(fixture, "first", layer).await]).await.unwrap();
    }
    let base = |layer: &str| StreamBase { layer: layer.into(), backing_file: format!("{layer}.qcow2") };
    for missing in ["nothing", "first3"] {
        let error = disk_error(stream(&machine, "first", Some(base(missing))).await);
        assert!(matches!(error, DiskError::NoLayer { .. }), "{error:?}");
    }
    let (progress, seen) = watch::channel(Progress::default());
    let (_keep, cancel) = watch::channel(false);
    let to_first = Stream { base: Some(base("first0")), ..Stream::default() };
    machine.disk_stream("first", to_first, progress, cancel).await.unwrap();
    let seen = *seen.borrow();
    assert!(seen.done_bytes == seen.total_bytes, "{seen:?}");
    assert_eq!(top(&machine, "first").await.as_deref(), Some("first3"));
    let error = disk_error(stream(&machine, "first", Some(base("first2"))).await);
    assert!(matches!(error, DiskError::NoLayer { .. }), "a layer that is gone: {error:?}");
    for _ in 0..2 {
        stream(&machine, "first", None).await.expect("streaming twice is no error");
    }
    let error = disk_error(stream(&machine, "first", Some(base("first0"))).await);
    assert!(matches!(error, DiskError::NoLayer { .. }), "{error:?}");
    machine.disks_snapshot(vec![overlay(fixture, "first", "first4").await]).await.unwrap();
    machine.disk_detach("first", PATIENCE).await.unwrap();
    clean_up(fixture, spec.id).await;
}

pub(super) async fn a_cancelled_stream_changes_nothing(fixture: &mut dyn Fixture) {
    fixture.fill(&fixture.disk_file("first0", SIZE).await, SIZE).await;
    let (spec, machine) = start_with_scsi(fixture).await;
    machine.disks_snapshot(vec![overlay(fixture, "first", "first1").await]).await.unwrap();
    fixture.slow_streams(&machine, true).await;
    let (cancel, cancelled) = watch::channel(false);
    let (progress, mut seen) = watch::channel(Progress::default());
    let running = Arc::clone(&machine);
    let slow = Stream { bytes_per_second: 64 << 10, ..Stream::default() };
    let job = tokio::spawn(async move { running.disk_stream("first", slow, progress, cancelled).await });
    let begun = seen.wait_for(|progress| progress.total_bytes > 0);
    tokio::time::timeout(PATIENCE, begun).await.expect("it begins").expect("it is under way");
    cancel.send_replace(true);
    let error = disk_error(tokio::time::timeout(PATIENCE, job).await.expect("it ends").unwrap());
    assert!(matches!(error, DiskError::Cancelled { .. }), "{error:?}");
    fixture.slow_streams(&machine, false).await;
    assert_eq!(top(&machine, "first").await.as_deref(), Some("first1"));
    let base = StreamBase { layer: "first0".into(), backing_file: "first0.qcow2".into() };
    stream(&machine, "first", Some(base)).await.expect("the layer below is still there");
    stream(&machine, "first", None).await.expect("and the whole can be done again");
    clean_up(fixture, spec.id).await;
}

/// Disks that came and went leave holes; a state that is saved then is restored into the same places.
pub(super) async fn places_are_kept_by_a_saved_state(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_with_scsi(fixture).await;
    fixture.guest_up(&machine).await;
    let mut disks = spec.disks.clone();
    for (id, bus) in [("gone", DiskBus::Scsi), ("wide", DiskBus::Scsi)] {
        let disk = disk(fixture, id, &format!("{id}0"), bus).await;
        machine.disk_attach(disk.clone()).await.unwrap();
        disks.push(disk);
    }
    // Past those that a start with so few would make room for.
    for number in 0..7 {
        let id = format!("v{number}");
        let disk = disk(fixture, &id, &id, DiskBus::Virtio).await;
        match machine.disk_attach(disk.clone()).await {
            Ok(()) => disks.push(disk),
            Err(error) => assert!(matches!(error, Error::Disk(DiskError::NoPlace { .. })), "{error:?}"),
        }
    }
    machine.disk_detach("gone", PATIENCE).await.unwrap();
    disks.retain(|disk| disk.id != "gone");
    let before = machine.disks().await.unwrap();
    let taken = before.iter().find(|disk| disk.id == "wide").unwrap().place;
    let clash = DiskSpec { place: taken, ..disk(fixture, "x", "x0", DiskBus::Scsi).await };
    let error = disk_error(machine.disk_attach(clash).await);
    assert!(matches!(error, DiskError::NoPlace { .. }), "{error:?}");

    let state = fixture.scratch().join("machine.state");
    machine.save(&state, watch::channel(Progress::default()).0).await.unwrap();
    let facts = machine.facts();
    machine.quit().await.unwrap();
    for disk in &mut disks {
        disk.place = before.iter().find(|now| now.id == disk.id).unwrap().place;
    }
    let same = MachineSpec {
        machine_version: Some(facts.machine_version),
        cpu_model: Some(facts.cpu_model),
        disk_places: Some(facts.disk_places),
        disks,
        ..spec.clone()
    };
    let restore = StartOptions { restore_from: Some(state), paused: false };
    let machine = start(fixture, &same, restore).await;
    assert_eq!(machine.disks().await.unwrap(), before);
    assert_eq!(machine.facts().disk_places, facts.disk_places);
    // The first hole is filled first.
    machine.disk_attach(disk(fixture, "again", "again0", DiskBus::Scsi).await).await.unwrap();
    assert_eq!(find(&machine, "again").await.unwrap().place, Some(1));
    clean_up(fixture, spec.id).await;
}

pub(super) async fn layers_in_the_middle_are_merged(fixture: &mut dyn Fixture) {
    let (spec, machine) = start_with_scsi(fixture).await;
    for layer in ["first1", "first2", "first3"] {
        machine.disks_snapshot(vec![overlay(fixture, "first", layer).await]).await.unwrap();
    }
    let commit = |layer: &str, into: DiskLayer| {
        let backing_file = into.path.display().to_string();
        Commit { layer: layer.into(), into, above: None, backing_file, bytes_per_second: 0 }
    };
    let run = async |commit: Commit| {
        let (_keep, cancel) = watch::channel(false);
        machine.disk_commit("first", commit, watch::channel(Progress::default()).0, cancel).await
    };
    let first0 = fixture.disk_file("first0", SIZE).await;
    let nothing = DiskLayer { name: Some("nothing".into()), ..first0.clone() };
    for bad in [commit("first3", first0.clone()), commit("first0", first0.clone()), commit("first1", nothing)]
    {
        let error = disk_error(run(bad).await);
        assert!(matches!(error, DiskError::NoLayer { .. }), "{error:?}");
    }
    for _ in 0..2 {
        run(commit("first2", first0.clone())).await.expect("merging twice is no error");
    }
    assert_eq!(top(&machine, "first").await.as_deref(), Some("first3"));
    let base = |layer: &str| StreamBase { layer: layer.into(), backing_file: format!("{layer}.qcow2") };
    for gone in ["first1", "first2"] {
        let error = disk_error(stream(&machine, "first", Some(base(gone))).await);
        assert!(matches!(error, DiskError::NoLayer { .. }), "{gone} is gone: {error:?}");
    }
    stream(&machine, "first", Some(base("first0"))).await.expect("the one below is there");
    clean_up(fixture, spec.id).await;
}
