//! Plugging a disk into a running machine and taking it out again: the same nodes and devices as at a start, at the
//! first free place.

use std::time::Duration;

use tokio::time::Instant;

use super::{Desk, Signal, next_signal};
use crate::args::{self, DISK_PORT, Throttle, names};
use crate::disk::{DiskBus, DiskSpec};
use crate::error::{DiskError, Error, QmpError, Result};
use crate::qemu::machine::QemuMachine;
use crate::qmp::Connection;
use crate::qmp::block::ObjectInfo;
use crate::qmp::commands::{BlockSetIoThrottle, BlockdevAdd, DeviceAdd, DeviceDel, QomGet, QomList};
use crate::spec::MachineType;

const DEVICES: &str = "/machine/peripheral";
/// A guest that just boots loses a request without a trace; QEMU takes another after five seconds.
const ASK_AGAIN: Duration = Duration::from_secs(5);

impl QemuMachine {
    pub(in crate::qemu) async fn attach_disk(&self, disk: DiskSpec) -> Result<()> {
        let machine = self.machine_type();
        args::hot_disk(machine, &disk)?;
        let desk = self.desk().await?;
        desk.sweep(&disk.id).await?;
        if let Some(there) = desk.find(&disk.id).await? {
            if there.node_name == names::layer_node(&disk, 0) {
                return Ok(desk.limit(there.qdev, &disk).await?);
            }
            return Err(DiskError::OtherAttached { disk: disk.id, top: there.node_name }.into());
        }
        let place = desk.free_place(machine, &disk).await?;
        let plugged = desk.plug(machine, &disk, place).await;
        if plugged.is_err() {
            desk.undo(&disk.id).await;
        }
        plugged
    }

    pub(in crate::qemu) async fn detach_disk(&self, id: &str, patience: Duration) -> Result<()> {
        let desk = self.desk().await?;
        desk.unplug(id, patience).await?;
        desk.end_stream(id).await?;
        desk.sweep(id).await?;
        // Whoever gets an Ok may remove the files.
        let held = desk.nodes().await?.into_iter().filter_map(|node| node.node_name);
        match held.into_iter().find(|node| names::owner(node).is_some_and(|owner| owner.disk == id)) {
            Some(node) => {
                Err(DiskError::Job { disk: id.into(), reason: format!("QEMU still uses '{node}'") }.into())
            }
            None => Ok(()),
        }
    }
}

async fn devices(qmp: &Connection) -> Result<Vec<ObjectInfo>, QmpError> {
    qmp.execute(&QomList { path: DEVICES.into() }).await
}

/// Where a disk is.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) disk: String,
    bus: DiskBus,
    pub(super) number: u16,
}

/// The places of all virtio and SCSI disks.
pub(super) async fn places(qmp: &Connection, machine: MachineType) -> Result<Vec<Place>, QmpError> {
    let devices = devices(qmp).await?;
    disk_places(qmp, machine, &devices).await
}

async fn disk_places(
    qmp: &Connection,
    machine: MachineType,
    devices: &[ObjectInfo],
) -> Result<Vec<Place>, QmpError> {
    let asked = devices.iter().filter_map(|device| {
        let bus = [DiskBus::Virtio, DiskBus::Scsi].into_iter().find(|bus| is_disk(device, *bus))?;
        let disk = names::disk_of_device(&device.name)?.to_owned();
        let property = match (bus, machine) {
            (DiskBus::Scsi, _) => "scsi-id",
            (_, MachineType::Q35) => "parent_bus",
            (_, MachineType::I440fx | MachineType::Microvm) => "addr",
        };
        let path = format!("{DEVICES}/{}", device.name);
        Some((disk, bus, qmp.submit(&QomGet { path, property })))
    });
    let asked: Vec<_> = asked.collect();
    let mut places = Vec::with_capacity(asked.len());
    for (disk, bus, answer) in asked {
        match answer.answer().await {
            Ok(value) => {
                let number = place_number(&value, bus, machine);
                places.extend(number.map(|number| Place { disk, bus, number }));
            }
            // Gone since it was listed.
            Err(QmpError::Refused { .. }) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(places)
}

impl Desk<'_> {
    /// The number of the first free place on the disk's bus.
    async fn free_place(&self, machine: MachineType, disk: &DiskSpec) -> Result<usize> {
        let devices = devices(&self.qmp).await?;
        let no_place = || DiskError::NoPlace { disk: disk.id.clone(), bus: disk.bus };
        if disk.bus == DiskBus::Scsi && !devices.iter().any(|device| device.kind == "child<virtio-scsi-pci>")
        {
            return Err(DiskError::no_scsi(&disk.id).into());
        }
        let taken = disk_places(&self.qmp, machine, &devices).await?;
        let taken = |number| taken.iter().any(|place| place.bus == disk.bus && place.number == number);
        let ports = devices.iter().filter(|device| device.kind == "child<pcie-root-port>");
        let made = match (disk.bus, machine) {
            (DiskBus::Virtio, MachineType::Q35) => {
                ports.filter(|port| port.name.starts_with(DISK_PORT)).count()
            }
            _ => args::disk_places(machine, disk.bus),
        };
        Ok(args::free_place(disk, made, taken).ok_or_else(no_place)?.into())
    }

    async fn plug(&self, machine: MachineType, disk: &DiskSpec, place: usize) -> Result<()> {
        let writes = |layer| layer == 0 && !disk.read_only && !disk.cdrom;
        let files =
            disk.layers.iter().enumerate().map(|(n, layer)| (layer.path.clone(), writes(n))).collect();
        let files = self.open(&disk.id, files).await?;
        let first_set = self.hand_over(files).await?;
        let node = self.qmp.submit(&BlockdevAdd(args::disk_node(disk, first_set)));
        let device = self.qmp.submit(&DeviceAdd(args::hot_device(machine, disk, place)));
        // Both are answered before anything is undone.
        let (node, device) = (node.answer().await, device.answer().await);
        node?;
        device?;
        let there = self.disk(&disk.id).await?;
        let limited = self.limit(there.qdev, disk).await;
        if limited.is_err() {
            // The guest may take its time; the sweep of the next call finds the rest.
            let _ = self.qmp.execute(&DeviceDel { id: names::device(&disk.id) }).await;
        }
        Ok(limited?)
    }

    async fn limit(&self, device: String, disk: &DiskSpec) -> Result<(), QmpError> {
        let throttle: Throttle = args::throttle(device, &disk.limits);
        self.qmp.execute(&BlockSetIoThrottle(throttle)).await.map(drop)
    }

    async fn ask_to_release(&self, device: &str) -> Result<(), QmpError> {
        match self.qmp.execute(&DeviceDel { id: device.to_owned() }).await {
            Ok(_) => Ok(()),
            Err(QmpError::Refused { class, .. }) if class == "DeviceNotFound" => Ok(()),
            // The guest has not answered the last request yet.
            Err(QmpError::Refused { desc, .. }) if desc.contains("already in the process of unplug") => {
                Ok(())
            }
            Err(other) => Err(other),
        }
    }

    /// Asks the guest to let go, and waits.
    async fn unplug(&self, id: &str, patience: Duration) -> Result<()> {
        let device = names::device(id);
        let deadline = Instant::now() + patience;
        let kept = || Error::Disk(DiskError::GuestDidNotRelease { disk: id.to_owned(), after: patience });
        let mut signals = self.machine.signals();
        let found = devices(&self.qmp).await?.into_iter().find(|there| there.name == device);
        if found.is_some_and(|kind| !is_disk(&kind, DiskBus::Virtio) && !is_disk(&kind, DiskBus::Scsi)) {
            return Err(DiskError::fixed_bus(id).into());
        }
        let mut ask_at = Instant::now();
        loop {
            if Instant::now() >= ask_at {
                self.ask_to_release(&device).await?;
                ask_at = Instant::now() + ASK_AGAIN;
            }
            // It leaves the tree of devices a moment before it lets go of its node.
            let in_tree = devices(&self.qmp).await?.iter().any(|there| there.name == device);
            if !in_tree && self.find(id).await?.is_none() {
                return Ok(());
            }
            match tokio::time::timeout_at(deadline, next_signal(&mut signals)).await {
                Err(_) => return Err(kept()),
                Ok(Err(error)) => return Err(error.into()),
                Ok(Ok(Some(Signal::UnplugRefused(refused)))) if refused == device => return Err(kept()),
                Ok(Ok(_)) => {}
            }
        }
    }
}

fn is_disk(device: &ObjectInfo, bus: DiskBus) -> bool {
    let kinds: &[&str] = match bus {
        DiskBus::Virtio => &["child<virtio-blk-pci>"],
        DiskBus::Scsi => &["child<scsi-hd>", "child<scsi-cd>"],
        DiskBus::Sata | DiskBus::Ide => &["child<ide-hd>", "child<ide-cd>"],
    };
    kinds.contains(&device.kind.as_str())
}

/// A disk's number on its bus, from the property that tells of it.
fn place_number(value: &serde_json::Value, bus: DiskBus, machine: MachineType) -> Option<u16> {
    let number = match (bus, machine) {
        (DiskBus::Scsi, _) => usize::try_from(value.as_u64()?).ok(),
        // `/machine/peripheral/disk-port3/disk-port3`
        (_, MachineType::Q35) => value.as_str()?.rsplit('/').next()?.strip_prefix(DISK_PORT)?.parse().ok(),
        // Eight times the slot, and the function.
        (_, MachineType::I440fx | MachineType::Microvm) => {
            args::disk_at_slot(usize::try_from(value.as_u64()? / 8).ok()?)
        }
    };
    u16::try_from(number?).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn places_are_read_from_what_qemu_tells() {
        let q35 = |value| place_number(&value, DiskBus::Virtio, MachineType::Q35);
        assert_eq!(q35(json!("/machine/peripheral/disk-port13/disk-port13")), Some(13));
        assert_eq!(q35(json!("/machine/q35/pcie.0")), None);
        let i440fx = |value| place_number(&value, DiskBus::Virtio, MachineType::I440fx);
        assert_eq!((i440fx(json!(0x08 * 8)), i440fx(json!(0x19 * 8))), (Some(0), Some(9)));
        assert_eq!(i440fx(json!(0x10 * 8)), None);
        assert_eq!(place_number(&json!(7), DiskBus::Scsi, MachineType::Q35), Some(7));
    }
}
