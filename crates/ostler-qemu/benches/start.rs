//! How long a machine takes from the request to running virtual CPUs, against the same QEMU command line spawned by
//! hand and let go over QMP. Both in turn in the same run; prints medians, spreads and the ratio.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ostler_qemu::conformance::guest;
use ostler_qemu::*;
use uuid::Uuid;

const WARM_UP: usize = 3;

fn main() {
    // `cargo test` runs benches too, with this flag; one round shows that it works.
    let rounds = if std::env::args().any(|arg| arg == "--bench") { 40 } else { 1 };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, guest::boot_disk()).unwrap();
    let hypervisor = Arc::new(QemuHypervisor::new(QemuConfig::new(dir.path().join("run"))));
    assert!(runtime.block_on(hypervisor.probe()).problems.is_empty());

    let (mut ours, mut bare, mut kills) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds + WARM_UP {
        let (started, killed) = runtime.block_on(start_ours(&hypervisor, &disk));
        let by_hand = start_by_hand(dir.path(), &disk);
        if round >= WARM_UP {
            ours.push(started);
            kills.push(killed);
            bare.push(by_hand);
        }
    }
    let (our_median, bare_median) = (report("start()", &mut ours), report("the same by hand", &mut bare));
    report("kill()", &mut kills);
    println!("start() / by hand: {:.2}x", our_median.as_secs_f64() / bare_median.as_secs_f64());
}

fn report(what: &str, times: &mut [Duration]) -> Duration {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    println!(
        "{what:<18} median {:6.1} ms   10th percentile {:6.1} ms   90th {:6.1} ms   ({} rounds)",
        ms(at(0.5)),
        ms(at(0.1)),
        ms(at(0.9)),
        times.len()
    );
    at(0.5)
}

fn spec(disk: &Path) -> MachineSpec {
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
            layers: vec![DiskLayer { path: disk.to_owned(), format: DiskFormat::Raw }],
            bus: DiskBus::Virtio,
            read_only: false,
            cdrom: false,
            serial: None,
            boot_index: Some(1),
        }],
        nics: vec![NicSpec {
            id: "lan".into(),
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

async fn start_ours(hypervisor: &QemuHypervisor, disk: &Path) -> (Duration, Duration) {
    let spec = spec(disk);
    let begun = Instant::now();
    let machine = hypervisor.start(spec, StartOptions::default()).await.unwrap();
    let started = begun.elapsed();
    let begun = Instant::now();
    hypervisor.kill(machine.id()).await.unwrap();
    let killed = begun.elapsed();
    hypervisor.forget(machine.id()).await.unwrap();
    (started, killed)
}

/// The plan's arguments, with the descriptors replaced by what a person would write and everything cold-plugged.
fn command_line(dir: &Path, disk: &Path) -> Vec<OsString> {
    use ostler_qemu::args::{HostFacts, HotPlug, plan};
    let facts = HostFacts {
        machine_version: "q35".into(),
        cpu_model: "max".into(),
        tcg_tb_size_mib: 64,
        restore: false,
    };
    let plan = plan(&spec(disk), &facts);
    let mut args: Vec<String> = Vec::new();
    let mut planned = plan.args.into_iter().map(|arg| arg.into_string().unwrap());
    while let Some(arg) = planned.next() {
        match arg.as_str() {
            "-add-fd" => drop(planned.next()),
            "-chardev" => {
                let value = planned.next().unwrap();
                let socket = if value.contains("id=qmp") { "qmp" } else { "serial0" };
                let path = dir.join(format!("{socket}.sock"));
                args.extend([arg, format!("socket,id={socket},path={},server=on,wait=off", path.display())]);
            }
            _ => args.push(arg),
        }
    }
    for step in plan.hotplug {
        match step {
            HotPlug::AddFd { .. } | HotPlug::GetFd { .. } => {}
            HotPlug::Blockdev { node, .. } => {
                let node = json(&node).replace("/dev/fdset/10", &disk.display().to_string());
                args.extend(["-blockdev".into(), node]);
            }
            HotPlug::Netdev { netdev } => args.extend(["-netdev".into(), json(&netdev)]),
            HotPlug::Device(device) => args.extend(["-device".into(), json(&device)]),
        }
    }
    args.into_iter().map(OsString::from).collect()
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap()
}

fn start_by_hand(dir: &Path, disk: &Path) -> Duration {
    let args = command_line(dir, disk);
    let socket = dir.join("qmp.sock");
    let begun = Instant::now();
    let mut child = Command::new("qemu-system-x86_64")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut qmp = connect(&socket, &mut child);
    let mut lines = BufReader::new(qmp.try_clone().unwrap()).lines();
    let mut answer = |wanted: &str| {
        while !lines.next().expect("QEMU answers").unwrap().contains(wanted) {}
    };
    answer("QMP");
    qmp.write_all(b"{\"execute\":\"qmp_capabilities\"}").unwrap();
    answer("return");
    qmp.write_all(b"{\"execute\":\"cont\"}").unwrap();
    answer("return");
    let started = begun.elapsed();
    child.kill().unwrap();
    child.wait().unwrap();
    for name in ["qmp.sock", "serial0.sock"] {
        std::fs::remove_file(PathBuf::from(dir).join(name)).unwrap();
    }
    started
}

fn connect(socket: &Path, child: &mut Child) -> UnixStream {
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(_) => {
                assert!(child.try_wait().unwrap().is_none(), "QEMU ended");
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
}
