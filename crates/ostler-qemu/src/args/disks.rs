//! A disk as QEMU's block node and device: at a start, and when it is plugged into a running machine.

use std::collections::HashSet;

use super::devices::{
    BlockNode, CacheFlags, Device, DiskProperties, FileNode, IdePlace, NodeProperties, ScsiPlace, Throttle,
};
use super::layout;
use super::names;
use crate::disk::{DiskBus, DiskCache, DiskDiscard, DiskFormat, DiskLimits, DiskPlaces, DiskSpec, Rate};
use crate::spec::{MachineSpec, MachineType};

/// The controller of all SCSI disks; its bus is `scsi.0`.
pub(super) const SCSI_CONTROLLER: &str = "scsi";

/// The device of a virtio or SCSI disk at the nth place of its bus.
pub(crate) fn hot_device(machine: MachineType, disk: &DiskSpec, number: usize) -> Device {
    let properties = disk_properties(disk);
    match (disk.bus, machine) {
        (DiskBus::Scsi, _) => {
            let at = ScsiPlace { bus: format!("{SCSI_CONTROLLER}.0"), scsi_id: number };
            if disk.cdrom {
                Device::CdromScsi { disk: properties, at }
            } else {
                Device::DiskScsi { disk: properties, at }
            }
        }
        (_, MachineType::Q35 | MachineType::I440fx) => {
            Device::DiskPci { disk: properties, at: layout::disk(machine, number) }
        }
        (_, MachineType::Microvm) => Device::DiskMmio { disk: properties },
    }
}

pub(super) fn ide_device(spec: &MachineSpec, disk: &DiskSpec, number_of_ata: usize) -> Device {
    let at = ide_place(spec, disk.bus, number_of_ata);
    let properties = disk_properties(disk);
    if disk.cdrom {
        Device::CdromIde { disk: properties, at }
    } else {
        Device::DiskIde { disk: properties, at }
    }
}

/// The number of each disk on its bus: the one it was given, else the first that is free.
pub(crate) fn places(disks: &[DiskSpec]) -> Vec<usize> {
    let given = disks.iter().filter_map(|disk| Some((disk.bus, usize::from(disk.place?))));
    let mut taken: HashSet<_> = given.collect();
    let place = |disk: &DiskSpec| {
        disk.place.map_or_else(
            || (0..).find(|number| taken.insert((disk.bus, *number))).expect("numbers do not end"),
            usize::from,
        )
    };
    disks.iter().map(place).collect()
}

/// The place of a disk that is plugged in: the one it asks for or the first, if that is free.
pub(crate) fn free_place(disk: &DiskSpec, places: usize, taken: impl Fn(u16) -> bool) -> Option<u16> {
    let end = u16::try_from(places).unwrap_or(u16::MAX);
    let mut wanted = disk.place.map_or(0..end, |place| place..place.saturating_add(1).min(end));
    wanted.find(|number| !taken(*number))
}

/// The room for disks that a machine starts with.
pub(crate) fn made_places(spec: &MachineSpec) -> DiskPlaces {
    let made = layout::places_made(spec.machine, virtio_places(&spec.disks));
    spec.disk_places.unwrap_or_else(|| DiskPlaces {
        virtio: u16::try_from(made).expect("a few dozen"),
        scsi: spec.disks.iter().any(|disk| disk.bus == DiskBus::Scsi),
    })
}

/// Up to where the places of virtio disks are taken.
pub(super) fn virtio_places(disks: &[DiskSpec]) -> usize {
    let numbered = disks.iter().zip(places(disks)).filter(|(disk, _)| disk.bus == DiskBus::Virtio);
    numbered.map(|(_, number)| number + 1).max().unwrap_or(0)
}

pub(super) fn is_ata(bus: DiskBus) -> bool {
    match bus {
        DiskBus::Sata | DiskBus::Ide => true,
        DiskBus::Virtio | DiskBus::Scsi => false,
    }
}

fn ide_place(spec: &MachineSpec, bus: DiskBus, number_of_ata: usize) -> IdePlace {
    // Disks of the other bus do not take places on this one.
    let number = spec
        .disks
        .iter()
        .filter(|disk| is_ata(disk.bus))
        .take(number_of_ata)
        .filter(|disk| disk.bus == bus)
        .count();
    match (bus, spec.machine) {
        (DiskBus::Ide, _) => IdePlace { bus: format!("ide.{}", number / 2), unit: Some(number % 2) },
        (_, MachineType::Q35) => IdePlace { bus: format!("ide.{number}"), unit: None },
        (_, MachineType::I440fx | MachineType::Microvm) => {
            IdePlace { bus: format!("ahci.{number}"), unit: None }
        }
    }
}

fn disk_properties(disk: &DiskSpec) -> DiskProperties {
    let stop = (!disk.cdrom).then_some("stop");
    DiskProperties {
        id: names::device(&disk.id),
        drive: names::layer_node(disk, 0),
        serial: disk.serial.clone(),
        bootindex: disk.boot_index,
        write_cache: match disk.cache {
            DiskCache::Writethrough => Some("off"),
            DiskCache::Writeback | DiskCache::None => None,
        },
        werror: stop,
        rerror: stop,
    }
}

/// How the nodes of one disk are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeOptions {
    pub(crate) direct: bool,
    pub(crate) discard: DiskDiscard,
}

impl NodeOptions {
    fn of(disk: &DiskSpec) -> Self {
        Self { direct: disk.cache == DiskCache::None, discard: disk.discard }
    }
}

/// All layers of a disk, whose files are the descriptor sets from `first_set` on.
pub(crate) fn disk_node(disk: &DiskSpec, first_set: u32) -> BlockNode {
    let options = NodeOptions::of(disk);
    let mut below: Option<Box<BlockNode>> = None;
    let numbered = disk.layers.iter().zip(first_set..).enumerate();
    for (layer, (described, set)) in numbered.collect::<Vec<_>>().into_iter().rev() {
        let name = names::layer_node(disk, layer);
        let read_only = layer > 0 || disk.read_only || disk.cdrom;
        below = Some(Box::new(layer_node(&name, described.format, set, read_only, options, below)));
    }
    *below.expect("a validated disk has a layer")
}

/// One layer, over nothing or over what is given.
pub(crate) fn layer_node(
    name: &str,
    format: DiskFormat,
    set: u32,
    read_only: bool,
    options: NodeOptions,
    backing: Option<Box<BlockNode>>,
) -> BlockNode {
    let node = properties(name, read_only, options);
    let file = file_node(name, set, options.direct);
    match format {
        DiskFormat::Raw => BlockNode::Raw { node, file },
        DiskFormat::Qcow2 => BlockNode::Qcow2 { node, file, backing },
    }
}

pub(super) fn firmware_node(name: &str, set: u32, read_only: bool) -> BlockNode {
    // Firmware is flash to the guest: zeroes in it are data.
    let options = NodeOptions { direct: false, discard: DiskDiscard::Ignore };
    let node = NodeProperties { discard: None, detect_zeroes: None, ..properties(name, read_only, options) };
    BlockNode::Raw { node, file: file_node(name, set, false) }
}

fn properties(name: &str, read_only: bool, options: NodeOptions) -> NodeProperties {
    // QEMU takes "unmap" for zeroes only together with "unmap" for discards.
    let (discard, zeroes) = match options.discard {
        DiskDiscard::Unmap => ("unmap", "unmap"),
        DiskDiscard::Ignore => ("ignore", "on"),
    };
    NodeProperties {
        node_name: name.to_owned(),
        read_only,
        discard: (!read_only).then_some(discard),
        detect_zeroes: (!read_only).then_some(zeroes),
        cache: CacheFlags { direct: options.direct, no_flush: false },
    }
}

fn file_node(name: &str, set: u32, direct: bool) -> FileNode {
    FileNode {
        driver: "file",
        node_name: names::file_of(name),
        filename: format!("/dev/fdset/{set}"),
        locking: "off",
        // Linux AIO waits where a file is in the page cache.
        aio: direct.then_some("native"),
        cache: direct.then_some(CacheFlags { direct, no_flush: false }),
    }
}

/// The limits of a disk as QEMU takes them. `device` is what it calls the disk's end of the connection.
pub(crate) fn throttle(device: String, limits: &DiskLimits) -> Throttle {
    let seconds =
        |rate: Rate| (rate.burst > 0 && limits.burst_seconds > 1).then_some(u64::from(limits.burst_seconds));
    let burst = |rate: Rate| (rate.burst > 0).then_some(rate.burst);
    let DiskLimits { iops_total, iops_read, iops_write, bps_total, bps_read, bps_write, burst_seconds: _ } =
        *limits;
    Throttle {
        id: device,
        iops: iops_total.sustained,
        iops_rd: iops_read.sustained,
        iops_wr: iops_write.sustained,
        bps: bps_total.sustained,
        bps_rd: bps_read.sustained,
        bps_wr: bps_write.sustained,
        iops_max: burst(iops_total),
        iops_rd_max: burst(iops_read),
        iops_wr_max: burst(iops_write),
        bps_max: burst(bps_total),
        bps_rd_max: burst(bps_read),
        bps_wr_max: burst(bps_write),
        iops_max_length: seconds(iops_total),
        iops_rd_max_length: seconds(iops_read),
        iops_wr_max_length: seconds(iops_write),
        bps_max_length: seconds(bps_total),
        bps_rd_max_length: seconds(bps_read),
        bps_wr_max_length: seconds(bps_write),
    }
}

/// What QEMU calls the disk's end in `block_set_io_throttle`: the device that does the block I/O, which for virtio on PCI
/// is inside the one that was plugged in.
pub(super) fn throttled_device(machine: MachineType, disk: &DiskSpec) -> String {
    let device = names::device(&disk.id);
    match (disk.bus, machine) {
        (DiskBus::Virtio, MachineType::Q35 | MachineType::I440fx) => {
            format!("/machine/peripheral/{device}/virtio-backend")
        }
        (DiskBus::Virtio, MachineType::Microvm) | (DiskBus::Scsi | DiskBus::Sata | DiskBus::Ide, _) => device,
    }
}
