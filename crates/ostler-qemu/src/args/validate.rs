//! Is a machine well formed, and can its machine type carry it? Checked before anything is touched.

use std::collections::HashSet;
use std::net::IpAddr;

use super::{disks, layout, names};
use crate::error::{DiskError, StartError};
use crate::spec::{
    DiskBus, DiskFormat, DiskLayer, DiskLimits, DiskSpec, Firmware, KernelBoot, MachineSpec, MachineType,
    NicBackend, NicModel, NicSpec, Rate,
};

const MIB: u64 = 1 << 20;
/// What Linux on x86 takes, with its end mark.
const MAX_CMDLINE: usize = 2047;
const MAX_LAYERS: usize = 200;
/// QEMU's, for each limit.
const MAX_RATE: u64 = 1_000_000_000_000_000;

pub fn validate(spec: &MachineSpec) -> Result<(), StartError> {
    if spec.name.is_empty() || spec.name.len() > 253 || spec.name.chars().any(char::is_control) {
        return invalid("name", "must be 1 to 253 bytes without control characters");
    }
    if spec.cpus == 0 || spec.cpus > 255 {
        return invalid("cpus", format!("{} is not between 1 and 255", spec.cpus));
    }
    if spec.memory_bytes < MIB || !spec.memory_bytes.is_multiple_of(MIB) {
        return invalid("memory", format!("{} bytes is not a multiple of 1 MiB", spec.memory_bytes));
    }
    if let Some(model) = &spec.cpu_model {
        cpu_model(model)?;
    }
    if let Some(version) = &spec.machine_version {
        machine_version(spec.machine, version)?;
    }
    if let Some(kernel) = &spec.kernel {
        cmdline(kernel)?;
    }
    all_disks(spec)?;
    nics(spec)?;
    boot_order(spec)?;
    if spec.machine == MachineType::Microvm { microvm(spec) } else { Ok(()) }
}

fn invalid<T>(field: impl Into<String>, reason: impl Into<String>) -> Result<T, StartError> {
    Err(StartError::invalid(field, reason))
}

/// A model's name, then features: `EPYC`, `max,-la57`, `qemu64,+aes,pmu=off`.
fn cpu_model(text: &str) -> Result<(), StartError> {
    let word = |word: &str| {
        !word.is_empty() && word.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c))
    };
    let feature = |part: &str| match part.split_once('=') {
        Some((name, value)) => word(name) && matches!(value, "on" | "off"),
        None => part.strip_prefix(['+', '-']).is_some_and(word),
    };
    let mut parts = text.split(',');
    if text.len() <= 1024 && parts.next().is_some_and(word) && parts.all(feature) {
        Ok(())
    } else {
        invalid(
            "cpu_model",
            format!("{text:?} is no CPU model followed by features such as '+aes' or 'pmu=off'"),
        )
    }
}

fn machine_version(machine: MachineType, version: &str) -> Result<(), StartError> {
    let well_formed = match machine {
        MachineType::Q35 => version.strip_prefix("pc-q35-"),
        MachineType::I440fx => version.strip_prefix("pc-i440fx-"),
        MachineType::Microvm => return microvm_version(version),
    }
    .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'.'));
    if well_formed {
        Ok(())
    } else {
        invalid("machine_version", format!("{version:?} is no version of {machine}"))
    }
}

fn microvm_version(version: &str) -> Result<(), StartError> {
    if version == "microvm" { Ok(()) } else { invalid("machine_version", "microvm has no versions") }
}

fn cmdline(kernel: &KernelBoot) -> Result<(), StartError> {
    if kernel.cmdline.len() > MAX_CMDLINE {
        return invalid(
            "kernel.cmdline",
            format!("{} bytes is over the limit of {MAX_CMDLINE}", kernel.cmdline.len()),
        );
    }
    if kernel.cmdline.chars().any(char::is_control) {
        return invalid("kernel.cmdline", "contains a control character");
    }
    Ok(())
}

fn short_id(field: &str, id: &str) -> Result<(), StartError> {
    let plain = id.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-');
    if id.is_empty() || id.len() > 20 || !plain {
        return invalid(field, format!("id {id:?} must be 1 to 20 of a-z, 0-9 and '-'"));
    }
    Ok(())
}

fn disk_id(id: &str) -> Result<(), StartError> {
    // The root ports are called `disk-portN`.
    if id.strip_prefix("port").is_some_and(|number| number.bytes().all(|c| c.is_ascii_digit())) {
        return invalid("disks", format!("the id '{id}' is taken by a part of the machine: choose another"));
    }
    short_id("disks", id)
}

fn all_disks(spec: &MachineSpec) -> Result<(), StartError> {
    let mut ids = HashSet::new();
    for disk in &spec.disks {
        disk_id(&disk.id)?;
        if !ids.insert(&disk.id) {
            return invalid("disks", format!("two disks have the id '{}'", disk.id));
        }
        one_disk(spec.machine, disk)?;
    }
    let count = |bus| spec.disks.iter().filter(|disk| disk.bus == bus).count();
    let mut places = HashSet::new();
    for (disk, place) in spec.disks.iter().filter_map(|disk| Some((disk, disk.place?))) {
        if !places.insert((disk.bus, place)) {
            return invalid("disks", format!("two {} disks have place {place}", disk.bus));
        }
    }
    disk_room(spec)?;
    for bus in [DiskBus::Virtio, DiskBus::Scsi, DiskBus::Sata, DiskBus::Ide] {
        let limit = layout::disk_places(spec.machine, bus);
        if count(bus) > limit {
            return invalid(
                "disks",
                format!("{} has room for {limit} {bus} disks, not {}", spec.machine, count(bus)),
            );
        }
    }
    Ok(())
}

/// A disk that is plugged into a running machine of this type.
pub(crate) fn hot_disk(machine: MachineType, disk: &DiskSpec) -> Result<(), DiskError> {
    disk_id(&disk.id)?;
    match (machine, disk.bus) {
        (MachineType::Microvm, _) => {
            let reason = "machine type microvm takes no devices while it runs: stop it first".into();
            return Err(DiskError::NotHotPluggable { disk: disk.id.clone(), reason });
        }
        (_, DiskBus::Sata | DiskBus::Ide) => return Err(DiskError::fixed_bus(&disk.id)),
        (MachineType::Q35 | MachineType::I440fx, DiskBus::Virtio | DiskBus::Scsi) => {}
    }
    Ok(one_disk(machine, disk)?)
}

/// A layer that is put on top of a running disk.
pub(crate) fn new_layer(disk: &str, layer: &DiskLayer) -> Result<(), StartError> {
    if layer.format != DiskFormat::Qcow2 {
        return invalid(format!("disks[{disk}]"), "a new layer must be qcow2: raw has no layers below");
    }
    match &layer.name {
        Some(name) => layer_name(disk, name),
        None => invalid(format!("disks[{disk}]"), "a new layer needs a name"),
    }
}

fn layer_name(disk: &str, name: &str) -> Result<(), StartError> {
    let plain = name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_');
    if name.is_empty() || !plain || disk.len() + name.len() > names::MAX_ID_AND_LAYER {
        let reason = format!(
            "layer name {name:?} must be of letters, digits and '_', and with the disk's id at most {} characters",
            names::MAX_ID_AND_LAYER
        );
        return invalid(format!("disks[{disk}]"), reason);
    }
    Ok(())
}

pub(crate) fn limits(disk: &str, limits: &DiskLimits) -> Result<(), StartError> {
    let field = || format!("disks[{disk}].limits");
    let DiskLimits { iops_total, iops_read, iops_write, bps_total, bps_read, bps_write, burst_seconds } =
        *limits;
    let rates = [iops_total, iops_read, iops_write, bps_total, bps_read, bps_write];
    for rate in rates {
        if rate.sustained > MAX_RATE || rate.burst > MAX_RATE {
            return invalid(
                field(),
                format!("{} is over the limit of {MAX_RATE}", rate.sustained.max(rate.burst)),
            );
        }
        if rate.burst > 0 && (rate.sustained == 0 || rate.burst < rate.sustained) {
            return invalid(
                field(),
                format!(
                    "a burst of {} needs a sustained rate that is not higher, not {}",
                    rate.burst, rate.sustained
                ),
            );
        }
    }
    for (name, total, read, write) in
        [("iops", iops_total, iops_read, iops_write), ("bps", bps_total, bps_read, bps_write)]
    {
        if total != Rate::default() && (read != Rate::default() || write != Rate::default()) {
            return invalid(field(), format!("{name}_total excludes {name}_read and {name}_write"));
        }
    }
    if burst_seconds > 0 && rates.iter().all(|rate| rate.burst == 0) {
        return invalid(field(), "burst_seconds needs a burst");
    }
    // What QEMU's buckets hold.
    if rates.iter().any(|rate| rate.burst.saturating_mul(u64::from(burst_seconds)) > MAX_RATE) {
        return invalid(field(), format!("a burst for {burst_seconds} s is more than {MAX_RATE} in all"));
    }
    Ok(())
}

fn disk_room(spec: &MachineSpec) -> Result<(), StartError> {
    let Some(room) = spec.disk_places else { return Ok(()) };
    let least = disks::virtio_places(&spec.disks);
    let most = layout::disk_places(spec.machine, DiskBus::Virtio);
    if !(least..=most).contains(&usize::from(room.virtio)) {
        return invalid(
            "disk_places",
            format!("room for {} virtio disks is not between {least} and {most}", room.virtio),
        );
    }
    if room.scsi && spec.machine == MachineType::Microvm {
        return invalid("disk_places", "microvm has no SCSI controller");
    }
    if !room.scsi && spec.disks.iter().any(|disk| disk.bus == DiskBus::Scsi) {
        return invalid("disk_places", "SCSI disks need a SCSI controller");
    }
    Ok(())
}

fn one_disk(machine: MachineType, disk: &DiskSpec) -> Result<(), StartError> {
    let field = format!("disks[{}]", disk.id);
    match (machine, disk.bus) {
        (MachineType::Q35, DiskBus::Ide) => {
            return invalid(field, "q35 has no IDE controller: use sata, or machine type i440fx");
        }
        (MachineType::Microvm, DiskBus::Scsi | DiskBus::Sata | DiskBus::Ide) => {
            return invalid(field, "microvm has virtio disks only");
        }
        (MachineType::Q35 | MachineType::I440fx, DiskBus::Scsi | DiskBus::Sata)
        | (MachineType::I440fx, DiskBus::Ide)
        | (MachineType::Q35 | MachineType::I440fx | MachineType::Microvm, DiskBus::Virtio) => {}
    }
    if disk.cdrom && disk.bus == DiskBus::Virtio {
        return invalid(field, "a CD-ROM drive needs bus sata, ide or scsi");
    }
    if disk.layers.is_empty() || disk.layers.len() > MAX_LAYERS {
        return invalid(field, format!("has {} layers, not between 1 and {MAX_LAYERS}", disk.layers.len()));
    }
    let above_bottom = &disk.layers[..disk.layers.len() - 1];
    if above_bottom.iter().any(|layer| layer.format == DiskFormat::Raw) {
        return invalid(field, "a raw file can only be the lowest layer");
    }
    if let Some(place) = disk.place {
        let places = layout::disk_places(machine, disk.bus);
        if disks::is_ata(disk.bus) || machine == MachineType::Microvm {
            return invalid(field, format!("disks of bus {} on {machine} take no place number", disk.bus));
        }
        if usize::from(place) >= places {
            return invalid(field, format!("place {place} is not below {places}"));
        }
    }
    let mut names = HashSet::new();
    for layer in &disk.layers {
        let Some(name) = &layer.name else { continue };
        layer_name(&disk.id, name)?;
        if !names.insert(name) {
            return invalid(field, format!("two layers have the name '{name}'"));
        }
    }
    limits(&disk.id, &disk.limits)?;
    if let Some(serial) = &disk.serial
        && (serial.is_empty() || serial.len() > 20 || !serial.bytes().all(|c| c.is_ascii_graphic()))
    {
        return invalid(field, format!("serial {serial:?} must be 1 to 20 printable ASCII characters"));
    }
    Ok(())
}

fn nics(spec: &MachineSpec) -> Result<(), StartError> {
    let (mut ids, mut macs, mut forwarded) = (HashSet::new(), HashSet::new(), HashSet::new());
    for nic in &spec.nics {
        if !macs.insert(nic.mac) {
            return invalid("nics", format!("two NICs have the MAC address {}", nic.mac));
        }
        short_id("nics", &nic.id)?;
        if !ids.insert(&nic.id) {
            return invalid("nics", format!("two NICs have the id '{}'", nic.id));
        }
        if nic.mac.0[0] & 1 == 1 {
            return invalid(format!("nics[{}]", nic.id), format!("{} is a multicast address", nic.mac));
        }
        if spec.machine == MachineType::Microvm && nic.model != NicModel::Virtio {
            return invalid(format!("nics[{}]", nic.id), "microvm has virtio NICs only");
        }
        backend(nic, &mut forwarded)?;
    }
    let limit = layout::capacity(spec.machine).1;
    if spec.nics.len() > limit {
        return invalid(
            "nics",
            format!("{} has room for {limit} NICs, not {}", spec.machine, spec.nics.len()),
        );
    }
    Ok(())
}

fn backend(nic: &NicSpec, forwarded: &mut HashSet<String>) -> Result<(), StartError> {
    let NicBackend::User { forwards, hostname } = &nic.backend else { return Ok(()) };
    let field = format!("nics[{}]", nic.id);
    if let Some(hostname) = hostname {
        let label = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
        };
        if hostname.len() > 253 || !hostname.split('.').all(label) {
            return invalid(
                field,
                format!("host name {hostname:?} is not made of labels of a-z, 0-9 and '-'"),
            );
        }
    }
    for forward in forwards {
        if forward.host_port == 0 || forward.guest_port == 0 {
            return invalid(field, "a forwarded port is 0");
        }
        if matches!(forward.host_addr, IpAddr::V6(_)) {
            return invalid(
                field,
                format!("user-mode networking forwards from IPv4 addresses only, not {}", forward.host_addr),
            );
        }
        if !forwarded.insert(format!("{} {} {}", forward.protocol, forward.host_addr, forward.host_port)) {
            return invalid(
                field,
                format!("{} port {} is forwarded twice", forward.protocol, forward.host_port),
            );
        }
    }
    Ok(())
}

fn boot_order(spec: &MachineSpec) -> Result<(), StartError> {
    let disks = spec.disks.iter().filter_map(|disk| disk.boot_index);
    let mut seen = HashSet::new();
    for index in disks.chain(spec.nics.iter().filter_map(|nic| nic.boot_index)) {
        if !seen.insert(index) {
            return invalid("boot_index", format!("{index} is given twice"));
        }
        if i32::try_from(index).is_err() {
            return invalid("boot_index", format!("{index} is too large"));
        }
    }
    Ok(())
}

fn microvm(spec: &MachineSpec) -> Result<(), StartError> {
    if spec.kernel.is_none() {
        return invalid(
            "kernel",
            "microvm cannot boot from a disk (its firmware finds no virtio-mmio disk): give a kernel, or use q35",
        );
    }
    if spec.firmware != Firmware::Bios {
        return invalid("firmware", "microvm has no UEFI: use bios, or machine type q35");
    }
    if spec.vnc {
        return invalid("vnc", "microvm has no screen: use the serial console, or machine type q35");
    }
    let devices = spec.disks.len() + spec.nics.len() + usize::from(spec.rng) + usize::from(spec.balloon);
    if devices > layout::MAX_MMIO {
        return invalid(
            "disks",
            format!("microvm has room for {} devices in all, not {devices}", layout::MAX_MMIO),
        );
    }
    Ok(())
}
