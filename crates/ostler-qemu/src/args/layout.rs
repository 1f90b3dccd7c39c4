//! Where devices sit on the guest's PCI bus. The place depends only on the device's kind and its number among its kind,
//! so it is the same at every start and on every host, as restoring and migrating a machine need.
//!
//! | | q35 (`pcie.0`) | i440fx (`pci.0`) |
//! |---|---|---|
//! | screen, rng, balloon, AHCI, USB, SCSI | 01, 04, 05, –, 07, 0c | 02, 03, 04, 05, 06, 07 |
//! | virtio disks | root ports 02.0–7, then 08, 09 | 08–0f, then 18–1c |
//! | NICs | root ports 03.0–7, then 0a, 0b | 10–17 |

use super::devices::{Device, PciAddress};
use crate::spec::{DiskBus, MachineType};

pub(super) const MAX_SATA: usize = 6;
pub(super) const MAX_IDE: usize = 4;
pub(super) const MAX_SCSI: usize = 64;
/// Root ports for disks are this with a number.
pub(crate) const DISK_PORT: &str = "disk-port";
/// What microvm has virtio-mmio places for.
pub(super) const MAX_MMIO: usize = 8;

#[derive(Clone, Copy)]
pub(super) enum Fixed {
    Screen,
    Rng,
    Balloon,
    Ahci,
    Usb,
    Scsi,
}

/// How many virtio disks and how many NICs fit.
pub(super) fn capacity(machine: MachineType) -> (usize, usize) {
    match machine {
        MachineType::Q35 => (24, 24),
        MachineType::I440fx => (13, 8),
        MachineType::Microvm => (MAX_MMIO, MAX_MMIO),
    }
}

/// How many places for disks of a hot-pluggable bus there are at most.
pub(crate) fn disk_places(machine: MachineType, bus: DiskBus) -> usize {
    match bus {
        DiskBus::Virtio => capacity(machine).0,
        DiskBus::Scsi => MAX_SCSI,
        DiskBus::Sata => MAX_SATA,
        DiskBus::Ide => MAX_IDE,
    }
}

pub(super) fn fixed(machine: MachineType, device: Fixed) -> PciAddress {
    let q35 = machine == MachineType::Q35;
    let slot = match device {
        Fixed::Screen if q35 => 1,
        Fixed::Rng if q35 => 4,
        Fixed::Balloon if q35 => 5,
        Fixed::Ahci if q35 => 6,
        Fixed::Usb if q35 => 7,
        Fixed::Scsi if q35 => 0x0c,
        Fixed::Screen => 2,
        Fixed::Rng => 3,
        Fixed::Balloon => 4,
        Fixed::Ahci => 5,
        Fixed::Usb => 6,
        Fixed::Scsi => 7,
    };
    PciAddress::new(if q35 { "pcie.0" } else { "pci.0" }, slot, 0)
}

pub(super) fn disk(machine: MachineType, number: usize) -> PciAddress {
    match machine {
        MachineType::Q35 => PciAddress::new(format!("{DISK_PORT}{number}"), 0, 0),
        MachineType::I440fx | MachineType::Microvm => {
            PciAddress::new("pci.0", if number < 8 { 0x08 + number } else { 0x18 + number - 8 }, 0)
        }
    }
}

/// Which of i440fx's disk places a slot is.
pub(crate) fn disk_at_slot(slot: usize) -> Option<usize> {
    match slot {
        0x08..0x10 => Some(slot - 0x08),
        0x18..0x1d => Some(slot - 0x18 + 8),
        _ => None,
    }
}

pub(super) fn nic(machine: MachineType, number: usize) -> PciAddress {
    match machine {
        MachineType::Q35 => PciAddress::new(format!("nic-port{number}"), 0, 0),
        MachineType::I440fx | MachineType::Microvm => PciAddress::new("pci.0", 0x10 + number, 0),
    }
}

/// How many places for virtio disks a machine has that started with this many taken.
pub(super) fn places_made(machine: MachineType, disks: usize) -> usize {
    match machine {
        MachineType::Q35 => with_spare(disks).min(capacity(machine).0),
        MachineType::I440fx | MachineType::Microvm => capacity(machine).0,
    }
}

fn with_spare(used: usize) -> usize {
    (used + 2).next_multiple_of(8)
}

/// q35's places for hot-plugging: so many for disks, and for NICs in eights with at least two to spare.
pub(super) fn root_ports(disk_places: usize, nics: usize) -> Vec<Device> {
    let mut ports = group(DISK_PORT, disk_places, [0x02, 0x08, 0x09], 0);
    ports.extend(group("nic-port", with_spare(nics), [0x03, 0x0a, 0x0b], 100));
    ports
}

fn group(name: &str, count: usize, slots: [usize; 3], first_chassis: usize) -> Vec<Device> {
    let count = count.min(slots.len() * 8);
    (0..count)
        .map(|number| Device::PcieRootPort {
            id: format!("{name}{number}"),
            at: PciAddress::new("pcie.0", slots[number / 8], number % 8),
            chassis: first_chassis + number + 1,
            multifunction: number % 8 == 0,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_two_devices_share_a_place() {
        for machine in [MachineType::Q35, MachineType::I440fx] {
            let (disks, nics) = capacity(machine);
            let mut places = HashSet::new();
            let mut take =
                |at: PciAddress| assert!(places.insert(format!("{at:?}")), "{at:?} is taken twice");
            for device in [Fixed::Screen, Fixed::Rng, Fixed::Balloon, Fixed::Ahci, Fixed::Usb, Fixed::Scsi] {
                take(fixed(machine, device));
            }
            (0..disks).for_each(|number| take(disk(machine, number)));
            (0..nics).for_each(|number| take(nic(machine, number)));
            if machine == MachineType::Q35 {
                let mut chassis_seen = HashSet::new();
                for port in root_ports(disks, nics) {
                    let Device::PcieRootPort { at, chassis, .. } = port else { panic!("{port:?}") };
                    take(at);
                    assert!(chassis_seen.insert(chassis));
                }
            }
        }
    }

    #[test]
    fn there_are_ports_to_spare() {
        let all = |disks, nics| root_ports(places_made(MachineType::Q35, disks), nics).len();
        assert_eq!(all(0, 0), 16);
        assert_eq!(all(6, 7), 24);
        assert_eq!(all(24, 24), 48);
    }
}
