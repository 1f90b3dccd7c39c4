//! What is not this cloud's, or not of its present state, is not touched.

use std::time::Duration;

use ostler_api::vm::MachineState;
use ostler_api::vm_action::VmAction;
use uuid::Uuid;

use crate::site::{Site, eventually};

/// Long enough for several reconnects and looks.
const LONG: Duration = Duration::from_secs(300);

async fn warned(site: &Site) {
    let warns = |register: &ostler_api::node::NodeRegister| {
        register.facts.warnings.iter().any(|warning| warning.contains("left alone"))
    };
    site.plane.wait("a warning", |inner| inner.registers.last().is_some_and(warns).then_some(())).await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_is_no_longer_placed_here_ends() {
    let site = Site::new();
    let agent = site.agent();
    let plane = &site.plane;
    let [gone, lost] = [(); 2].map(|()| plane.vm_create());
    plane.done(gone, VmAction::Start).await;
    plane.done(lost, VmAction::Start).await;
    plane.with(|inner| {
        inner.vms.remove(&gone);
        inner.tell(ostler_api::work::WorkLine::VmGone { vm: gone });
    });
    eventually("its end", || site.host.known() == 1).await;
    // The same while the agent is away.
    agent.kill().await;
    plane.vm_lose(lost);
    let _agent = site.agent();
    eventually("its end", || site.host.known() == 0).await;
}

#[tokio::test(start_paused = true)]
async fn another_cloud_touches_nothing() {
    let site = Site::new();
    let agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    agent.kill().await;
    let (cloud, theirs) = plane.with(|inner| {
        let old = std::mem::replace(&mut inner.cloud, Uuid::now_v7());
        inner.revision += 1_000_000;
        let volumes = std::mem::take(&mut inner.volumes);
        (old, (inner.vms.remove(&vm).unwrap(), volumes))
    });
    let _agent = site.agent();
    warned(&site).await;
    tokio::time::sleep(LONG).await;
    assert_eq!(site.host.living(), 1);
    // The old cloud comes back and finds everything.
    plane.with(|inner| {
        inner.cloud = cloud;
        inner.vms.insert(vm, theirs.0);
        inner.volumes = theirs.1;
    });
    plane.cut();
    plane.done(vm, VmAction::Pause).await;
    plane.done(vm, VmAction::Stop).await;
    plane.done(vm, VmAction::Start).await;
}

#[tokio::test(start_paused = true)]
async fn a_store_that_was_set_back_takes_nothing_away() {
    let site = Site::new();
    let _agent = site.agent();
    let plane = &site.plane;
    let before = plane.with(|inner| inner.revision);
    let vm = plane.vm_create();
    plane.done(vm, VmAction::Start).await;
    // A backup from before the VM was made.
    let (mine, volumes) = plane.with(|inner| {
        inner.revision = before;
        (inner.vms.remove(&vm).unwrap(), std::mem::take(&mut inner.volumes))
    });
    plane.cut();
    warned(&site).await;
    // It grows past what was seen: that does not make it know better.
    plane.with(|inner| inner.revision += 1_000_000);
    plane.cut();
    tokio::time::sleep(LONG).await;
    assert_eq!(site.host.living(), 1);
    // Listed again it is an ordinary VM again.
    plane.with(|inner| {
        inner.vms.insert(vm, mine);
        inner.volumes = volumes;
    });
    plane.cut();
    plane.done(vm, VmAction::Stop).await;
    plane.done(vm, VmAction::Start).await;
    assert_eq!(plane.observed(vm).unwrap().state, MachineState::Running);
}
