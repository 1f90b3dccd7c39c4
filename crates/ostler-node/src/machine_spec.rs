//! From a VM as the API describes it to a machine as the driver starts it. Pure; the paths and the accelerator are
//! decided by the caller.

use std::path::PathBuf;

use ostler_api::disk::{DiskCache, DiskDiscard, DiskLimits};
use ostler_api::vm::{DiskBus, Firmware, MachineType, NicModel, Protocol, Vm, VmDisk, VmNic};
use ostler_api::{Accelerator, VolumeId};
use ostler_qemu as qemu;
use ostler_storage::{ImageFormat, Layer};
use uuid::Uuid;

use crate::record::{Hardware, SavedDisks};

/// What the host adds to a VM's spec.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    /// The files of each disk, in the order of the spec's disks, top layer first.
    pub(crate) disks: Vec<DiskParts>,
    pub(crate) kernel: Option<PathBuf>,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cdrom: Option<Layer>,
    pub(crate) uefi_vars: PathBuf,
    pub(crate) accelerator: Accelerator,
    /// What the VM was started with before.
    pub(crate) hardware: Option<Hardware>,
    /// Where its disks were when its memory was saved that is to be restored.
    pub(crate) saved_disks: Option<SavedDisks>,
}

/// What a disk is made of, beside how the VM has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskParts {
    pub(crate) layers: Vec<Layer>,
    pub(crate) limits: DiskLimits,
    pub(crate) cache: DiskCache,
    pub(crate) discard: DiskDiscard,
}

/// A part of a VM cannot be expressed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SpecError {
    #[error("{0}")]
    Mac(#[from] qemu::MacAddressError),
    #[error("{} is stored as {format}; only raw and qcow2 can be run", path.display())]
    Format { path: PathBuf, format: ImageFormat },
}

pub(crate) fn machine_spec(vm: &Vm, parts: &Parts) -> Result<qemu::MachineSpec, SpecError> {
    let microvm = vm.spec.machine == MachineType::Microvm;
    let accelerator = accelerator(parts.accelerator);
    // A kernel is what boots; QEMU gives its loader the first place and refuses a second one in it.
    let in_boot_order = vm.spec.kernel.is_none();
    let mut disks = Vec::with_capacity(parts.disks.len() + 1);
    for (index, (disk, made_of)) in (0u32..).zip(vm.spec.disks.iter().zip(&parts.disks)) {
        let mut spec = disk_spec(disk, made_of, in_boot_order.then_some(index))?;
        spec.place = parts.saved_disks.as_ref().and_then(|saved| saved.places.get(&spec.id).copied());
        disks.push(spec);
    }
    if let Some(image) = &parts.cdrom {
        disks.push(qemu::DiskSpec {
            id: "cd0".to_owned(),
            layers: vec![disk_layer(image)?],
            bus: match vm.spec.machine {
                MachineType::Q35 => qemu::DiskBus::Sata,
                MachineType::I440fx => qemu::DiskBus::Ide,
                MachineType::Microvm => qemu::DiskBus::Virtio,
            },
            read_only: true,
            cdrom: !microvm,
            // Behind the disks: a blank one falls through to the CD, an installed one does not install again.
            boot_index: u32::try_from(parts.disks.len()).ok().filter(|_| in_boot_order),
            ..qemu::DiskSpec::default()
        });
    }
    let nics = vm.spec.nics.iter().enumerate();
    let nics = nics.map(|(index, nic)| nic_spec(index, nic, vm)).collect::<Result<_, _>>()?;
    let kernel = vm.spec.kernel.as_ref().zip(parts.kernel.clone());
    Ok(qemu::MachineSpec {
        id: vm.metadata.id,
        name: vm.metadata.name.to_string(),
        machine: match vm.spec.machine {
            MachineType::Q35 => qemu::MachineType::Q35,
            MachineType::I440fx => qemu::MachineType::I440fx,
            MachineType::Microvm => qemu::MachineType::Microvm,
        },
        machine_version: parts.hardware.as_ref().map(|hardware| hardware.machine_version.clone()),
        accelerator,
        // `host` is a model of KVM's and `max` means another thing there: a model stays with its accelerator.
        cpu_model: parts
            .hardware
            .as_ref()
            .filter(|hardware| hardware.accelerator == parts.accelerator)
            .map(|hardware| hardware.cpu_model.clone()),
        cpus: vm.spec.cpus,
        memory_bytes: vm.spec.memory.bytes(),
        firmware: match vm.spec.firmware {
            Firmware::Bios => qemu::Firmware::Bios,
            Firmware::Uefi => qemu::Firmware::Uefi { vars: parts.uefi_vars.clone() },
        },
        kernel: kernel.map(|(boot, path)| qemu::KernelBoot {
            kernel: path,
            initrd: parts.initrd.clone(),
            cmdline: boot.cmdline.clone(),
        }),
        disks,
        disk_places: parts.saved_disks.as_ref().map(|saved| saved.room),
        nics,
        rng: true,
        balloon: true,
        vnc: !microvm,
    })
}

fn nic_spec(index: usize, nic: &VmNic, vm: &Vm) -> Result<qemu::NicSpec, SpecError> {
    let forwards = nic.publish.iter().map(|publish| qemu::PortForward {
        protocol: match publish.protocol {
            Protocol::Tcp => qemu::PortProtocol::Tcp,
            Protocol::Udp => qemu::PortProtocol::Udp,
        },
        host_addr: publish.host_addr,
        host_port: publish.host_port,
        guest_port: publish.guest_port,
    });
    Ok(qemu::NicSpec {
        id: format!("nic{index}"),
        mac: nic.mac.parse()?,
        model: match nic.model {
            NicModel::Virtio => qemu::NicModel::Virtio,
            NicModel::E1000 => qemu::NicModel::E1000,
        },
        backend: qemu::NicBackend::User {
            forwards: forwards.collect(),
            hostname: Some(vm.metadata.name.to_string()),
        },
        boot_index: None,
    })
}

/// A disk as it is started with and as it is plugged in: the same, so that a machine can be asked for it by name.
pub(crate) fn disk_spec(
    disk: &VmDisk,
    parts: &DiskParts,
    boot_index: Option<u32>,
) -> Result<qemu::DiskSpec, SpecError> {
    Ok(qemu::DiskSpec {
        id: disk_id(disk.volume),
        layers: parts.layers.iter().map(disk_layer).collect::<Result<_, _>>()?,
        bus: disk_bus(disk.bus),
        serial: Some(serial(disk.volume)),
        boot_index,
        cache: match parts.cache {
            DiskCache::Writeback => qemu::DiskCache::Writeback,
            DiskCache::None => qemu::DiskCache::None,
            DiskCache::Writethrough => qemu::DiskCache::Writethrough,
        },
        discard: match parts.discard {
            DiskDiscard::Unmap => qemu::DiskDiscard::Unmap,
            DiskDiscard::Ignore => qemu::DiskDiscard::Ignore,
        },
        limits: disk_limits(&parts.limits),
        ..qemu::DiskSpec::default()
    })
}

/// A burst belongs to each limit that there is.
pub(crate) fn disk_limits(limits: &DiskLimits) -> qemu::DiskLimits {
    let rate =
        |sustained: u64, burst: u64| qemu::Rate { sustained, burst: if sustained > 0 { burst } else { 0 } };
    let DiskLimits {
        iops,
        iops_read,
        iops_write,
        bps,
        bps_read,
        bps_write,
        iops_burst,
        bps_burst,
        burst_seconds,
    } = *limits;
    qemu::DiskLimits {
        iops_total: rate(iops, iops_burst),
        iops_read: rate(iops_read, iops_burst),
        iops_write: rate(iops_write, iops_burst),
        bps_total: rate(bps, bps_burst),
        bps_read: rate(bps_read, bps_burst),
        bps_write: rate(bps_write, bps_burst),
        burst_seconds,
    }
}

/// What a disk is called in the machine: its volume, however many disks come and go around it.
pub(crate) fn disk_id(volume: VolumeId) -> String {
    format!("v{}", tail(volume.0))
}

/// What QEMU calls a layer.
pub(crate) fn layer_name(layer: Uuid) -> String {
    tail(layer)
}

/// What QEMU calls a file of a disk: a layer, or the image below them all. An image's name is no hexadecimal number, so it is
/// never a layer's.
pub(crate) fn node_name(layer: &Layer) -> Option<String> {
    let image = || {
        let sha256 = layer.path.file_stem()?.to_str()?;
        Some(format!("i{}", sha256.get(..12)?))
    };
    layer.id().map(layer_name).or_else(image)
}

/// The last twelve digits, which are random.
fn tail(id: Uuid) -> String {
    id.simple().to_string().split_off(20)
}

pub(crate) fn disk_layer(layer: &Layer) -> Result<qemu::DiskLayer, SpecError> {
    let format = match layer.format {
        ImageFormat::Raw => qemu::DiskFormat::Raw,
        ImageFormat::Qcow2 => qemu::DiskFormat::Qcow2,
        ImageFormat::Vmdk | ImageFormat::Vdi | ImageFormat::Vhdx => {
            return Err(SpecError::Format { path: layer.path.clone(), format: layer.format });
        }
    };
    Ok(qemu::DiskLayer { path: layer.path.clone(), format, name: node_name(layer) })
}

fn disk_bus(bus: DiskBus) -> qemu::DiskBus {
    match bus {
        DiskBus::Virtio => qemu::DiskBus::Virtio,
        DiskBus::Sata => qemu::DiskBus::Sata,
        DiskBus::Ide => qemu::DiskBus::Ide,
    }
}

/// What the guest sees of the volume's id: the end, which is the random part, in the 20 characters there are.
fn serial(volume: VolumeId) -> String {
    volume.0.simple().to_string().split_off(12)
}

pub(crate) fn accelerator(accelerator: Accelerator) -> qemu::Accelerator {
    match accelerator {
        Accelerator::Kvm => qemu::Accelerator::Kvm,
        Accelerator::Tcg => qemu::Accelerator::Tcg,
    }
}

pub(crate) fn accelerator_back(accelerator: qemu::Accelerator) -> Accelerator {
    match accelerator {
        qemu::Accelerator::Kvm => Accelerator::Kvm,
        qemu::Accelerator::Tcg => Accelerator::Tcg,
    }
}

/// The storage driver's name for a format of the API's.
pub(crate) fn image_format(format: ostler_api::image::ImageFormat) -> ImageFormat {
    use ostler_api::image::ImageFormat as Api;
    match format {
        Api::Raw => ImageFormat::Raw,
        Api::Qcow2 => ImageFormat::Qcow2,
        Api::Vmdk => ImageFormat::Vmdk,
        Api::Vdi => ImageFormat::Vdi,
        Api::Vhdx => ImageFormat::Vhdx,
    }
}

#[cfg(test)]
#[path = "machine_spec_tests.rs"]
mod tests;
