//! The agent with real QEMU processes and a real pool: what runs survives it, and nothing is left behind.

#[allow(dead_code)]
#[path = "agent/plane.rs"]
mod plane;

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ostler_api::image::{ImageFormat, ImageUse};
use ostler_api::snapshot::SnapshotPhase;
use ostler_api::vm::{EndCause, MachineState, Publish};
use ostler_api::vm_action::VmAction;
use ostler_api::volume::VolumePhase;
use ostler_api::work::StreamKind;
use ostler_api::{AcceleratorWish, ByteSize, ImageId, VolumeId};
use ostler_node::{Agent, AgentConfig};
use ostler_qemu::{QemuConfig, QemuHypervisor};
use ostler_storage::{DirPool, Layer, Pool};
use plane::{Plane, name};
use tokio_util::sync::CancellationToken;

/// An agent with a runtime of its own, so that its end is the end of everything it began.
struct Process(tokio::runtime::Runtime);

fn agent(dir: &Path, plane: &Arc<Plane>) -> Process {
    let mut config = AgentConfig::new(name("n1"), dir);
    config.look_every = Some(Duration::from_millis(500));
    let hypervisor = Arc::new(QemuHypervisor::new(QemuConfig::new(dir.join("run"))));
    let pool = Arc::new(DirPool::open(dir.join("pool")).unwrap());
    let agent = Agent::new(config, hypervisor, pool, Arc::<Plane>::clone(plane));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.spawn(async move { agent.run(CancellationToken::new()).await.unwrap() });
    Process(runtime)
}

async fn kill(agent: Process) {
    let end = move || agent.0.shutdown_timeout(Duration::from_secs(10));
    tokio::task::spawn_blocking(end).await.unwrap();
}

/// Directories of machines, VMs or volumes.
fn entries(dir: &Path) -> usize {
    let ids = std::fs::read_dir(dir).into_iter().flatten().flatten().filter(|entry| {
        entry.path().file_stem().and_then(|stem| stem.to_str()?.parse::<uuid::Uuid>().ok()).is_some()
    });
    ids.count()
}

/// Ends what a failed test leaves running.
struct Cleanup(Arc<Plane>);

impl Drop for Cleanup {
    fn drop(&mut self) {
        let facts = self.0.with(|inner| {
            let seen = inner.vms.values().filter_map(|vm| vm.status.observed.clone()?.facts);
            seen.collect::<Vec<_>>()
        });
        for fact in facts {
            let comm = std::fs::read_to_string(format!("/proc/{}/comm", fact.pid)).unwrap_or_default();
            if comm.starts_with("qemu") {
                signal_kill(fact.pid);
            }
        }
    }
}

fn signal_kill(pid: u32) {
    // SAFETY: a signal to a process that this test started.
    unsafe { libc::kill(i32::try_from(pid).unwrap(), libc::SIGKILL) };
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_outlives_its_agents_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::new();
    let _cleanup = Cleanup(Arc::clone(&plane));
    let first = agent(dir.path(), &plane);
    let vm = plane.vm_create();
    plane.vm_change(vm, |vm| vm.spec.accelerator = AcceleratorWish::Tcg);
    plane.done(vm, VmAction::Start).await;
    let facts = plane.observed(vm).unwrap().facts.unwrap();

    // The agent is killed; the machine is adopted as the same run.
    kill(first).await;
    let second = agent(dir.path(), &plane);
    plane.done(vm, VmAction::Pause).await;
    assert_eq!(plane.observed(vm).unwrap().facts, Some(facts.clone()));
    plane.done(vm, VmAction::Resume).await;
    plane.done(vm, VmAction::Reset).await;

    let mut screen = plane.open(vm, StreamKind::Vnc);
    assert!(screen.rx.recv().await.unwrap().starts_with(b"RFB "));
    drop(screen);

    // Its memory survives it, and the hardware stays the same.
    plane.done(vm, VmAction::Suspend).await;
    assert_eq!(entries(&dir.path().join("run")), 0);
    kill(second).await;
    let third = agent(dir.path(), &plane);
    plane.done(vm, VmAction::Start).await;
    let resumed = plane.observed(vm).unwrap().facts.unwrap();
    assert_eq!(resumed.machine_version, facts.machine_version);

    // It dies while nobody looks.
    kill(third).await;
    signal_kill(resumed.pid);
    let fourth = agent(dir.path(), &plane);
    let seen = plane.state(vm, MachineState::Absent).await;
    assert_eq!(seen.end, Some(EndCause::Died));
    assert_eq!(seen.fault.unwrap().code, "qemu_died");

    plane.done(vm, VmAction::Start).await;
    plane.done(vm, VmAction::Reboot { timeout: 1 }).await;
    plane.done(vm, VmAction::Delete).await;
    plane.wait("the end of the volumes", |inner| inner.volumes.is_empty().then_some(())).await;
    for leftover in ["run", "vms", "volumes", "pool/volumes"] {
        assert_eq!(entries(&dir.path().join(leftover)), 0, "{leftover}");
    }
    kill(fourth).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_named_and_free_again_after() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::new();
    let _cleanup = Cleanup(Arc::clone(&plane));
    let agent = agent(dir.path(), &plane);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let vm = plane.vm_create();
    plane.vm_change(vm, |vm| {
        vm.spec.accelerator = AcceleratorWish::Tcg;
        vm.spec.nics[0].publish = vec![format!("{port}:22").parse::<Publish>().unwrap()];
    });
    let fault = plane.failed(vm, VmAction::Start).await;
    assert_eq!(fault.code, "port_in_use");
    assert!(fault.message.contains(&port.to_string()), "{}", fault.message);
    drop(taken);
    plane.done(vm, VmAction::Start).await;
    plane.done(vm, VmAction::Stop).await;
    TcpListener::bind(("127.0.0.1", port)).unwrap();
    plane.done(vm, VmAction::Delete).await;
    kill(agent).await;
}

static IMAGE: [u8; 1 << 20] = [b'Z'; 1 << 20];
const IMAGE_SHA256: &str = "bf63d8a95fcc2e64619813aae35fdcbe871fdd9264caa3f365eb3aed0f679129";

/// Reads or writes a pattern in a volume that nobody has open.
fn qemu_io(top: &Layer, command: &str) {
    let out =
        std::process::Command::new("qemu-io").args(["-f", "qcow2", "-c", command]).arg(&top.path).output();
    let out = out.unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success() && !said.contains("failed"), "{command}: {said}");
}

async fn chain_is(pool: &DirPool, volume: VolumeId, depth: u32) -> Vec<Layer> {
    let until = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        let info = pool.volume_info(volume.0).await.unwrap().unwrap();
        if info.depth == depth {
            return pool.volume_layers(volume.0).await.unwrap();
        }
        assert!(std::time::Instant::now() < until, "{} layers and not {depth}", info.depth);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Merges by QEMU, in the middle and into the top over an image, and by the pool.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chains_are_shortened_and_read_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let plane = Plane::new();
    let _cleanup = Cleanup(Arc::clone(&plane));
    let agent = agent(dir.path(), &plane);
    plane.with(|inner| inner.image_bytes = Some(&IMAGE));
    let image = ImageUse {
        image: ImageId::new(),
        sha256: IMAGE_SHA256.to_owned(),
        format: ImageFormat::Raw,
        virtual_size: ByteSize::mib(1),
    };
    let volume = plane.volume_create(Some(image));
    plane.volume_phase(volume, VolumePhase::Ready).await;
    let vm = plane.vm_create();
    plane.vm_change(vm, |vm| {
        vm.spec.accelerator = AcceleratorWish::Tcg;
        vm.spec.disks[0].volume = volume;
    });
    let pool = DirPool::open(dir.path().join("pool")).unwrap();

    let mut taken = Vec::new();
    for number in 1..=5 {
        let layers = chain_is(&pool, volume, number).await;
        qemu_io(&layers[0], &format!("write -P {number} {number}M 1M"));
        qemu_io(&layers[0], &format!("write -P {number} 10M 64k"));
        taken.push(plane.snapshot_taken(vm).await);
    }
    plane.done(vm, VmAction::Start).await;
    for snapshot in [taken[1], taken[2], taken[3]] {
        plane.snapshot_delete(snapshot);
        plane.snapshot_gone(snapshot).await;
    }
    chain_is(&pool, volume, 4).await;
    for snapshot in [taken[4], taken[0]] {
        plane.snapshot_delete(snapshot);
        plane.snapshot_gone(snapshot).await;
    }
    let layers = chain_is(&pool, volume, 1).await;
    assert!(layers[1].path.to_str().unwrap().contains(IMAGE_SHA256), "{layers:?}");
    // It is one more layer that is switched to, so the machine has what the pool has.
    let snapshot = plane.snapshot_taken(vm).await;
    plane.done(vm, VmAction::Stop).await;
    plane.snapshot_delete(snapshot);
    plane.snapshot_gone(snapshot).await;
    let layers = chain_is(&pool, volume, 1).await;
    qemu_io(&layers[0], "read -P 0x5a 0 1M");
    for number in 1..=5 {
        qemu_io(&layers[0], &format!("read -P {number} {number}M 1M"));
    }
    qemu_io(&layers[0], "read -P 5 10M 64k");
    assert_eq!(
        plane.with(|inner| inner.snapshots.values().map(|one| one.status.phase).collect::<Vec<_>>()),
        [] as [SnapshotPhase; 0]
    );
    plane.done(vm, VmAction::Start).await;
    plane.done(vm, VmAction::Delete).await;
    kill(agent).await;
}
