//! The life of VMs.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::event::Event;
use ostler_api::list::ListParams;
use ostler_api::node::Node;
use ostler_api::operation::{Operation, OperationPhase};
use ostler_api::vm::{MachineState, Vm, VmPatch};
use ostler_api::vm_action::VmAction;
use ostler_api::vm_phase::VmPhase;
use ostler_api::volume::{Volume, VolumePhase};
use ostler_api::work::{Report, Reports, TaskOutcome, VolumeReport, VolumeState};
use ostler_api::{ByteSize, ErrorCode, Fault, Time};

use super::{controllers, until};
use crate::idempotency::Idempotency;
use crate::testing::{TestCloud, name};
use crate::vm_act::VmActionRequest;

async fn with_node() -> TestCloud {
    let test = TestCloud::new().await;
    test.image("img").await;
    test.node("n1", 8, ByteSize::gib(8)).await;
    test
}

async fn running(test: &TestCloud, vm: &str) {
    test.cloud.vm_create(&test.admin, None, TestCloud::create(vm), None).await.unwrap();
    until(test, "placed", || test.vm(vm).status.node.is_some()).await;
    test.answer(vm, MachineState::Running, TaskOutcome::Done).await;
}

/// The node has removed a volume's file.
async fn volume_gone(test: &TestCloud, volume: &str) {
    let volume = test.cloud.get::<Volume>(&test.admin, None, volume).unwrap();
    let gone = VolumeReport { volume: volume.metadata.id.into(), state: VolumeState::Gone };
    let reports = Reports { reports: vec![Report::Volume(gone)] };
    test.cloud.node_reports(&test.admin, "n1", reports).await.unwrap();
}

async fn act(test: &TestCloud, vm: &str, request: VmActionRequest) -> Option<Operation> {
    test.cloud.vm_act(&test.admin, None, vm, request, None).await.unwrap().operation
}

#[tokio::test]
async fn create_places_starts_and_tells() {
    let test = with_node().await;
    let _act = controllers(&test);
    let made = test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    assert!(!made.resource.status.phase.is_settled());
    until(&test, "placed", || test.vm("a").status.phase == VmPhase::Starting).await;
    assert_eq!(test.vm("a").status.node, Some(name("n1")));
    let volume = test.cloud.get::<Volume>(&test.admin, None, "a-root").unwrap();
    assert_eq!((volume.status.phase, volume.status.node.clone()), (VolumePhase::Creating, Some(name("n1"))));
    assert_eq!(volume.spec.size, ByteSize::gib(1), "the image's size");

    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    assert_eq!(test.vm("a").status.phase, VmPhase::Running);
    let operation = made.operation.unwrap().metadata.id.to_string();
    let operation = test.cloud.get::<Operation>(&test.admin, None, &operation).unwrap();
    assert_eq!(operation.status.phase, OperationPhase::Succeeded);
    let events = test.cloud.list::<Event>(&test.admin, &ListParams::default()).unwrap();
    assert!(events.items.iter().any(|event| event.spec.code == "vm.running"));
    let node = test.cloud.get::<Node>(&test.admin, None, "n1").unwrap();
    assert_eq!((node.status.allocated.vms, node.status.allocated.memory), (1, ByteSize::mib(256)));
}

#[tokio::test]
async fn waits_for_a_node_with_a_reason_and_goes_on_when_one_joins() {
    let test = TestCloud::new().await;
    test.image("img").await;
    let _act = controllers(&test);
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    until(&test, "the reason", || test.vm("a").status.reason.is_some()).await;
    assert_eq!(test.vm("a").status.phase, VmPhase::Pending);
    test.node("n1", 8, ByteSize::gib(8)).await;
    until(&test, "placed", || test.vm("a").status.phase == VmPhase::Starting).await;
    assert!(test.vm("a").status.reason.is_none());
}

#[tokio::test]
async fn what_fits_nowhere_is_an_error_at_once_and_can_be_deleted() {
    let test = with_node().await;
    let _act = controllers(&test);
    let mut request = TestCloud::create("big");
    request.memory = ByteSize::gib(100);
    test.cloud.vm_create(&test.admin, None, request, None).await.unwrap();
    until(&test, "error", || test.vm("big").status.phase == VmPhase::Error).await;
    assert_eq!(test.vm("big").status.reason.clone().unwrap().code, "no_node_fits");
    test.cloud.vm_delete(&test.admin, None, "big", None, false).await.unwrap();
    assert!(test.cloud.get::<Vm>(&test.admin, None, "big").is_err());
    assert!(test.cloud.get::<Volume>(&test.admin, None, "big-root").is_err(), "its volume goes with it");
}

#[tokio::test]
async fn concurrent_creates_never_over_commit_and_names_are_taken_once() {
    let test = with_node().await;
    let _act = controllers(&test);
    // 8 GiB hold 32 of 256 MiB; every name is asked for twice.
    let creates = (0..80).map(|index| {
        let cloud = Arc::clone(&test.cloud);
        let admin = test.admin.clone();
        tokio::spawn(async move {
            cloud.vm_create(&admin, None, TestCloud::create(&format!("v{}", index / 2)), None).await
        })
    });
    let results = futures::future::join_all(creates).await;
    let (made, refused): (Vec<_>, Vec<_>) = results.into_iter().map(Result::unwrap).partition(Result::is_ok);
    assert_eq!((made.len(), refused.len()), (40, 40));
    for error in refused {
        assert_eq!(error.unwrap_err().code, ErrorCode::AlreadyExists);
    }
    let all = ListParams { limit: Some(1000), ..ListParams::default() };
    let phases = || {
        let list = test.cloud.list::<Vm>(&test.admin, &all).unwrap().items;
        let placed = list.iter().filter(|vm| vm.status.node.is_some()).count();
        let refused = list.iter().filter(|vm| vm.status.node.is_none() && vm.status.reason.is_some()).count();
        (placed, refused)
    };
    until(&test, "everyone is decided about", || phases() == (32, 8)).await;
}

#[tokio::test]
async fn the_same_request_twice_is_one_vm() {
    let test = with_node().await;
    let key = |fingerprint: u8| Some(Idempotency { key: "k".into(), fingerprint: [fingerprint; 32] });
    let create =
        |fingerprint| test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), key(fingerprint));
    let first = create(1).await.unwrap();
    let second = create(1).await.unwrap();
    assert_eq!(first.resource.metadata.id, second.resource.metadata.id);
    assert_eq!(first.operation.map(|o| o.metadata.id), second.operation.map(|o| o.metadata.id));
    assert_eq!(create(2).await.unwrap_err().code, ErrorCode::IdempotencyMismatch);
}

#[tokio::test]
async fn if_match_guards_changes() {
    let test = with_node().await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    let revision = test.vm("a").metadata.revision;
    let rename = |to: &str| VmPatch { name: Some(name(to)), ..VmPatch::default() };
    test.cloud.vm_patch(&test.admin, None, "a", Some(revision), rename("b")).await.unwrap();
    let stale = test.cloud.vm_patch(&test.admin, None, "b", Some(revision), rename("c")).await.unwrap_err();
    assert_eq!(stale.code, ErrorCode::RevisionMismatch);
    assert!(test.cloud.get::<Vm>(&test.admin, None, "a").is_err(), "the old name is free");
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    let taken = test.cloud.vm_patch(&test.admin, None, "b", None, rename("a")).await.unwrap_err();
    assert_eq!(taken.code, ErrorCode::AlreadyExists);
}

#[tokio::test]
async fn delete_takes_the_volume_with_it_once_the_node_says_so() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    let operation =
        test.cloud.vm_delete(&test.admin, None, "a", None, false).await.unwrap().operation.unwrap();
    assert_eq!(test.vm("a").status.phase, VmPhase::Deleting);
    let again = test.cloud.vm_delete(&test.admin, None, "a", None, false).await.unwrap().operation.unwrap();
    assert_eq!(operation.metadata.id, again.metadata.id, "the second joins the first");
    test.answer("a", MachineState::Absent, TaskOutcome::Done).await;
    let volume = test.cloud.get::<Volume>(&test.admin, None, "a-root").unwrap();
    assert_eq!(volume.status.phase, VolumePhase::Deleting);
    assert_eq!(test.vm("a").status.phase, VmPhase::Deleting, "it is gone when all of it is gone");
    volume_gone(&test, "a-root").await;
    assert!(test.cloud.get::<Volume>(&test.admin, None, "a-root").is_err());
    assert!(test.cloud.get::<Vm>(&test.admin, None, "a").is_err());
    let operation =
        test.cloud.get::<Operation>(&test.admin, None, &operation.metadata.id.to_string()).unwrap();
    assert_eq!(operation.status.phase, OperationPhase::Succeeded);
    test.cloud.image_delete(&test.admin, None, "img", None).await.unwrap();
}

#[tokio::test]
async fn stop_gets_through_while_a_start_hangs_and_the_start_is_cancelled() {
    let test = with_node().await;
    let _act = controllers(&test);
    let made = test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    until(&test, "placed", || test.vm("a").status.node.is_some()).await;
    let busy = test.cloud.vm_act(&test.admin, None, "a", VmActionRequest::Pause, None).await.unwrap_err();
    assert_eq!(busy.code, ErrorCode::Conflict);
    act(&test, "a", VmActionRequest::Stop).await.unwrap();
    assert_eq!(test.vm("a").status.phase, VmPhase::Stopping);
    let start = made.operation.unwrap().metadata.id.to_string();
    let start = test.cloud.get::<Operation>(&test.admin, None, &start).unwrap();
    assert_eq!(start.status.phase, OperationPhase::Cancelled);
    test.answer("a", MachineState::Absent, TaskOutcome::Done).await;
    assert_eq!(test.vm("a").status.phase, VmPhase::Stopped);
}

#[tokio::test]
async fn a_failed_start_is_an_error_from_which_start_works() {
    let test = with_node().await;
    let _act = controllers(&test);
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    until(&test, "placed", || test.vm("a").status.node.is_some()).await;
    let fault = Fault::new("qemu_failed", "Could not set up host forwarding rule");
    test.answer("a", MachineState::Absent, TaskOutcome::Failed { fault: fault.clone() }).await;
    assert_eq!(test.vm("a").status.phase, VmPhase::Error);
    assert_eq!(test.vm("a").status.reason.clone().unwrap().message, fault.message);
    act(&test, "a", VmActionRequest::Start).await.unwrap();
    assert_eq!(test.vm("a").status.phase, VmPhase::Starting);
    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    assert_eq!(test.vm("a").status.phase, VmPhase::Running);
}

#[tokio::test]
async fn a_deadline_ends_what_the_node_does_not() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    let operation = act(&test, "a", VmActionRequest::Suspend).await.unwrap().metadata.id.to_string();
    // Time goes by.
    test.cloud
        .commit(|tables, change| {
            let old = tables.vms.named(Some(&name("default")), &name("a")).unwrap();
            let mut new = Vm::clone(old);
            if let Some(task) = &mut new.status.task {
                task.deadline = Time(jiff_epoch());
            }
            change.update(old.as_ref(), &new)
        })
        .await
        .unwrap();
    until(&test, "the deadline", || test.vm("a").status.task.is_none()).await;
    assert_eq!(test.vm("a").status.phase, VmPhase::Running, "what the node sees is what is shown");
    let operation = test.cloud.get::<Operation>(&test.admin, None, &operation).unwrap();
    assert_eq!(operation.status.phase, OperationPhase::Failed);
    assert_eq!(operation.status.reason.clone().unwrap().code, "deadline_passed");
}

fn jiff_epoch() -> jiff::Timestamp {
    jiff::Timestamp::UNIX_EPOCH
}

#[tokio::test]
async fn rebuild_swaps_the_root_disk_and_starts_again() {
    let test = with_node().await;
    test.image("other").await;
    let _act = controllers(&test);
    running(&test, "a").await;
    let old = test.vm("a").spec.disks[0].volume;
    act(&test, "a", VmActionRequest::Rebuild { image: "other".into(), disk: None }).await.unwrap();
    let Some(VmAction::Rebuild { volume }) = test.vm("a").status.task.clone().map(|task| task.action) else {
        panic!("no rebuild task")
    };
    let refused = test.cloud.vm_act(&test.admin, None, "a", VmActionRequest::Stop, None).await;
    assert_eq!(refused.unwrap_err().code, ErrorCode::Conflict);
    test.answer("a", MachineState::Absent, TaskOutcome::Done).await;
    let vm = test.vm("a");
    assert_eq!((vm.spec.disks[0].volume, vm.status.phase), (volume, VmPhase::Starting));
    let old = test.cloud.get::<Volume>(&test.admin, None, &old.to_string()).unwrap();
    assert_eq!(old.status.phase, VolumePhase::Deleting);
    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    assert_eq!(test.vm("a").status.phase, VmPhase::Running);
}

#[tokio::test]
async fn a_failed_rebuild_keeps_the_old_disk_and_drops_the_new() {
    let test = with_node().await;
    let _act = controllers(&test);
    running(&test, "a").await;
    let old = test.vm("a").spec.disks[0].volume;
    act(&test, "a", VmActionRequest::Rebuild { image: "img".into(), disk: None }).await.unwrap();
    let fault = Fault::new("no_space", "the pool is full");
    test.answer("a", MachineState::Running, TaskOutcome::Failed { fault }).await;
    assert_eq!(test.vm("a").spec.disks[0].volume, old);
    assert_eq!(test.vm("a").status.phase, VmPhase::Running);
    let volumes = test.cloud.list::<Volume>(&test.admin, &ListParams::default()).unwrap().items;
    let deleting = volumes.iter().filter(|volume| volume.status.phase == VolumePhase::Deleting).count();
    assert_eq!((volumes.len(), deleting), (2, 1));
}

#[tokio::test]
async fn cancelling_a_waiting_start_leaves_a_stopped_vm() {
    let test = TestCloud::new().await;
    test.image("img").await;
    let made = test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    let id = made.operation.unwrap().metadata.id.to_string();
    let operation = test.cloud.operation_cancel(&test.admin, None, &id).await.unwrap();
    assert_eq!(operation.status.phase, OperationPhase::Cancelled);
    assert_eq!(test.vm("a").status.phase, VmPhase::Stopped);
}

#[tokio::test]
async fn bad_requests_name_the_field() {
    let test = with_node().await;
    type Change = fn(&mut ostler_api::vm::VmCreate);
    let cases: [(&str, Change); 11] = [
        ("cpus", |r| r.cpus = 0),
        ("cpus", |r| r.cpus = 10_000),
        ("memory", |r| r.memory = ByteSize(0)),
        ("memory", |r| r.memory = ByteSize(100 << 50)),
        ("memory", |r| r.memory = ByteSize((256 << 20) + 1)),
        ("disk", |r| r.disk = Some(ByteSize(0))),
        ("disk", |r| r.disk = Some(ByteSize::mib(512))),
        ("image", |r| r.image = None),
        ("image", |r| r.image = Some("nope".into())),
        ("kernel", |r| r.cmdline = Some("x".into())),
        ("kernel", |r| r.kernel = Some("img".into())),
    ];
    for (field, change) in cases {
        let mut request = TestCloud::create("a");
        change(&mut request);
        let error = test.cloud.vm_create(&test.admin, None, request, None).await.unwrap_err();
        assert_eq!(error.field.as_deref(), Some(field), "{error:?}");
    }
    assert!(test.cloud.get::<Vm>(&test.admin, None, "a").is_err(), "nothing half done");
    assert!(test.cloud.get::<Volume>(&test.admin, None, "a-root").is_err());
}

#[tokio::test]
async fn waiting_for_a_phase_ends_with_it_with_an_error_or_in_time() {
    let test = with_node().await;
    let _act = controllers(&test);
    let made = test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    let id = made.resource.metadata.id;
    let wait = |phase: &str, millis| {
        let (cloud, admin, phases) = (Arc::clone(&test.cloud), test.admin.clone(), vec![phase.to_owned()]);
        tokio::spawn(
            async move { cloud.wait::<Vm>(&admin, id, &phases, Duration::from_millis(millis)).await },
        )
    };
    let late = wait("running", 50).await.unwrap().unwrap_err();
    assert_eq!(late.code, ErrorCode::TimedOut);
    let runs = wait("running", 30_000);
    until(&test, "placed", || test.vm("a").status.node.is_some()).await;
    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    assert_eq!(runs.await.unwrap().unwrap().unwrap().status.phase, VmPhase::Running);
    let gone = wait("gone", 30_000);
    test.cloud.vm_delete(&test.admin, None, "a", None, false).await.unwrap();
    test.answer("a", MachineState::Absent, TaskOutcome::Done).await;
    volume_gone(&test, "a-root").await;
    assert!(gone.await.unwrap().unwrap().is_none());
}
