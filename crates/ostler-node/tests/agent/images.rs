//! Images on their way to a node, and away from it.

use ostler_api::Time;
use ostler_api::image::{ImageFormat, ImageUse};
use ostler_api::vm::KernelBoot;
use ostler_api::vm_action::VmAction;
use ostler_api::volume::VolumePhase;
use ostler_api::work::WorkLine;
use ostler_storage::Pool;

use crate::plane::image;
use crate::site::{Site, eventually};

/// SHA-256 of `kernel`.
const DIGEST: &str = "6923dd1bc0460082c5d55a831908c24a282860b7f1cd6c2b79cf1bc8857c639c";

fn kernel() -> ImageUse {
    ImageUse { sha256: DIGEST.into(), format: ImageFormat::Raw, ..image() }
}

#[tokio::test(start_paused = true)]
async fn an_image_is_downloaded_once_for_all_who_wait_for_it() {
    let site = Site::new();
    let _agent = site.agent();
    let plane = &site.plane;
    plane.with(|inner| inner.image_bytes = Some(b"kernel"));
    let vms = [(); 5].map(|()| plane.vm_create());
    let starts = vms.map(|vm| {
        plane.vm_change(vm, |vm| {
            vm.spec.kernel = Some(KernelBoot { kernel: kernel(), initrd: None, cmdline: "quiet".into() });
        });
        plane.act(vm, VmAction::Start)
    });
    for start in starts {
        assert_eq!(plane.outcome(start).await, ostler_api::work::TaskOutcome::Done);
    }
    assert_eq!(plane.with(|inner| inner.images_sent), 1);
}

#[tokio::test(start_paused = true)]
async fn bytes_that_are_not_the_image_are_refused() {
    let site = Site::new();
    let _agent = site.agent();
    let (plane, vm) = (&site.plane, site.plane.vm_create());
    plane.with(|inner| inner.image_bytes = Some(b"something else"));
    plane.vm_change(vm, |vm| vm.spec.cdrom = Some(kernel()));
    assert_eq!(plane.failed(vm, VmAction::Start).await.code, "checksum_mismatch");
    plane.with(|inner| inner.image_bytes = Some(b"kernel"));
    plane.done(vm, VmAction::Start).await;
}

#[tokio::test(start_paused = true)]
async fn an_image_that_nobody_needs_goes_and_one_in_use_stays() {
    let site = Site::new();
    let _agent = site.agent();
    let plane = &site.plane;
    plane.with(|inner| inner.image_bytes = Some(b"kernel"));
    let volume = plane.volume_create(Some(kernel()));
    plane.volume_phase(volume, VolumePhase::Ready).await;
    let gone = WorkLine::ImageGone { sha256: DIGEST.into() };
    plane.with(|inner| inner.tell(gone.clone()));
    tokio::time::sleep(std::time::Duration::from_secs(60)).await;
    assert_eq!(site.pool.image_list().await.unwrap().len(), 1);
    plane.volume_change(volume, |volume| volume.metadata.deleted = Some(Time::now()));
    plane.wait("its end", |inner| inner.volumes.is_empty().then_some(())).await;
    plane.with(|inner| inner.tell(gone));
    let pool = &site.pool;
    eventually("the image's end", || {
        futures::FutureExt::now_or_never(pool.image_list()).unwrap().unwrap().is_empty()
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn an_image_that_was_deleted_while_nobody_told_goes_at_the_next_list() {
    let site = Site::new();
    let _agent = site.agent();
    let plane = &site.plane;
    plane.with(|inner| inner.image_bytes = Some(b"kernel"));
    let volume = plane.volume_create(Some(kernel()));
    plane.volume_phase(volume, VolumePhase::Ready).await;
    plane.volume_change(volume, |volume| volume.metadata.deleted = Some(Time::now()));
    plane.wait("its end", |inner| inner.volumes.is_empty().then_some(())).await;
    let cached = || futures::FutureExt::now_or_never(site.pool.image_list()).unwrap().unwrap().len();
    plane.with(|inner| inner.tell(WorkLine::Images { sha256: vec![DIGEST.into()] }));
    tokio::time::sleep(std::time::Duration::from_secs(60)).await;
    assert_eq!(cached(), 1, "an image that is there stays");
    plane.with(|inner| inner.tell(WorkLine::Images { sha256: Vec::new() }));
    eventually("the image's end", || cached() == 0).await;
}
