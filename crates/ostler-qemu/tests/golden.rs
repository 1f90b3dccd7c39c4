//! Launch plans compared with the texts in `tests/golden`. To accept a change: `OSTLER_ACCEPT=1 cargo nextest run -p
//! ostler-qemu --test golden`, then read the difference.

use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ostler_qemu::args::{FIRST_FD, HostFacts, LaunchPlan, Limits, plan, validate};
use ostler_qemu::*;
use uuid::Uuid;

fn base(machine: MachineType, accelerator: Accelerator) -> MachineSpec {
    MachineSpec {
        id: Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0001),
        name: "web-1".into(),
        machine,
        machine_version: None,
        accelerator,
        cpu_model: None,
        cpus: 2,
        memory_bytes: 256 << 20,
        firmware: Firmware::Bios,
        kernel: None,
        disks: Vec::new(),
        disk_places: None,
        nics: Vec::new(),
        rng: true,
        balloon: true,
        vnc: false,
    }
}

fn layer(name: &str, format: DiskFormat) -> DiskLayer {
    DiskLayer::new(PathBuf::from("/pool").join(name), format)
}

fn disk(id: &str, bus: DiskBus, boot_index: Option<u32>) -> DiskSpec {
    DiskSpec {
        id: id.into(),
        layers: vec![layer("top.qcow2", DiskFormat::Qcow2), layer("base.raw", DiskFormat::Raw)],
        bus,
        serial: Some(format!("serial-{id}")),
        boot_index,
        ..DiskSpec::default()
    }
}

fn cdrom(id: &str, bus: DiskBus) -> DiskSpec {
    DiskSpec {
        layers: vec![layer("seed.iso", DiskFormat::Raw)],
        cdrom: true,
        serial: None,
        ..disk(id, bus, None)
    }
}

fn user_nic(id: &str, model: NicModel, boot_index: Option<u32>) -> NicSpec {
    NicSpec {
        id: id.into(),
        mac: "52:54:00:00:00:01".parse().unwrap(),
        model,
        backend: NicBackend::User {
            forwards: vec![PortForward {
                protocol: PortProtocol::Tcp,
                host_addr: "127.0.0.1".parse().unwrap(),
                host_port: 2222,
                guest_port: 22,
            }],
            hostname: Some("web-1".into()),
        },
        boot_index,
    }
}

fn tap_nic(id: &str) -> NicSpec {
    let fd = Arc::new(OwnedFd::from(File::open("/dev/null").unwrap()));
    let mac = "52:54:00:00:00:02".parse().unwrap();
    NicSpec { mac, backend: NicBackend::Tap { fd }, ..user_nic(id, NicModel::Virtio, None) }
}

fn kernel() -> KernelBoot {
    KernelBoot {
        kernel: "/images/vmlinuz".into(),
        initrd: Some("/images/initrd".into()),
        cmdline: "console=ttyS0 root=/dev/vda,x".into(),
    }
}

fn uefi() -> Firmware {
    Firmware::Uefi { vars: "/vm/vars.fd".into() }
}

fn show(spec: &MachineSpec, restore: bool) -> String {
    validate(spec).unwrap();
    let facts = HostFacts {
        machine_version: match spec.machine {
            MachineType::Q35 => "pc-q35-7.2",
            MachineType::I440fx => "pc-i440fx-7.2",
            MachineType::Microvm => "microvm",
        }
        .into(),
        cpu_model: if spec.accelerator == Accelerator::Kvm { "host" } else { "max" }.into(),
        tcg_tb_size_mib: 64,
        restore,
    };
    let LaunchPlan { args, inherit, limits } = plan(spec, &facts);
    let mut text = String::new();
    for arg in args {
        let arg = arg.into_string().unwrap();
        // An option on a line with its value.
        text += if arg.starts_with('-') { "\n" } else { " " };
        text += &arg;
    }
    text = text.trim_start().to_owned() + "\n\ninherits\n";
    for (fd, source) in (FIRST_FD..).zip(inherit) {
        writeln!(text, "{fd} {source:?}").unwrap();
    }
    for Limits { throttle, .. } in limits {
        writeln!(text, "\nblock_set_io_throttle {}", serde_json::to_string(&throttle).unwrap()).unwrap();
    }
    text
}

fn check(name: &str, spec: &MachineSpec) {
    check_start(name, spec, false);
}

fn check_start(name: &str, spec: &MachineSpec, restore: bool) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.txt"));
    let now = show(spec, restore);
    if std::env::var_os("OSTLER_ACCEPT").is_some() {
        std::fs::write(&path, &now).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(now == golden, "{} differs; the plan is now:\n{now}", path.display());
}

#[test]
fn q35_bios_virtio_disk_and_nic() {
    check(
        "q35-bios-tcg",
        &MachineSpec {
            disks: vec![disk("root", DiskBus::Virtio, Some(1)), disk("data", DiskBus::Virtio, None)],
            nics: vec![user_nic("lan", NicModel::Virtio, None), tap_nic("wan")],
            ..base(MachineType::Q35, Accelerator::Tcg)
        },
    );
}

#[test]
fn q35_uefi_sata_cdrom_and_screen() {
    check(
        "q35-uefi-kvm-sata",
        &MachineSpec {
            firmware: uefi(),
            disks: vec![disk("root", DiskBus::Sata, Some(1)), cdrom("seed", DiskBus::Sata)],
            nics: vec![user_nic("lan", NicModel::E1000, Some(2))],
            vnc: true,
            ..base(MachineType::Q35, Accelerator::Kvm)
        },
    );
}

#[test]
fn q35_kernel() {
    check(
        "q35-kernel-tcg",
        &MachineSpec {
            kernel: Some(kernel()),
            disks: vec![DiskSpec { read_only: true, ..disk("root", DiskBus::Virtio, None) }],
            ..base(MachineType::Q35, Accelerator::Tcg)
        },
    );
}

#[test]
fn disks_of_all_kinds() {
    let named = |id: &str, bus| {
        let layers = vec![
            layer("top.qcow2", DiskFormat::Qcow2).named("0123456789ab"),
            layer("base.raw", DiskFormat::Raw).named("ba9876543210"),
        ];
        DiskSpec { layers, serial: None, ..disk(id, bus, None) }
    };
    let limits = DiskLimits {
        iops_total: Rate { sustained: 500, burst: 1000 },
        bps_read: Rate::sustained(1 << 20),
        burst_seconds: 5,
        ..DiskLimits::default()
    };
    check(
        "q35-disks",
        &MachineSpec {
            disks: vec![
                DiskSpec { cache: DiskCache::None, limits, ..named("disk0", DiskBus::Virtio) },
                DiskSpec { cache: DiskCache::Writethrough, limits, ..named("disk1", DiskBus::Scsi) },
                DiskSpec { discard: DiskDiscard::Ignore, ..named("disk2", DiskBus::Scsi) },
                cdrom("cd0", DiskBus::Scsi),
                DiskSpec { limits, ..disk("disk3", DiskBus::Sata, None) },
            ],
            ..base(MachineType::Q35, Accelerator::Tcg)
        },
    );
}

fn with_two(spec: &MachineSpec, a: DiskSpec, b: DiskSpec) -> MachineSpec {
    MachineSpec { disks: vec![a, b], ..spec.clone() }
}

#[test]
fn layer_names_limits_and_places_are_checked() {
    let q35 = base(MachineType::Q35, Accelerator::Tcg);
    let of = |disk: DiskSpec| MachineSpec { disks: vec![disk], ..q35.clone() };
    let named = |name: &str| {
        let top = layer("top.qcow2", DiskFormat::Qcow2).named(name);
        of(DiskSpec { layers: vec![top], ..disk("disk0", DiskBus::Virtio, None) })
    };
    validate(&named(&"x".repeat(21))).unwrap();
    for bad in ["", "a-b", "a.b", &"x".repeat(22)] {
        assert!(refused(&named(bad)).contains("layer name"), "{bad}");
    }
    let limited = |limits| of(DiskSpec { limits, ..disk("disk0", DiskBus::Virtio, None) });
    let rate = |sustained, burst| Rate { sustained, burst };
    let none = DiskLimits::default();
    let cases = [
        (DiskLimits { iops_total: rate(1, 0), iops_read: rate(1, 0), ..none }, "excludes"),
        (DiskLimits { bps_write: rate(0, 5), ..none }, "needs a sustained rate"),
        (DiskLimits { bps_write: rate(6, 5), ..none }, "needs a sustained rate"),
        (DiskLimits { bps_write: rate(6, 0), burst_seconds: 2, ..none }, "needs a burst"),
        (DiskLimits { bps_total: rate(u64::MAX, 0), ..none }, "over the limit"),
    ];
    for (limits, why) in cases {
        let said = refused(&limited(limits));
        assert!(said.contains(why), "{said:?} does not say {why:?}");
    }
    let placed = |id: &str, bus, place| DiskSpec { place: Some(place), ..disk(id, bus, None) };
    let two = with_two(&q35, placed("a", DiskBus::Scsi, 3), placed("b", DiskBus::Scsi, 3));
    assert!(refused(&two).contains("have place 3"));
    validate(&with_two(&q35, placed("a", DiskBus::Scsi, 3), placed("b", DiskBus::Virtio, 3))).unwrap();
    assert!(refused(&of(placed("a", DiskBus::Virtio, 24))).contains("not below 24"));
    assert!(refused(&of(placed("a", DiskBus::Sata, 0))).contains("take no place"));
    let room = |virtio, scsi| MachineSpec {
        disk_places: Some(DiskPlaces { virtio, scsi }),
        ..of(placed("a", DiskBus::Virtio, 9))
    };
    validate(&room(10, true)).unwrap();
    assert!(refused(&room(9, true)).contains("not between 10 and 24"));
    assert!(refused(&of(disk("port3", DiskBus::Virtio, None))).contains("choose another"));
}

#[test]
fn q35_restore() {
    let spec = MachineSpec {
        disks: vec![disk("root", DiskBus::Virtio, Some(1))],
        rng: false,
        balloon: false,
        ..base(MachineType::Q35, Accelerator::Kvm)
    };
    check_start("q35-restore-kvm", &spec, true);
}

#[test]
fn i440fx_bios_ide_sata_and_e1000() {
    check(
        "i440fx-bios-tcg-ide",
        &MachineSpec {
            disks: vec![
                disk("root", DiskBus::Ide, Some(1)),
                disk("more", DiskBus::Sata, None),
                cdrom("seed", DiskBus::Ide),
                cdrom("tools", DiskBus::Ide),
            ],
            nics: vec![user_nic("lan", NicModel::E1000, None)],
            vnc: true,
            ..base(MachineType::I440fx, Accelerator::Tcg)
        },
    );
}

#[test]
fn i440fx_uefi_virtio() {
    check(
        "i440fx-uefi-kvm",
        &MachineSpec {
            firmware: uefi(),
            kernel: Some(KernelBoot { initrd: None, ..kernel() }),
            disks: vec![disk("root", DiskBus::Virtio, Some(1))],
            nics: vec![user_nic("lan", NicModel::Virtio, None)],
            ..base(MachineType::I440fx, Accelerator::Kvm)
        },
    );
}

#[test]
fn microvm_kernel() {
    let spec = MachineSpec {
        kernel: Some(kernel()),
        disks: vec![disk("root", DiskBus::Virtio, None)],
        nics: vec![user_nic("lan", NicModel::Virtio, None), tap_nic("wan")],
        ..base(MachineType::Microvm, Accelerator::Tcg)
    };
    check("microvm-kernel-tcg", &spec);
    check("microvm-kernel-kvm", &MachineSpec { accelerator: Accelerator::Kvm, ..spec });
}

#[test]
fn a_name_cannot_become_an_option() {
    let spec = MachineSpec { name: "a,process=b -S".into(), ..base(MachineType::Q35, Accelerator::Tcg) };
    let text = show(&spec, false);
    assert!(text.contains("-name guest=a,,process=b -S,debug-threads=on"), "{text}");
}

fn refused(spec: &MachineSpec) -> String {
    match validate(spec) {
        Err(StartError::Invalid { field, reason }) => format!("{field}: {reason}"),
        other => panic!("{other:?} of {spec:?}"),
    }
}

#[test]
fn what_a_machine_type_cannot_carry_is_refused_with_the_way_out() {
    let q35 = base(MachineType::Q35, Accelerator::Tcg);
    let microvm = MachineSpec { kernel: Some(kernel()), ..base(MachineType::Microvm, Accelerator::Tcg) };
    let with_disks = |of: &MachineSpec, disks: Vec<DiskSpec>| MachineSpec { disks, ..of.clone() };
    let with_nic =
        |nic: NicSpec| MachineSpec { nics: vec![user_nic("a", NicModel::Virtio, None), nic], ..q35.clone() };
    let many = |bus, count: usize| (0..count).map(|n| disk(&format!("d{n}"), bus, None)).collect::<Vec<_>>();
    let cases = [
        (with_disks(&q35, vec![disk("root", DiskBus::Ide, None)]), "use sata"),
        (with_disks(&q35, vec![cdrom("cd", DiskBus::Virtio)]), "needs bus sata, ide or scsi"),
        (with_disks(&q35, many(DiskBus::Sata, 7)), "room for 6 sata disks, not 7"),
        (with_disks(&q35, many(DiskBus::Virtio, 25)), "room for 24 virtio disks, not 25"),
        (
            with_disks(&q35, vec![disk("a", DiskBus::Virtio, Some(1)), disk("b", DiskBus::Virtio, Some(1))]),
            "given twice",
        ),
        (
            with_disks(&q35, vec![disk("a", DiskBus::Virtio, None), disk("a", DiskBus::Virtio, None)]),
            "two disks",
        ),
        (with_disks(&q35, vec![disk("A,b", DiskBus::Virtio, None)]), "a-z, 0-9"),
        (
            with_disks(&q35, vec![DiskSpec { layers: Vec::new(), ..disk("a", DiskBus::Virtio, None) }]),
            "0 layers",
        ),
        (
            with_disks(
                &q35,
                vec![DiskSpec {
                    layers: vec![layer("x", DiskFormat::Raw), layer("y", DiskFormat::Raw)],
                    ..disk("a", DiskBus::Virtio, None)
                }],
            ),
            "lowest layer",
        ),
        (with_disks(&microvm, vec![disk("root", DiskBus::Sata, None)]), "virtio disks only"),
        (MachineSpec { kernel: None, ..microvm.clone() }, "give a kernel, or use q35"),
        (MachineSpec { firmware: uefi(), ..microvm.clone() }, "no UEFI"),
        (MachineSpec { vnc: true, ..microvm.clone() }, "no screen"),
        (
            MachineSpec { nics: vec![user_nic("lan", NicModel::E1000, None)], ..microvm.clone() },
            "virtio NICs only",
        ),
        (with_disks(&microvm, many(DiskBus::Virtio, 7)), "room for 8 devices in all, not 9"),
        (MachineSpec { machine_version: Some("pc-i440fx-7.2".into()), ..q35.clone() }, "no version of q35"),
        (MachineSpec { cpus: 256, ..q35.clone() }, "256"),
        (MachineSpec { memory_bytes: 1000, ..q35.clone() }, "1000 bytes"),
        (
            MachineSpec { kernel: Some(KernelBoot { cmdline: "a\nb".into(), ..kernel() }), ..q35.clone() },
            "control character",
        ),
        (with_nic(user_nic("b", NicModel::Virtio, None)), "the MAC address 52:54:00:00:00:01"),
        (
            with_nic(NicSpec {
                mac: "52:54:00:00:00:02".parse().unwrap(),
                ..user_nic("b", NicModel::Virtio, None)
            }),
            "forwarded twice",
        ),
    ];
    for (spec, why) in cases {
        let said = refused(&spec);
        assert!(said.contains(why), "{said:?} does not say {why:?}");
    }
}

#[test]
fn cpu_models_take_features_and_nothing_else() {
    let with = |model: &str| MachineSpec {
        cpu_model: Some(model.into()),
        ..base(MachineType::Q35, Accelerator::Tcg)
    };
    for good in ["max", "EPYC-v2", "qemu64,+aes,-svm,pmu=off"] {
        validate(&with(good)).unwrap();
    }
    for bad in ["", "max,", "max,file=/etc/passwd", "max -S", "max,pmu=off=on", "+aes"] {
        refused(&with(bad));
    }
}
