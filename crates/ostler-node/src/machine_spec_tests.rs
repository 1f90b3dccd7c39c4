//! What each kind of VM becomes, as golden text.

use ostler_api::image::ImageUse;
use ostler_api::metadata::Metadata;
use ostler_api::vm::{KernelBoot, Power, VmDisk, VmSpec, VmStatus};
use ostler_api::vm_phase::VmPhase;
use ostler_api::{AcceleratorWish, ByteSize, ImageId, Name};
use uuid::Uuid;

use super::*;

fn volume(number: u128) -> VolumeId {
    VolumeId(Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0000 + number))
}

fn vm() -> Vm {
    let mut metadata = Metadata::new(Uuid::from_u128(0x42), Name::new("web-1").unwrap(), None);
    metadata.revision = 7;
    let nic = VmNic {
        mac: "52:54:00:12:34:56".into(),
        model: NicModel::Virtio,
        publish: vec!["2222:22".parse().unwrap(), "0.0.0.0:53:53/udp".parse().unwrap()],
    };
    Vm {
        metadata,
        spec: VmSpec {
            cpus: 2,
            memory: ByteSize::mib(512),
            machine: MachineType::Q35,
            firmware: Firmware::Bios,
            accelerator: AcceleratorWish::Auto,
            kernel: None,
            disks: vec![
                VmDisk { volume: volume(1), bus: DiskBus::Virtio, owned: true },
                VmDisk { volume: volume(2), bus: DiskBus::Sata, owned: true },
            ],
            cdrom: None,
            nics: vec![nic],
            node_selector: Default::default(),
            node: None,
            power: Power::Running,
        },
        status: VmStatus {
            phase: VmPhase::Starting,
            reason: None,
            node: None,
            task: None,
            observed: None,
            node_silent: false,
        },
    }
}

fn layer(path: &str, format: ImageFormat) -> Layer {
    Layer { path: path.into(), format }
}

fn disk(layers: Vec<Layer>) -> DiskParts {
    DiskParts {
        layers,
        limits: DiskLimits::default(),
        cache: DiskCache::Writeback,
        discard: DiskDiscard::Unmap,
    }
}

fn parts() -> Parts {
    let root = vec![
        layer("/pool/volumes/1.qcow2", ImageFormat::Qcow2),
        layer("/pool/images/a.raw", ImageFormat::Raw),
    ];
    Parts {
        disks: vec![disk(root), disk(vec![layer("/pool/volumes/2.qcow2", ImageFormat::Qcow2)])],
        kernel: None,
        initrd: None,
        cdrom: None,
        uefi_vars: "/data/vms/42/uefi-vars.fd".into(),
        accelerator: Accelerator::Tcg,
        hardware: None,
        saved_disks: None,
    }
}

fn image() -> ImageUse {
    ImageUse {
        image: ImageId(Uuid::from_u128(9)),
        sha256: "0".repeat(64),
        format: ostler_api::image::ImageFormat::Raw,
        virtual_size: ByteSize::mib(1),
    }
}

#[test]
fn a_vm_that_boots_from_its_disk() {
    insta::assert_debug_snapshot!(machine_spec(&vm(), &parts()).unwrap());
}

#[test]
fn uefi_with_a_cd_on_recorded_hardware() {
    let mut vm = vm();
    vm.spec.firmware = Firmware::Uefi;
    vm.spec.cdrom = Some(image());
    let hardware = Hardware {
        machine_version: "pc-q35-7.1".into(),
        cpu_model: "max".into(),
        accelerator: Accelerator::Tcg,
    };
    let parts = Parts {
        cdrom: Some(layer("/pool/images/cd.raw", ImageFormat::Raw)),
        hardware: Some(hardware.clone()),
        ..parts()
    };
    insta::assert_debug_snapshot!(machine_spec(&vm, &parts).unwrap());

    // Another accelerator: the machine stays the same, the CPU model cannot.
    let moved = Parts { accelerator: Accelerator::Kvm, ..parts };
    let spec = machine_spec(&vm, &moved).unwrap();
    assert_eq!((spec.machine_version.as_deref(), spec.cpu_model), (Some("pc-q35-7.1"), None));
}

#[test]
fn microvm_boots_a_kernel() {
    let mut vm = vm();
    vm.spec.machine = MachineType::Microvm;
    vm.spec.disks.truncate(1);
    vm.spec.cdrom = Some(image());
    vm.spec.kernel =
        Some(KernelBoot { kernel: image(), initrd: Some(image()), cmdline: "console=ttyS0 quiet".into() });
    let parts = Parts {
        disks: parts().disks.into_iter().take(1).collect(),
        kernel: Some("/pool/images/kernel.raw".into()),
        initrd: Some("/pool/images/initrd.raw".into()),
        cdrom: Some(layer("/pool/images/cd.raw", ImageFormat::Raw)),
        ..parts()
    };
    insta::assert_debug_snapshot!(machine_spec(&vm, &parts).unwrap());
}

#[test]
fn what_cannot_be_expressed_is_refused() {
    let mut bad_mac = vm();
    bad_mac.spec.nics[0].mac = "nonsense".into();
    assert!(matches!(machine_spec(&bad_mac, &parts()), Err(SpecError::Mac(_))));
    let mut bad_format = parts();
    bad_format.disks[0].layers[0].format = ImageFormat::Vmdk;
    assert!(matches!(machine_spec(&vm(), &bad_format), Err(SpecError::Format { .. })));
}

fn boot_order(vm: &Vm, parts: &Parts) -> Vec<Option<u32>> {
    machine_spec(vm, parts).unwrap().disks.iter().map(|disk| disk.boot_index).collect()
}

#[test]
fn the_disks_boot_before_the_cd() {
    let parts = Parts { cdrom: Some(layer("/cd", ImageFormat::Raw)), ..parts() };
    assert_eq!(boot_order(&vm(), &parts), [Some(0), Some(1), Some(2)]);
}

/// QEMU refuses to start when a disk claims the place of the kernel's loader.
#[test]
fn beside_a_kernel_nothing_is_in_the_boot_order() {
    for machine in [MachineType::Q35, MachineType::I440fx, MachineType::Microvm] {
        let mut vm = vm();
        vm.spec.machine = machine;
        vm.spec.kernel = Some(KernelBoot { kernel: image(), initrd: None, cmdline: String::new() });
        let cdrom = Some(layer("/cd", ImageFormat::Raw));
        let parts = Parts { kernel: Some("/vmlinuz".into()), cdrom, ..parts() };
        assert_eq!(boot_order(&vm, &parts), [None, None, None]);
    }
}

#[test]
fn how_a_disk_behaves_is_told_to_the_machine() {
    let mut parts = parts();
    parts.disks[1].cache = DiskCache::None;
    parts.disks[1].discard = DiskDiscard::Ignore;
    parts.disks[1].limits =
        DiskLimits { iops_read: 10, iops_burst: 30, bps: 5, burst_seconds: 2, ..DiskLimits::default() };
    let spec = machine_spec(&vm(), &parts).unwrap();
    assert!(spec.disks[0].limits.is_none());
    let disk = &spec.disks[1];
    assert_eq!((disk.cache, disk.discard), (qemu::DiskCache::None, qemu::DiskDiscard::Ignore));
    let limits = disk.limits;
    assert_eq!((limits.iops_read.sustained, limits.iops_read.burst), (10, 30));
    assert_eq!((limits.iops_write.burst, limits.bps_total.sustained, limits.burst_seconds), (0, 5, 2));
}
