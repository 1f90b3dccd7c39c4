//! What only the real driver can be asked: rights, failures with QEMU's own words, sockets, firmware, leftovers.

mod common;

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use common::*;
use ostler_qemu::conformance::guest;
use ostler_qemu::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

async fn start(host: &QemuHost, spec: &MachineSpec) -> std::sync::Arc<dyn Machine> {
    host.hypervisor.start(spec.clone(), StartOptions::default()).await.unwrap()
}

async fn start_error(host: &QemuHost, spec: &MachineSpec) -> StartError {
    let error = host.hypervisor.start(spec.clone(), StartOptions::default()).await.unwrap_err();
    let left = host.hypervisor.survey().await.unwrap();
    assert!(
        left.iter().all(|found| matches!(found, Survey::Dead { .. })),
        "a failed start leaves a process: {left:?}"
    );
    error
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

fn status_of(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap()
}

fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.trim_start_matches(':').split_whitespace().collect()
}

#[tokio::test]
async fn qemu_has_no_rights() {
    if !is_root() {
        return;
    }
    let host = QemuHost::with(|config| config.user = QemuUser::PerMachine { first_uid: 64_000, count: 2 });
    let (disk, kernel) = (host.disk("boot.raw"), host.dir.path().join("vmlinuz"));
    std::fs::write(&kernel, guest::kernel()).unwrap();
    // What QEMU's user could never open by itself.
    std::fs::set_permissions(&disk, PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::set_permissions(host.dir.path(), PermissionsExt::from_mode(0o700)).unwrap();
    std::fs::set_permissions(&kernel, PermissionsExt::from_mode(0o444)).unwrap();

    let first = start(&host, &spec(&disk)).await;
    let boots_kernel =
        KernelBoot { kernel: kernel.clone(), initrd: Some(kernel.clone()), cmdline: "quiet".into() };
    let with_kernel = MachineSpec { kernel: Some(boots_kernel), ..spec(&disk) };
    let second = start(&host, &with_kernel).await;
    for (machine, uid) in [(&first, "64000"), (&second, "64001")] {
        let status = status_of(machine.facts().pid);
        assert_eq!(field(&status, "Uid"), [uid; 4]);
        assert_eq!(field(&status, "Gid"), [uid; 4]);
        assert_eq!(field(&status, "Groups"), [""; 0]);
        assert_eq!(field(&status, "NoNewPrivs"), ["1"]);
        assert_eq!(field(&status, "Seccomp"), ["2"]);
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(&status, set), ["0000000000000000"], "{set}");
        }
        wait_for_boot(machine).await;
    }
    let third = start_error_of_full_range(&host, &disk).await;
    assert!(matches!(third, StartError::NoFreeUser { count: 2 }), "{third:?}");

    std::fs::set_permissions(&kernel, PermissionsExt::from_mode(0o400)).unwrap();
    host.hypervisor.kill(with_kernel.id).await.unwrap();
    let error = host.hypervisor.start(with_kernel, StartOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("mode 0444"), "{error}");
}

async fn start_error_of_full_range(host: &QemuHost, disk: &Path) -> StartError {
    host.hypervisor.start(spec(disk), StartOptions::default()).await.unwrap_err()
}

#[tokio::test]
async fn qemu_holds_only_what_it_was_given() {
    let host = QemuHost::new();
    let disk = host.disk("boot.raw");
    // A descriptor that would be inherited by a careless spawn.
    let secret = std::fs::File::create(host.dir.path().join("secret")).unwrap();
    rustix::io::fcntl_setfd(&secret, rustix::io::FdFlags::empty()).unwrap();
    let machine = start(&host, &spec(&disk)).await;
    let pid = machine.facts().pid;
    let open: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .map(|target| target.display().to_string())
        .filter(|target| target.starts_with('/'))
        .collect();
    let machine_dir = host.machine_dir(machine.id()).display().to_string();
    for target in &open {
        let expected = target.starts_with("/dev/")
            || target == &disk.display().to_string()
            || ["lock", "qemu.log", "console.log"]
                .iter()
                .any(|name| *target == format!("{machine_dir}/{name}"));
        assert!(expected, "{target} is open in QEMU, of {open:?}");
    }
    let session = field(&status_of(pid), "NSsid").join("");
    assert_eq!(session, pid.to_string(), "QEMU has a session of its own");
}

#[tokio::test]
async fn missing_qemu_says_what_to_install() {
    let host = QemuHost::with(|config| config.qemu_binary = Some("/nonexistent/qemu".into()));
    let error = host.hypervisor.start(spec(&host.disk("a")), StartOptions::default()).await.unwrap_err();
    assert!(matches!(error, StartError::BinaryMissing { .. }), "{error:?}");
    assert!(error.to_string().contains("apt-get install qemu-system-x86"), "{error}");
    let probe = host.hypervisor.probe().await;
    assert!(probe.qemu_version.is_none() && probe.problems[0].contains("/nonexistent/qemu"), "{probe:?}");
    assert!(host.hypervisor.survey().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_binary_that_is_not_qemu_is_an_error_with_its_words() {
    let host = QemuHost::new();
    let script = host.dir.path().join("qemu");
    std::fs::write(&script, "#!/bin/sh\necho no machine today >&2\nexit 3\n").unwrap();
    std::fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    let hypervisor = QemuHypervisor::new(QemuConfig { qemu_binary: Some(script), ..host.config.clone() });
    let error = hypervisor.start(spec(&host.disk("a")), StartOptions::default()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("no machine today") && text.contains("exit status 3"), "{text}");
}

#[tokio::test]
async fn qemu_that_dies_at_start_gives_its_last_words() {
    let host = QemuHost::new();
    let disk = host.disk("boot.raw");
    let error = start_error(&host, &MachineSpec { cpu_model: Some("nonsense".into()), ..spec(&disk) }).await;
    assert!(matches!(error, StartError::Died { .. }), "{error:?}");
    assert!(error.to_string().contains("nonsense") && error.to_string().contains("exit status 1"), "{error}");

    let error = start_error(&host, &MachineSpec { memory_bytes: 900 << 30, ..spec(&disk) }).await;
    assert!(matches!(error, StartError::OutOfMemory { .. }), "{error:?}");

    let error =
        start_error(&host, &MachineSpec { machine_version: Some("pc-q35-99.0".into()), ..spec(&disk) }).await;
    assert!(error.to_string().contains("pc-q35-99.0"), "{error}");
}

#[tokio::test]
async fn bad_disks_are_named() {
    let host = QemuHost::new();
    let disk = host.disk("boot.raw");
    let mut qcow2 = spec(&disk);
    qcow2.disks[0].layers[0].format = DiskFormat::Qcow2;
    let error = start_error(&host, &qcow2).await;
    assert!(matches!(&error, StartError::BadImage { disk, .. } if disk == "root"), "{error:?}");

    let error = start_error(&host, &spec(&host.dir.path().join("missing"))).await;
    assert!(matches!(&error, StartError::File { path, .. } if path.ends_with("missing")), "{error:?}");

    let fifo = host.dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
        .unwrap();
    let mut on_fifo = spec(&fifo);
    on_fifo.disks[0].read_only = true;
    let error = start_error(&host, &on_fifo).await;
    assert!(
        matches!(&error, StartError::File { source, .. } if source.to_string().contains("no plain file")),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let host = QemuHost::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let forward = PortForward {
        protocol: PortProtocol::Tcp,
        host_addr: "127.0.0.1".parse().unwrap(),
        host_port: port,
        guest_port: 22,
    };
    let wanted = MachineSpec { nics: vec![nic("lan", vec![forward])], ..spec(&host.disk("boot.raw")) };
    let error = start_error(&host, &wanted).await;
    assert!(matches!(&error, StartError::PortInUse { port: named, .. } if *named == port), "{error:?}");
    assert!(error.to_string().contains("something else uses it"), "{error}");

    // Free again, it works, and ends with the machine.
    drop(taken);
    let machine = start(&host, &wanted).await;
    assert!(TcpListener::bind(("127.0.0.1", port)).is_err());
    machine.quit().await.unwrap();
    TcpListener::bind(("127.0.0.1", port)).unwrap();
}

#[tokio::test]
async fn the_console_talks_and_is_logged() {
    let host = QemuHost::new();
    let machine = start(&host, &spec(&host.disk("boot.raw"))).await;
    wait_for_boot(&machine).await;
    for round in 0..2 {
        let mut console = machine.console().await.unwrap();
        console.write_all(b"H").await.unwrap();
        let mut answer = [0u8];
        tokio::time::timeout(PATIENCE, console.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer, b"I", "round {round}");
    }
    eventually("the answers in the log", || console_text(&machine).ends_with("II")).await;

    machine.rotate_console_log(4).await.unwrap();
    assert_eq!(console_text(&machine), "");
    let older = machine.console_log().with_extension("log.1");
    assert_eq!(std::fs::read_to_string(older).unwrap(), "P\nII");
    machine.console().await.unwrap().write_all(b"A").await.unwrap();
    eventually("the log goes on", || console_text(&machine) == "B").await;
    let traffic = std::fs::read_to_string(host.machine_dir(machine.id()).join("qmp.log")).unwrap();
    assert!(traffic.contains("qmp_capabilities") && traffic.contains("RESUME"), "{traffic}");
}

#[tokio::test]
async fn the_screen_speaks_rfb_and_has_no_listener() {
    let host = QemuHost::new();
    let disk = host.disk("boot.raw");
    let with_screen = MachineSpec { vnc: true, ..spec(&disk) };
    let machine = start(&host, &with_screen).await;
    for _ in 0..2 {
        let mut screen = machine.vnc().await.unwrap();
        let mut version = [0u8; 12];
        tokio::time::timeout(PATIENCE, screen.read_exact(&mut version)).await.unwrap().unwrap();
        assert_eq!(&version, b"RFB 003.008\n");
    }
    let without = start(&host, &spec(&disk)).await;
    assert!(matches!(without.vnc().await, Err(Error::Missing { what: "screen", .. })));
}

#[tokio::test]
async fn the_balloon_answers() {
    let host = QemuHost::new();
    let machine = start(&host, &spec(&host.disk("boot.raw"))).await;
    assert_eq!(machine.balloon().await.unwrap(), 32 << 20);
    machine.set_balloon(16 << 20).await.unwrap();
    let without = start(&host, &MachineSpec { balloon: false, ..spec(&host.disk("b.raw")) }).await;
    assert!(without.balloon().await.is_err());
}

#[tokio::test]
async fn every_bus_boots() {
    let host = QemuHost::new();
    let disk = host.disk("boot.raw");
    let empty = host.dir.path().join("empty.raw");
    std::fs::write(&empty, vec![0u8; 1 << 20]).unwrap();
    let unbootable = DiskSpec { boot_index: Some(2), ..disk_of("data", &empty, DiskBus::Virtio) };
    let e1000 = NicSpec { model: NicModel::E1000, ..nic("lan", Vec::new()) };
    let of = |machine, disks, nics| MachineSpec { machine, disks, nics, ..spec(&disk) };
    let specs = [
        // The boot order decides, not the order of the disks.
        of(
            MachineType::Q35,
            vec![unbootable.clone(), disk_of("root", &disk, DiskBus::Virtio)],
            vec![e1000.clone()],
        ),
        of(MachineType::Q35, vec![unbootable.clone(), disk_of("root", &disk, DiskBus::Sata)], Vec::new()),
        of(
            MachineType::I440fx,
            vec![unbootable.clone(), disk_of("root", &disk, DiskBus::Virtio)],
            vec![nic("lan", Vec::new())],
        ),
        of(MachineType::I440fx, vec![unbootable.clone(), disk_of("root", &disk, DiskBus::Ide)], vec![e1000]),
        of(MachineType::I440fx, vec![unbootable, disk_of("root", &disk, DiskBus::Sata)], Vec::new()),
    ];
    for spec in specs {
        let machine = start(&host, &spec).await;
        wait_for_boot(&machine).await;
        machine.quit().await.unwrap();
    }
}

#[tokio::test]
async fn qcow2_overlays_take_the_writes() {
    let host = QemuHost::new();
    let (base, top) = (host.disk("base.raw"), host.dir.path().join("top.qcow2"));
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&top)
        .arg("1M")
        .status();
    assert!(made.unwrap().success());
    std::fs::set_permissions(&base, PermissionsExt::from_mode(0o444)).unwrap();
    let mut layered = spec(&base);
    layered.disks[0].layers.insert(0, DiskLayer::new(top, DiskFormat::Qcow2));
    let machine = start(&host, &layered).await;
    wait_for_boot(&machine).await;
}

#[tokio::test]
async fn kernels_boot_on_every_machine_type() {
    let host = QemuHost::new();
    let kernel = host.dir.path().join("vmlinuz");
    std::fs::write(&kernel, guest::kernel()).unwrap();
    let disk = host.disk("boot.raw");
    for machine in [MachineType::Q35, MachineType::I440fx, MachineType::Microvm] {
        let boot = KernelBoot { kernel: kernel.clone(), initrd: None, cmdline: "console=ttyS0".into() };
        // microvm with as many devices as it takes.
        let more = (1..=5).map(|n| DiskSpec {
            boot_index: None,
            ..disk_of(&format!("d{n}"), &host.disk(&format!("d{n}")), DiskBus::Virtio)
        });
        let disks = std::iter::once(disk_of("root", &disk, DiskBus::Virtio)).chain(more).collect();
        let nics = if machine == MachineType::Microvm { Vec::new() } else { vec![nic("lan", Vec::new())] };
        let machine =
            start(&host, &MachineSpec { machine, kernel: Some(boot), disks, nics, ..spec(&disk) }).await;
        wait_for_boot(&machine).await;
        machine.quit().await.unwrap();
    }
}

#[tokio::test]
async fn uefi_has_variables_of_its_own() {
    let host = QemuHost::new();
    let vars = host.dir.path().join("vars.fd");
    let firmware = Firmware::Uefi { vars: vars.clone() };
    let uefi = MachineSpec { firmware, memory_bytes: 128 << 20, ..spec(&host.disk("boot.raw")) };
    for machine in [MachineType::Q35, MachineType::I440fx] {
        let machine = start(&host, &MachineSpec { machine, ..uefi.clone() }).await;
        eventually("the firmware's boot menu on the serial port", || {
            console_text(&machine).contains("BdsDxe")
        })
        .await;
        machine.quit().await.unwrap();
        host.hypervisor.forget(uefi.id).await.unwrap();
    }
    assert!(std::fs::metadata(&vars).unwrap().len() > 100_000);
    let nowhere = QemuHost::with(|config| config.firmware_dirs = vec!["/nonexistent".into()]);
    let error = start_error(&nowhere, &uefi).await;
    assert!(error.to_string().contains("apt-get install ovmf"), "{error}");
}

#[tokio::test]
async fn a_save_whose_caller_goes_away_is_undone() {
    let host = QemuHost::new();
    let machine = start(&host, &spec(&host.disk("boot.raw"))).await;
    wait_for_boot(&machine).await;
    let scratch = host.dir.path().join("scratch");
    for after in [0, 1, 3, 10, 30] {
        let state = scratch.join("state");
        let save = machine.save(&state, watch::channel(Progress::default()).0);
        let finished = tokio::time::timeout(Duration::from_millis(after), save).await.is_ok();
        if finished {
            machine.resume().await.unwrap();
            std::fs::remove_file(&state).unwrap();
        }
        let empty = || std::fs::read_dir(&scratch).unwrap().next().is_none();
        eventually("no file is left", empty).await;
        let mut running = false;
        for _ in 0..1000 {
            running = machine.state().await.unwrap() == RunState::Running;
            if running {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(running, "given up after {after} ms");
    }
}

#[tokio::test]
async fn a_hung_qemu_is_found_and_killed() {
    let mut host = QemuHost::with(|config| config.qmp_timeout = Duration::from_millis(300));
    let machine = start(&host, &spec(&host.disk("boot.raw"))).await;
    let (id, pid) = (machine.id(), machine.facts().pid);
    let raw = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(raw, rustix::process::Signal::STOP).unwrap();
    let error = machine.state().await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error:?}");
    drop(machine);
    host.hypervisor = std::sync::Arc::new(QemuHypervisor::new(host.config.clone()));
    let found = host.hypervisor.survey().await.unwrap();
    assert!(matches!(&found[..], [Survey::Unresponsive { pid: found, .. }] if *found == pid), "{found:?}");
    host.hypervisor.kill(id).await.unwrap();
    host.hypervisor.forget(id).await.unwrap();
}

#[tokio::test]
async fn a_damaged_record_does_not_hide_a_machine() {
    let mut host = QemuHost::new();
    let machine = start(&host, &spec(&host.disk("boot.raw"))).await;
    let id = machine.id();
    drop(machine);
    std::fs::write(host.machine_dir(id).join("spec.json"), "{").unwrap();
    host.hypervisor = std::sync::Arc::new(QemuHypervisor::new(host.config.clone()));
    let found = host.hypervisor.survey().await.unwrap();
    assert!(
        matches!(&found[..], [Survey::Unresponsive { reason, .. }] if reason.contains("record")),
        "{found:?}"
    );
    host.hypervisor.kill(id).await.unwrap();
}

#[tokio::test]
async fn long_paths_work_and_nothing_is_left_after_forget() {
    let host = QemuHost::with(|config| {
        let long = config.run_dir.join("x".repeat(120)).join("y".repeat(120));
        config.run_dir = long;
    });
    let machine = start(&host, &spec(&host.disk("boot.raw"))).await;
    wait_for_boot(&machine).await;
    machine.console().await.unwrap();
    machine.quit().await.unwrap();
    host.hypervisor.forget(machine.id()).await.unwrap();
    let left: Vec<_> =
        std::fs::read_dir(&host.config.run_dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["qemu-capabilities.json"]);
}

#[tokio::test]
async fn the_console_log_outlives_a_restart_of_the_machine() {
    let host = QemuHost::new();
    let spec = spec(&host.disk("boot.raw"));
    for boots in 1..=2 {
        let machine = start(&host, &spec).await;
        eventually("another banner", || {
            console_text(&machine).matches(guest::BANNER.trim_end()).count() == boots
        })
        .await;
        machine.quit().await.unwrap();
    }
}
