//! Console, display and log, from the user's end.

use bytes::Bytes;
use ostler_api::vm_action::VmAction;
use ostler_api::work::StreamKind;

use crate::plane::Ends;
use crate::site::Site;

async fn until(ends: &mut Ends, what: &str) {
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains(what) {
        match tokio::time::timeout(std::time::Duration::from_secs(60), ends.rx.recv()).await {
            Ok(Some(bytes)) => seen.extend(bytes),
            other => panic!("{what:?} did not come: {other:?} after {:?}", String::from_utf8_lossy(&seen)),
        }
    }
}

#[tokio::test]
async fn console_and_display_of_a_running_vm() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Start).await;
    let mut console = plane.open(vm, StreamKind::Console { scrollback: 1000 });
    until(&mut console, "simulated console of").await;
    let mut display = plane.open(vm, StreamKind::Vnc);
    until(&mut display, "RFB 003.008").await;
    console.tx.send(Bytes::from_static(b"x")).unwrap();
    plane.done(vm, VmAction::Stop).await;
}

#[tokio::test]
async fn streams_to_what_is_not_there_end() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Stop).await;
    for what in
        [StreamKind::Console { scrollback: 10 }, StreamKind::Vnc, StreamKind::Log { tail: 10, follow: false }]
    {
        assert!(plane.open(vm, what).rx.recv().await.is_none());
    }
    let nobody = ostler_api::VmId::new();
    assert!(plane.open(nobody, StreamKind::Vnc).rx.recv().await.is_none());
}

#[tokio::test]
async fn the_log_of_a_stopped_vm_is_followed_until_the_user_leaves() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.done(vm, VmAction::Stop).await;
    let dir = site.dir.path().join("vms").join(vm.to_string());
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("console.log"), "login: ").unwrap();
    let mut log = plane.open(vm, StreamKind::Log { tail: 3, follow: true });
    until(&mut log, "n: ").await;
    std::fs::write(dir.join("console.log"), "login: root\n").unwrap();
    until(&mut log, "root").await;
    drop(log.tx);
    while log.rx.recv().await.is_some() {}
}
