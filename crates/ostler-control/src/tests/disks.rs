//! Volumes on their own, disks of VMs that come and go, snapshots and linked copies.

use std::sync::Arc;

use ostler_api::disk::{DiskCache, DiskLimits};
use ostler_api::operation::{Operation, OperationPhase};
use ostler_api::snapshot::{Snapshot, SnapshotCreate, SnapshotPhase};
use ostler_api::vm::{DiskBus, MachineState, VmCreate};
use ostler_api::vm_phase::VmPhase;
use ostler_api::volume::{Volume, VolumeCreate, VolumePatch, VolumePhase};
use ostler_api::work::{
    Report, Reports, SnapshotReport, SnapshotState, TaskOutcome, VolumeReport, VolumeState,
};
use ostler_api::{ApiError, ByteSize, ErrorCode, Fault, Time};

use super::{controllers, until};
use crate::testing::{TestCloud, name, observed};
use crate::vm_act::VmActionRequest;

async fn with_node() -> TestCloud {
    let test = TestCloud::new().await;
    test.image("img").await;
    test.node("n1", 8, ByteSize::gib(8)).await;
    test
}

fn volume(test: &TestCloud, name: &str) -> Arc<Volume> {
    test.cloud.get::<Volume>(&test.admin, None, name).unwrap()
}

fn snapshot(test: &TestCloud, name: &str) -> Arc<Snapshot> {
    test.cloud.get::<Snapshot>(&test.admin, None, name).unwrap()
}

fn phase(test: &TestCloud, operation: &Operation) -> OperationPhase {
    test.cloud.get::<Operation>(&test.admin, None, &operation.metadata.id.to_string()).unwrap().status.phase
}

async fn tell(test: &TestCloud, report: Report) {
    let taken = test.cloud.node_reports(&test.admin, "n1", Reports { reports: vec![report] }).await.unwrap();
    assert_eq!((taken.taken, taken.dropped), (1, 0));
}

async fn volume_is(test: &TestCloud, name: &str, state: VolumeState) {
    let volume = volume(test, name).metadata.id.into();
    tell(test, Report::Volume(VolumeReport { volume, state })).await;
}

async fn snapshot_is(test: &TestCloud, name: &str, state: SnapshotState) {
    let snapshot = snapshot(test, name).metadata.id.into();
    tell(test, Report::Snapshot(SnapshotReport { snapshot, state })).await;
}

async fn made(test: &TestCloud, name: &str) -> Operation {
    let create =
        VolumeCreate { size: Some(ByteSize::gib(2)), ..VolumeCreate::named(crate::testing::name(name)) };
    let made = test.cloud.volume_create(&test.admin, None, create, None).await.unwrap();
    let size = made.resource.spec.size;
    volume_is(test, name, VolumeState::Ready { used: ByteSize(0), size }).await;
    made.operation.unwrap()
}

/// A running VM whose root disk is there.
async fn running(test: &TestCloud, vm: &str) {
    test.cloud.vm_create(&test.admin, None, TestCloud::create(vm), None).await.unwrap();
    until(test, "placed", || test.vm(vm).status.node.is_some()).await;
    let size = ByteSize::gib(1);
    volume_is(test, &format!("{vm}-root"), VolumeState::Ready { used: ByteSize(0), size }).await;
    test.answer(vm, MachineState::Running, TaskOutcome::Done).await;
}

async fn act(test: &TestCloud, vm: &str, request: VmActionRequest) -> Result<Option<Operation>, ApiError> {
    test.cloud.vm_act(&test.admin, None, vm, request, None).await.map(|accepted| accepted.operation)
}

fn attach(volume: &str) -> VmActionRequest {
    VmActionRequest::Attach { volume: volume.into(), bus: DiskBus::Virtio }
}

fn detach(volume: &str) -> VmActionRequest {
    VmActionRequest::Detach { volume: volume.into() }
}

async fn snap(
    test: &TestCloud,
    named: &str,
    vm: Option<&str>,
    of: Option<&str>,
) -> Result<Operation, ApiError> {
    let create = SnapshotCreate {
        name: name(named),
        labels: Default::default(),
        vm: vm.map(Into::into),
        volume: of.map(Into::into),
        description: String::new(),
    };
    test.cloud.snapshot_create(&test.admin, None, create, None).await.map(|made| made.operation.unwrap())
}

fn disks(test: &TestCloud, vm: &str) -> Vec<String> {
    let tables = test.cloud.cache.read();
    let volumes = test.vm(vm).spec.disks.iter().map(|disk| disk.volume).collect::<Vec<_>>();
    volumes.into_iter().map(|id| tables.volumes.get(id.into()).unwrap().metadata.name.to_string()).collect()
}

#[tokio::test]
async fn a_volume_is_placed_made_grown_and_never_shrunk() {
    let test = with_node().await;
    let operation = made(&test, "data").await;
    assert_eq!(phase(&test, &operation), OperationPhase::Succeeded);
    let resize = async |size| test.cloud.volume_resize(&test.admin, None, "data", size, None).await;
    let smaller = resize(ByteSize::gib(1)).await.unwrap_err();
    assert_eq!((smaller.code, smaller.field.as_deref()), (ErrorCode::Invalid, Some("size")));
    assert!(resize(ByteSize(ByteSize::gib(3).0 + 1)).await.is_err(), "not a multiple of 512");

    let operation = resize(ByteSize::gib(3)).await.unwrap().operation.unwrap();
    assert_eq!(volume(&test, "data").spec.size, ByteSize::gib(3));
    // An older word does not end it.
    volume_is(&test, "data", VolumeState::Ready { used: ByteSize(0), size: ByteSize::gib(2) }).await;
    assert_eq!(phase(&test, &operation), OperationPhase::Pending);
    volume_is(&test, "data", VolumeState::Ready { used: ByteSize(0), size: ByteSize::gib(3) }).await;
    assert_eq!(phase(&test, &operation), OperationPhase::Succeeded);

    let operation = resize(ByteSize::gib(4)).await.unwrap().operation.unwrap();
    let fault = Fault::new("no_space", "the pool is full");
    volume_is(&test, "data", VolumeState::NotGrown { size: ByteSize::gib(3), fault }).await;
    assert_eq!(phase(&test, &operation), OperationPhase::Failed);
    assert_eq!(volume(&test, "data").spec.size, ByteSize::gib(3), "what was promised is given back");
    assert_eq!(volume(&test, "data").status.phase, VolumePhase::Ready);
}

#[tokio::test]
async fn a_volume_without_a_place_is_refused_at_once() {
    let test = with_node().await;
    let create = VolumeCreate { size: Some(ByteSize::gib(60_000)), ..VolumeCreate::named(name("huge")) };
    let error = test.cloud.volume_create(&test.admin, None, create, None).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NoCapacity);
    assert!(error.detail.contains("not enough disk"), "{}", error.detail);
}

#[tokio::test]
async fn a_protected_volume_is_not_deleted() {
    let test = with_node().await;
    made(&test, "data").await;
    let protect = async |on| {
        let patch = VolumePatch { protected: Some(on), ..VolumePatch::default() };
        test.cloud.volume_patch(&test.admin, None, "data", None, patch).await.unwrap();
    };
    protect(true).await;
    let error = test.cloud.volume_delete(&test.admin, None, "data", None).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    protect(false).await;
    test.cloud.volume_delete(&test.admin, None, "data", None).await.unwrap();
}

#[tokio::test]
async fn a_disk_is_plugged_into_a_running_vm_and_pulled_out() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    running(&test, "b").await;
    made(&test, "data").await;

    let operation = act(&test, "a", attach("data")).await.unwrap().unwrap();
    assert_eq!(test.vm("a").status.phase, VmPhase::Running, "it runs on meanwhile");
    assert_eq!(disks(&test, "a"), ["a-root", "data"]);
    assert_eq!(act(&test, "b", attach("data")).await.unwrap_err().code, ErrorCode::InUse);
    let twice = act(&test, "a", attach("data")).await.unwrap().unwrap();
    assert_eq!(twice.metadata.id, operation.metadata.id, "the same is joined");
    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    assert_eq!(phase(&test, &operation), OperationPhase::Succeeded);
    assert!(act(&test, "a", attach("data")).await.unwrap().is_none(), "it is there already");
    assert_eq!(
        test.cloud.volume_delete(&test.admin, None, "data", None).await.unwrap_err().code,
        ErrorCode::InUse
    );

    // A guest that keeps it: nothing has changed.
    let operation = act(&test, "a", detach("data")).await.unwrap().unwrap();
    let fault = Fault::new("guest_kept_disk", "the guest did not release it");
    test.answer("a", MachineState::Running, TaskOutcome::Failed { fault }).await;
    assert_eq!(phase(&test, &operation), OperationPhase::Failed);
    assert_eq!(disks(&test, "a"), ["a-root", "data"]);

    act(&test, "a", detach("data")).await.unwrap();
    assert_eq!(disks(&test, "a"), ["a-root", "data"], "until it is out");
    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    assert_eq!(disks(&test, "a"), ["a-root"]);
    assert_eq!(volume(&test, "data").spec.vm, None);
    act(&test, "b", attach("data")).await.unwrap();
}

#[tokio::test]
async fn a_disk_that_cannot_be_plugged_in_is_free_again() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    made(&test, "data").await;
    act(&test, "a", attach("data")).await.unwrap();
    let fault = Fault::new("no_slot", "there is no room");
    test.answer("a", MachineState::Running, TaskOutcome::Failed { fault }).await;
    assert_eq!(disks(&test, "a"), ["a-root"]);
    assert_eq!(volume(&test, "data").spec.vm, None);
    assert_eq!(test.vm("a").status.phase, VmPhase::Running);
}

#[tokio::test]
async fn disks_of_a_stopped_vm_change_at_once() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    made(&test, "data").await;
    act(&test, "a", VmActionRequest::Stop).await.unwrap();
    test.answer("a", MachineState::Absent, TaskOutcome::Done).await;
    let operation = act(&test, "a", attach("data")).await.unwrap().unwrap();
    assert_eq!(phase(&test, &operation), OperationPhase::Succeeded);
    assert_eq!(test.vm("a").status.phase, VmPhase::Stopped);
    act(&test, "a", detach("data")).await.unwrap();
    act(&test, "a", detach("a-root")).await.unwrap();
    assert_eq!(disks(&test, "a"), [""; 0]);
    let error = act(&test, "a", detach("data")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
}

#[tokio::test]
async fn the_disk_a_vm_runs_from_stays_while_it_runs() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    assert_eq!(act(&test, "a", detach("a-root")).await.unwrap_err().code, ErrorCode::Conflict);
    made(&test, "data").await;
    let sata = VmActionRequest::Attach { volume: "data".into(), bus: DiskBus::Sata };
    assert_eq!(act(&test, "a", sata).await.unwrap_err().code, ErrorCode::Conflict);
}

#[tokio::test]
async fn a_deleted_vm_gives_back_the_disks_it_does_not_own() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    made(&test, "data").await;
    act(&test, "a", attach("data")).await.unwrap();
    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    snap(&test, "s", Some("a"), None).await.unwrap();
    snapshot_is(&test, "s", SnapshotState::Ready).await;
    test.cloud.vm_delete(&test.admin, None, "a", None, false).await.unwrap();
    test.answer("a", MachineState::Absent, TaskOutcome::Done).await;
    volume_is(&test, "a-root", VolumeState::Gone).await;
    assert_eq!((volume(&test, "data").spec.vm, volume(&test, "data").metadata.deleted), (None, None));
    assert_eq!(snapshot(&test, "s").status.phase, SnapshotPhase::Deleting, "the way back goes with it");
    // What is on its way out is in nobody's way.
    test.cloud.volume_delete(&test.admin, None, "data", None).await.unwrap();
    volume_is(&test, "data", VolumeState::Gone).await;
    snapshot_is(&test, "s", SnapshotState::Gone).await;
}

#[tokio::test]
async fn a_protected_disk_outlives_its_vm() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    let patch = VolumePatch { protected: Some(true), ..VolumePatch::default() };
    test.cloud.volume_patch(&test.admin, None, "a-root", None, patch).await.unwrap();
    test.cloud.vm_delete(&test.admin, None, "a", None, false).await.unwrap();
    test.answer("a", MachineState::Absent, TaskOutcome::Done).await;
    assert!(test.cloud.get::<ostler_api::vm::Vm>(&test.admin, None, "a").is_err());
    let root = volume(&test, "a-root");
    assert_eq!((root.spec.vm, root.metadata.deleted, root.status.phase), (None, None, VolumePhase::Ready));
}

#[tokio::test]
async fn snapshots_make_a_tree_without_gaps() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    let id = |name: &str| Some(snapshot(&test, name).metadata.id.into());
    for (name, parent) in [("one", None), ("two", Some("one")), ("three", Some("two"))] {
        let operation = snap(&test, name, Some("a"), None).await.unwrap();
        let busy = snap(&test, "other", Some("a"), None).await.unwrap_err();
        assert_eq!(busy.code, ErrorCode::Conflict, "one at a time");
        snapshot_is(&test, name, SnapshotState::Ready).await;
        assert_eq!(phase(&test, &operation), OperationPhase::Succeeded);
        assert_eq!(snapshot(&test, name).status.parent, parent.and_then(id));
        assert!(snapshot(&test, name).status.taken.is_some());
    }
    assert_eq!(snap(&test, "one", Some("a"), None).await.unwrap_err().code, ErrorCode::AlreadyExists);

    // Back to the first: only while it is stopped.
    let revert = async || test.cloud.snapshot_revert(&test.admin, None, "one", None).await;
    assert_eq!(revert().await.unwrap_err().code, ErrorCode::Conflict);
    act(&test, "a", VmActionRequest::Stop).await.unwrap();
    test.answer("a", MachineState::Absent, TaskOutcome::Done).await;
    let operation = revert().await.unwrap().operation.unwrap();
    assert_eq!(snapshot(&test, "one").status.phase, SnapshotPhase::Reverting);
    snapshot_is(&test, "one", SnapshotState::Reverted { operation: operation.metadata.id.into() }).await;
    assert_eq!(phase(&test, &operation), OperationPhase::Succeeded);
    snap(&test, "branch", Some("a"), None).await.unwrap();
    snapshot_is(&test, "branch", SnapshotState::Ready).await;
    assert_eq!(snapshot(&test, "branch").status.parent, id("one"));

    // The middle goes; its child stands on what it stood on.
    test.cloud.snapshot_delete(&test.admin, None, "two", None, false).await.unwrap();
    snapshot_is(&test, "two", SnapshotState::Gone).await;
    assert_eq!(snapshot(&test, "three").status.parent, id("one"));
    test.cloud.snapshot_delete(&test.admin, None, "branch", None, false).await.unwrap();
    snapshot_is(&test, "branch", SnapshotState::Gone).await;
    assert_eq!(volume(&test, "a-root").status.snapshot, id("one"));
}

#[tokio::test]
async fn a_snapshot_that_failed_says_why_and_can_be_deleted() {
    let test = with_node().await;
    made(&test, "data").await;
    let operation = snap(&test, "s", None, Some("data")).await.unwrap();
    snapshot_is(&test, "s", SnapshotState::Failed { fault: Fault::new("no_space", "full") }).await;
    assert_eq!(phase(&test, &operation), OperationPhase::Failed);
    let failed = snapshot(&test, "s");
    assert_eq!(
        (failed.status.phase, failed.status.reason.as_ref().unwrap().code.as_str()),
        (SnapshotPhase::Error, "no_space")
    );
    assert_eq!(volume(&test, "data").status.snapshot, None);
    assert!(test.cloud.snapshot_revert(&test.admin, None, "s", None).await.is_err());
    test.cloud.snapshot_delete(&test.admin, None, "s", None, false).await.unwrap();
    snapshot_is(&test, "s", SnapshotState::Gone).await;
    assert!(test.cloud.get::<Snapshot>(&test.admin, None, "s").is_err());
}

#[tokio::test]
async fn a_silent_node_ends_in_an_error_and_a_late_word_still_counts() {
    let test = with_node().await;
    let _act = controllers(&test);
    made(&test, "data").await;
    let operation = snap(&test, "s", None, Some("data")).await.unwrap();
    let overdue = |test: &TestCloud| {
        let old = snapshot(test, "s");
        let mut new = Snapshot::clone(&old);
        new.status.deadline = Some(Time::now());
        (old, new)
    };
    let (old, new) = overdue(&test);
    test.cloud.commit(|_, change| change.update(old.as_ref(), &new)).await.unwrap();
    until(&test, "the deadline", || snapshot(&test, "s").status.phase == SnapshotPhase::Error).await;
    assert_eq!(phase(&test, &operation), OperationPhase::Failed);
    snapshot_is(&test, "s", SnapshotState::Ready).await;
    assert_eq!(snapshot(&test, "s").status.phase, SnapshotPhase::Ready, "it is there after all");
}

#[tokio::test]
async fn linked_copies_hold_their_snapshot_and_go_where_it_is() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    made(&test, "data").await;
    act(&test, "a", attach("data")).await.unwrap();
    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    snap(&test, "s", Some("a"), None).await.unwrap();
    let early = VmCreate { image: None, snapshot: Some("s".into()), ..TestCloud::create("early") };
    assert_eq!(
        test.cloud.vm_create(&test.admin, None, early, None).await.unwrap_err().code,
        ErrorCode::Conflict,
        "it is not taken yet"
    );
    snapshot_is(&test, "s", SnapshotState::Ready).await;
    test.node("n2", 64, ByteSize::gib(64)).await;

    let clone = VmCreate { image: None, snapshot: Some("s".into()), ..TestCloud::create("c") };
    test.cloud.vm_create(&test.admin, None, clone, None).await.unwrap();
    until(&test, "placed", || test.vm("c").status.node.is_some()).await;
    assert_eq!(test.vm("c").status.node, Some(name("n1")), "beside its snapshot");
    assert_eq!(disks(&test, "c"), ["c-root", "c-disk1"]);
    let source = snapshot(&test, "s");
    let copy = volume(&test, "c-disk1");
    let from = copy.spec.snapshot.as_ref().unwrap();
    assert_eq!((from.snapshot.0, from.part), (source.metadata.id, source.spec.disks[1].part));
    assert_eq!(copy.spec.size, ByteSize::gib(2));

    let which = VolumeCreate { snapshot: Some("s".into()), ..VolumeCreate::named(name("v")) };
    let error = test.cloud.volume_create(&test.admin, None, which.clone(), None).await.unwrap_err();
    assert!(error.detail.contains("a-root, data"), "{}", error.detail);
    let small = VolumeCreate { disk: Some("data".into()), size: Some(ByteSize::gib(1)), ..which.clone() };
    assert!(test.cloud.volume_create(&test.admin, None, small, None).await.is_err());
    let which = VolumeCreate { disk: Some("data".into()), ..which };
    test.cloud.volume_create(&test.admin, None, which, None).await.unwrap();
    assert_eq!(volume(&test, "v").status.node, Some(name("n1")));

    let error = test.cloud.snapshot_delete(&test.admin, None, "s", None, false).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InUse);
    assert!(error.detail.contains("c-root") && error.detail.contains('v'), "{}", error.detail);
    test.cloud.snapshot_delete(&test.admin, None, "s", None, true).await.unwrap();
}

#[tokio::test]
async fn a_volume_with_snapshots_is_not_deleted_alone() {
    let test = with_node().await;
    made(&test, "data").await;
    snap(&test, "s", None, Some("data")).await.unwrap();
    snapshot_is(&test, "s", SnapshotState::Ready).await;
    let error = test.cloud.volume_delete(&test.admin, None, "data", None).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::InUse);
    assert!(error.detail.contains("snapshots: s"), "{}", error.detail);
}

#[tokio::test]
async fn an_old_observation_has_nothing_to_say_on_disks() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    made(&test, "data").await;
    act(&test, "a", attach("data")).await.unwrap();
    let vm = test.vm("a");
    let report = ostler_api::work::VmReport {
        vm: vm.metadata.id.into(),
        observed: observed(&vm, MachineState::Running),
        answer: None,
    };
    test.report(&vm, report).await;
    assert!(test.vm("a").status.task.is_some(), "only an answer ends it");
}

#[tokio::test]
async fn limits_change_at_any_time_and_how_a_disk_is_opened_only_while_it_is_not() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    made(&test, "data").await;
    act(&test, "a", attach("data")).await.unwrap();
    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    let set = async |patch| test.cloud.volume_patch(&test.admin, None, "data", None, patch).await;
    let limits = DiskLimits { iops: 500, ..DiskLimits::default() };
    let changed = set(VolumePatch { limits: Some(limits), ..VolumePatch::default() }).await.unwrap();
    assert_eq!(changed.spec.limits, limits);
    let wrong = DiskLimits { iops: 500, iops_read: 5, ..DiskLimits::default() };
    let error = set(VolumePatch { limits: Some(wrong), ..VolumePatch::default() }).await.unwrap_err();
    assert_eq!(error.field.as_deref(), Some("limits.iops"));
    let cache = || VolumePatch { cache: Some(DiskCache::None), ..VolumePatch::default() };
    assert_eq!(set(cache()).await.unwrap_err().code, ErrorCode::Conflict);
    act(&test, "a", VmActionRequest::Stop).await.unwrap();
    test.answer("a", MachineState::Absent, TaskOutcome::Done).await;
    assert_eq!(set(cache()).await.unwrap().spec.cache, DiskCache::None);
}

#[tokio::test]
async fn a_flattened_volume_needs_its_source_no_longer() {
    let test = with_node().await;
    made(&test, "data").await;
    let flatten = async |name: &str| test.cloud.volume_flatten(&test.admin, None, name, None).await;
    assert!(flatten("data").await.unwrap().operation.is_none(), "it stands on nothing");
    snap(&test, "s", None, Some("data")).await.unwrap();
    snapshot_is(&test, "s", SnapshotState::Ready).await;
    let copy = VolumeCreate { snapshot: Some("s".into()), ..VolumeCreate::named(name("copy")) };
    test.cloud.volume_create(&test.admin, None, copy, None).await.unwrap();
    volume_is(&test, "copy", VolumeState::Ready { used: ByteSize(0), size: ByteSize::gib(2) }).await;

    let operation = flatten("copy").await.unwrap().operation.unwrap();
    let again = flatten("copy").await.unwrap().operation.unwrap();
    assert_eq!(again.metadata.id, operation.metadata.id, "the same is joined");
    let busy = snap(&test, "t", None, Some("copy")).await.unwrap_err();
    assert!(busy.detail.contains("being flattened"), "{}", busy.detail);
    let id = operation.metadata.id.into();
    volume_is(&test, "copy", VolumeState::Ready { used: ByteSize(5), size: ByteSize::gib(2) }).await;
    volume_is(&test, "copy", VolumeState::Flattening { operation: id, done: 5000 }).await;
    assert_eq!(phase(&test, &operation), OperationPhase::Running);
    test.cloud.operation_cancel(&test.admin, None, &operation.metadata.id.to_string()).await.unwrap();
    assert_eq!(phase(&test, &operation), OperationPhase::Cancelled);
    // A late word of it changes nothing.
    volume_is(&test, "copy", VolumeState::Flattened { operation: id, used: ByteSize(7) }).await;
    assert!(volume(&test, "copy").spec.snapshot.is_some());

    let operation = flatten("copy").await.unwrap().operation.unwrap();
    let id = operation.metadata.id.into();
    volume_is(&test, "copy", VolumeState::Flattened { operation: id, used: ByteSize(7) }).await;
    assert_eq!(phase(&test, &operation), OperationPhase::Succeeded);
    assert_eq!(
        (volume(&test, "copy").spec.snapshot.clone(), volume(&test, "copy").status.flatten),
        (None, None)
    );
    test.cloud.snapshot_delete(&test.admin, None, "s", None, false).await.unwrap();
}

#[tokio::test]
async fn a_volume_with_snapshots_is_not_flattened() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    snap(&test, "s", Some("a"), None).await.unwrap();
    snapshot_is(&test, "s", SnapshotState::Ready).await;
    let error = test.cloud.volume_flatten(&test.admin, None, "a-root", None).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.detail.contains("such as s"), "{}", error.detail);
}
