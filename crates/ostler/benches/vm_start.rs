//! `vm start` and `vm delete` through the API, against the same QEMU spawned by hand and against virsh, all in turn in
//! the same run.

#[path = "../../ostler-qemu/benches/by_hand/mod.rs"]
mod by_hand;
mod support;
mod virsh;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use by_hand::{ByHand, command_line};
use ostler_api::ByteSize;
use ostler_api::vm::{Vm, VmCreate};
use ostler_client::{Client, Delete, Wait};
use ostler_qemu::*;
use support::{Samples, Served, import, line, measuring, ms};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    let (rounds, warm_up) = if measuring() { (30, 3) } else { (1, 0) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run(rounds, warm_up));
}

async fn run(rounds: usize, warm_up: usize) {
    let dir = tempfile::tempdir().unwrap();
    let hand = dir.path().join("hand");
    std::fs::create_dir(&hand).unwrap();
    let base = base_disk(&hand);
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let served = Served::start(&data, &[]).await;
    let client = served.client();
    import(&client, "img", std::fs::read(&base).unwrap()).await;
    let mut libvirt = virsh::Libvirt::start(&hand, &base);
    if libvirt.is_none() {
        println!(
            "no comparison with virsh: that needs root, libvirt-daemon-system, and no libvirtd that runs already"
        );
    }
    let args = command_line(&spec(&overlay(&hand, &base), &base), &hand);

    let mut times = Times::default();
    for round in 0..rounds + warm_up {
        let mut one = Times::default();
        let name = format!("b{round}");
        // A VM that exists and is stopped, so that start is all that is measured.
        create(&client, &name, false).await;
        start(&client, &name, &mut one.warm).await;
        stop(&client, &name).await;
        start(&client, &name, &mut one.start).await;
        delete(&client, &name, &mut one.delete).await;
        let machine = ByHand::start(&args, &hand);
        one.hand.push(ms(machine.started));
        machine.end();
        // The command lines against each other.
        create(&client, &name, false).await;
        one.cli_start.push(cli(&data, &["vm", "start", &name, "--wait"]));
        one.cli_delete.push(cli(&data, &["vm", "delete", &name, "--wait"]));
        if let Some(libvirt) = &mut libvirt {
            one.virsh_start.push(libvirt.virsh(&["start", virsh::DOMAIN]));
            one.virsh_destroy.push(libvirt.virsh(&["destroy", virsh::DOMAIN]));
        }
        if round >= warm_up {
            times.add(one);
        }
    }
    drop(libvirt);
    served.stop();
    times.report();
}

#[derive(Default)]
struct Times {
    warm: Vec<f64>,
    start: Vec<f64>,
    delete: Vec<f64>,
    hand: Vec<f64>,
    cli_start: Vec<f64>,
    cli_delete: Vec<f64>,
    virsh_start: Vec<f64>,
    virsh_destroy: Vec<f64>,
}

impl Times {
    fn add(&mut self, one: Self) {
        for (all, new) in [
            (&mut self.warm, one.warm),
            (&mut self.start, one.start),
            (&mut self.delete, one.delete),
            (&mut self.hand, one.hand),
            (&mut self.cli_start, one.cli_start),
            (&mut self.cli_delete, one.cli_delete),
            (&mut self.virsh_start, one.virsh_start),
            (&mut self.virsh_destroy, one.virsh_destroy),
        ] {
            all.extend(new);
        }
    }

    fn report(self) {
        let against =
            |figure: &str, ours: Vec<f64>, other: Vec<f64>, named: &str, goal: &str, faster: bool| {
                if other.is_empty() {
                    return;
                }
                let (ours, other) = (Samples::new(ours), Samples::new(other));
                let ratio = match faster {
                    true => format!("{:.1}x faster", other.median() / ours.median()),
                    false => format!("{:.2}x", ours.median() / other.median()),
                };
                line(figure, &ours.text("ms"), &format!("{} {named}", other.text("ms")), &ratio, goal);
            };
        against(
            "vm start, API request to running",
            self.start,
            self.hand.clone(),
            "by hand",
            "at most 1.25x",
            false,
        );
        against("vm start, first time (disk is made)", self.warm, self.hand, "by hand", "-", false);
        against(
            "ostler vm start --wait",
            self.cli_start,
            self.virsh_start,
            "virsh start",
            "at least 4x faster",
            true,
        );
        against(
            "ostler vm delete --wait",
            self.cli_delete,
            self.virsh_destroy.clone(),
            "virsh destroy",
            "at least 4x faster",
            true,
        );
        against("vm delete, API", self.delete, self.virsh_destroy, "virsh destroy", "-", true);
    }
}

async fn create(client: &Client, name: &str, start: bool) {
    let create = VmCreate {
        image: Some("img".into()),
        memory: ByteSize::mib(256),
        start,
        ..VmCreate::named(name.parse().unwrap())
    };
    client.vm_create(&create, None).await.unwrap();
}

async fn start(client: &Client, name: &str, times: &mut Vec<f64>) {
    let begun = Instant::now();
    let wait = Wait::phases(["running"], PATIENCE);
    let answer = client.vm_start(name, Some(&wait)).await.unwrap();
    times.push(ms(begun.elapsed()));
    assert_eq!(answer.resource.status.phase.as_str(), "running", "{:?}", answer.resource.status.reason);
}

async fn stop(client: &Client, name: &str) {
    client.vm_stop(name, Some(&Wait::phases(["stopped"], PATIENCE))).await.unwrap();
}

async fn delete(client: &Client, name: &str, times: &mut Vec<f64>) {
    let begun = Instant::now();
    client.vm_delete(name, &Delete { wait: Some(Wait::gone(PATIENCE)), ..Delete::default() }).await.unwrap();
    times.push(ms(begun.elapsed()));
    assert!(client.get::<Vm>(name).await.is_err());
}

fn cli(data: &Path, args: &[&str]) -> f64 {
    let begun = Instant::now();
    let output = Command::new(env!("CARGO_BIN_EXE_ostler"))
        .args(args)
        .env("OSTLER_HOST", format!("unix://{}", data.join("ostler.sock").display()))
        .output()
        .unwrap();
    let time = ms(begun.elapsed());
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    time
}

/// A qcow2 disk with a boot sector that halts.
fn base_disk(dir: &Path) -> PathBuf {
    let raw = dir.join("base.raw");
    let mut bytes = vec![0u8; 1 << 20];
    bytes[..3].copy_from_slice(&[0xf4, 0xeb, 0xfd]); // hlt; jmp to it
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(&raw, bytes).unwrap();
    let base = dir.join("base.qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), base.to_str().unwrap()]);
    base
}

fn overlay(dir: &Path, base: &Path) -> PathBuf {
    let disk = dir.join("disk.qcow2");
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        base.to_str().unwrap(),
        disk.to_str().unwrap(),
    ]);
    disk
}

fn qemu_img(args: &[&str]) {
    assert!(Command::new("qemu-img").args(args).status().unwrap().success(), "qemu-img {args:?}");
}

/// The machine that the agent makes of such a VM.
fn spec(disk: &Path, base: &Path) -> MachineSpec {
    let layer = |path: &Path| DiskLayer::new(path, DiskFormat::Qcow2);
    MachineSpec {
        id: Uuid::now_v7(),
        name: "bench".into(),
        machine: MachineType::Q35,
        machine_version: None,
        accelerator: Accelerator::Tcg,
        cpu_model: None,
        cpus: 1,
        memory_bytes: 256 << 20,
        firmware: Firmware::Bios,
        kernel: None,
        disks: vec![DiskSpec {
            id: "root".into(),
            layers: vec![layer(disk), layer(base)],
            boot_index: Some(1),
            ..DiskSpec::default()
        }],
        disk_places: None,
        nics: vec![NicSpec {
            id: "nic0".into(),
            mac: "52:54:00:12:34:56".parse().unwrap(),
            model: NicModel::Virtio,
            backend: NicBackend::User { forwards: Vec::new(), hostname: None },
            boot_index: None,
        }],
        rng: true,
        balloon: true,
        vnc: false,
    }
}
