//! Nodes that come, fall silent, come back; controllers that take over.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use ostler_api::node::{Node, NodePhase};
use ostler_api::vm::MachineState;
use ostler_api::vm_phase::VmPhase;
use ostler_api::work::{StreamKind, TaskOutcome, WorkLine};
use ostler_api::{ByteSize, ErrorCode};
use tokio_util::sync::CancellationToken;

use super::{PATIENCE, controllers, until};
use crate::config::CloudConfig;
use crate::testing::TestCloud;

fn quick() -> CloudConfig {
    CloudConfig { node_lease: Duration::from_secs(1), ..CloudConfig::default() }
}

fn phase(test: &TestCloud) -> NodePhase {
    test.cloud.get::<Node>(&test.admin, None, "n1").unwrap().status.phase
}

#[tokio::test]
async fn a_silent_node_is_unreachable_and_its_vms_unknown_until_it_speaks() {
    let test = TestCloud::with(quick()).await;
    test.image("img").await;
    let _act = controllers(&test);
    test.node("n1", 8, ByteSize::gib(8)).await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    until(&test, "placed", || test.vm("a").status.node.is_some()).await;
    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    until(&test, "unknown", || {
        phase(&test) == NodePhase::Unreachable && test.vm("a").status.phase == VmPhase::Unknown
    })
    .await;
    test.cloud.node_heartbeat(&test.admin, "n1").await.unwrap();
    until(&test, "known", || {
        phase(&test) == NodePhase::Ready && test.vm("a").status.phase == VmPhase::Running
    })
    .await;
}

#[tokio::test]
async fn a_vm_on_a_lost_node_is_deleted_by_force_and_the_node_once_it_is_empty() {
    let test = TestCloud::with(quick()).await;
    test.image("img").await;
    let _act = controllers(&test);
    test.node("n1", 8, ByteSize::gib(8)).await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    until(&test, "placed", || test.vm("a").status.node.is_some()).await;
    let ready = test.cloud.node_delete(&test.admin, "n1", None).await.unwrap_err();
    assert_eq!(ready.code, ErrorCode::Conflict);
    until(&test, "silent", || test.vm("a").status.node_silent).await;
    let used = test.cloud.node_delete(&test.admin, "n1", None).await.unwrap_err();
    assert_eq!(used.code, ErrorCode::InUse);
    test.cloud.vm_delete(&test.admin, None, "a", None, true).await.unwrap();
    assert!(test.cloud.get::<ostler_api::vm::Vm>(&test.admin, None, "a").is_err());
    let volume = || test.cloud.get::<ostler_api::volume::Volume>(&test.admin, None, "a-root");
    assert_eq!(volume().unwrap().status.phase.as_str(), "deleting", "its file may still be there");
    test.cloud.node_delete(&test.admin, "n1", None).await.unwrap();
    assert!(volume().is_err(), "nobody will ever say that it is gone");
}

#[tokio::test]
async fn two_nodes_cannot_have_one_name() {
    let test = TestCloud::new().await;
    test.node("n1", 8, ByteSize::gib(8)).await;
    let other = ostler_api::node::NodeRegister {
        id: ostler_api::NodeId::new(),
        labels: Default::default(),
        facts: crate::testing::facts(1, ByteSize::gib(1)),
    };
    let error = test.cloud.node_register(&test.admin, "n1", other).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
}

#[tokio::test]
async fn the_work_stream_has_all_that_is_placed_and_then_the_changes() {
    let test = TestCloud::new().await;
    test.image("img").await;
    let _act = controllers(&test);
    test.node("n1", 8, ByteSize::gib(8)).await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    until(&test, "placed", || test.vm("a").status.node.is_some()).await;
    let mut work = test.cloud.node_work(&test.admin, "n1").await.unwrap();
    let mut first = Vec::new();
    loop {
        let line = tokio::time::timeout(PATIENCE, work.next()).await.unwrap().unwrap();
        let synced = matches!(line, WorkLine::Synced { .. });
        first.push(line);
        if synced {
            break;
        }
    }
    assert!(matches!(first[0], WorkLine::Hello { cloud, .. } if cloud == test.cloud.cloud_id()));
    assert!(matches!(&first[1], WorkLine::Volume { .. }), "volumes come before the VMs that need them");
    assert!(matches!(&first[2], WorkLine::Vm { vm } if vm.metadata.name.as_str() == "a"));
    // The node's own report does not come back to it; the next task does.
    test.answer("a", MachineState::Running, TaskOutcome::Done).await;
    test.cloud.vm_delete(&test.admin, None, "a", None, false).await.unwrap();
    test.answer("a", MachineState::Absent, TaskOutcome::Done).await;
    let volume = test.cloud.get::<ostler_api::volume::Volume>(&test.admin, None, "a-root").unwrap();
    let gone = ostler_api::work::VolumeReport {
        volume: volume.metadata.id.into(),
        state: ostler_api::work::VolumeState::Gone,
    };
    let reports = ostler_api::work::Reports { reports: vec![ostler_api::work::Report::Volume(gone)] };
    test.cloud.node_reports(&test.admin, "n1", reports).await.unwrap();
    let mut seen = Vec::new();
    while !seen.iter().any(|line| matches!(line, WorkLine::VmGone { .. })) {
        seen.push(tokio::time::timeout(PATIENCE, work.next()).await.unwrap().unwrap());
    }
    let tasks =
        seen.iter().filter(|line| matches!(line, WorkLine::Vm { vm } if vm.status.task.is_some())).count();
    assert_eq!(tasks, 1, "{seen:?}");
}

#[tokio::test]
async fn a_stream_is_joined_once_by_the_right_node_only() {
    let test = TestCloud::new().await;
    test.image("img").await;
    let _act = controllers(&test);
    test.node("n1", 8, ByteSize::gib(8)).await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    until(&test, "placed", || test.vm("a").status.node.is_some()).await;
    let mut work = test.cloud.node_work(&test.admin, "n1").await.unwrap();
    let (cloud, admin) = (Arc::clone(&test.cloud), test.admin.clone());
    let open = tokio::spawn(async move {
        cloud.stream_open(&admin, None, "a", StreamKind::Console { scrollback: 0 }).await
    });
    let request = loop {
        if let WorkLine::Stream { stream } =
            tokio::time::timeout(PATIENCE, work.next()).await.unwrap().unwrap()
        {
            break stream;
        }
    };
    assert!(test.cloud.stream_join(&test.admin, "n2", request.id).await.is_err());
    let mut agent = test.cloud.stream_join(&test.admin, "n1", request.id).await.unwrap();
    assert!(test.cloud.stream_join(&test.admin, "n1", request.id).await.is_err(), "good once");
    let mut user = open.await.unwrap().unwrap();
    user.tx.send("in".into()).await.unwrap();
    assert_eq!(agent.rx.recv().await.unwrap(), "in");
    agent.tx.send("out".into()).await.unwrap();
    drop(agent);
    assert_eq!(user.rx.recv().await.unwrap(), "out");
    assert!(user.rx.recv().await.is_none(), "the end of one is the end of the other");
}

#[tokio::test]
async fn without_an_agent_a_console_says_so_at_once() {
    let test = TestCloud::new().await;
    test.image("img").await;
    let _act = controllers(&test);
    test.node("n1", 8, ByteSize::gib(8)).await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    until(&test, "placed", || test.vm("a").status.node.is_some()).await;
    let error = test.cloud.stream_open(&test.admin, None, "a", StreamKind::Vnc).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::NodeUnavailable);
}

#[tokio::test]
async fn one_control_plane_acts_and_another_takes_over() {
    let test = TestCloud::new().await;
    test.image("img").await;
    let store = Arc::clone(&test.cloud.store);
    let second =
        crate::Cloud::open(store, Arc::clone(&test.cloud.images), CloudConfig::default()).await.unwrap();
    let (stop_first, stop_second) = (CancellationToken::new(), CancellationToken::new());
    let first = test.cloud.run_controllers(stop_first.clone());
    let leads = |cloud: &crate::Cloud| cloud.metrics().contains("\nostler_controller_leader 1\n");
    until(&test, "the first leads", || leads(&test.cloud)).await;
    let other = second.run_controllers(stop_second.clone());
    test.node("n1", 8, ByteSize::gib(8)).await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    until(&test, "placed", || test.vm("a").status.node.is_some()).await;
    assert!(!leads(&second));
    stop_first.cancel();
    first.await.unwrap();
    test.cloud.vm_create(&test.admin, None, TestCloud::create("b"), None).await.unwrap();
    until(&test, "placed by the second", || test.vm("b").status.node.is_some()).await;
    assert!(leads(&second));
    stop_second.cancel();
    other.await.unwrap();
}

#[tokio::test]
async fn the_only_server_acts_at_once_after_a_killed_one() {
    let test = TestCloud::new().await;
    let store = Arc::clone(&test.cloud.store);
    // What a killed server leaves: a lead that nobody gives up, with a lease of an hour.
    let lease = store.lease_grant(Duration::from_secs(3600)).await.unwrap();
    let held = ostler_store::Txn::new().put_leased(crate::keys::LEADER, "", lease);
    assert!(matches!(store.txn(held).await.unwrap(), ostler_store::TxnOutcome::Committed { .. }));
    let config = CloudConfig { sole_server: true, ..CloudConfig::default() };
    let again = crate::Cloud::open(store, Arc::clone(&test.cloud.images), config).await.unwrap();
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    again.run_controllers(stop);
    until(&test, "it leads", || again.metrics().contains("\nostler_controller_leader 1\n")).await;
}

#[tokio::test]
async fn what_is_opened_again_is_as_it_was() {
    let test = TestCloud::new().await;
    test.image("img").await;
    test.node("n1", 8, ByteSize::gib(8)).await;
    test.cloud.vm_create(&test.admin, None, TestCloud::create("a"), None).await.unwrap();
    let store = Arc::clone(&test.cloud.store);
    let again =
        crate::Cloud::open(store, Arc::clone(&test.cloud.images), CloudConfig::default()).await.unwrap();
    assert_eq!(again.cloud_id(), test.cloud.cloud_id());
    let vm = again.get::<ostler_api::vm::Vm>(&again.caller_local(), None, "a").unwrap();
    assert_eq!(*vm, *test.vm("a"));
    assert_eq!(again.cache.read().unplaced.len(), 1, "it goes on where it was");
}
