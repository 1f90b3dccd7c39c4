//! The disks of a simulated machine. No file is opened: a layer is its name, a disk its size.

use std::ops::Range;
use std::time::Duration;

use super::host::Inner;
use crate::args::{self, names};
use crate::disk::{
    Commit, DiskBus, DiskIo, DiskLayer, DiskLimits, DiskPlaces, DiskSpec, DiskState, SnapshotDisk,
};
use crate::error::DiskError;
use crate::spec::{MachineSpec, MachineType};

const USUAL_SIZE: u64 = 1 << 30;

#[derive(Debug, Default)]
pub(super) struct SimDisks {
    /// By id.
    disks: Vec<SimDisk>,
    pub(super) room: DiskPlaces,
}

#[derive(Debug)]
struct SimDisk {
    id: Box<str>,
    bus: DiskBus,
    read_only: bool,
    /// The top first.
    layers: Vec<Option<Box<str>>>,
    size: u64,
    place: u16,
    /// None for no limits, as most have.
    limits: Option<Box<DiskLimits>>,
}

fn layer_name(layer: &DiskLayer) -> Option<Box<str>> {
    layer.name.as_deref().map(Box::from)
}

fn boxed(limits: DiskLimits) -> Option<Box<DiskLimits>> {
    (!limits.is_none()).then(|| Box::new(limits))
}

impl SimDisk {
    fn of(host: &Inner, spec: &DiskSpec, place: usize) -> Self {
        let size = spec.layers.first().and_then(|layer| host.file_size(&layer.path));
        Self {
            id: spec.id.as_str().into(),
            bus: spec.bus,
            read_only: spec.read_only || spec.cdrom,
            layers: spec.layers.iter().map(layer_name).collect(),
            size: size.unwrap_or(USUAL_SIZE),
            place: u16::try_from(place).unwrap_or(u16::MAX),
            limits: boxed(spec.limits),
        }
    }

    fn top(&self) -> Option<&str> {
        self.layers.first()?.as_deref()
    }

    fn node_name(&self) -> String {
        match self.top() {
            Some(layer) => names::named_node(&self.id, layer),
            None => format!("blk-{}", self.id),
        }
    }

    fn state(&self) -> DiskState {
        DiskState {
            id: self.id.to_string(),
            top: self.top().map(str::to_owned),
            node_name: self.node_name(),
            virtual_size: self.size,
            read_only: self.read_only,
            limits: self.limits.as_deref().copied().unwrap_or_default(),
            place: match self.bus {
                DiskBus::Virtio | DiskBus::Scsi => Some(self.place),
                DiskBus::Sata | DiskBus::Ide => None,
            },
            io: DiskIo::Ok,
        }
    }
}

impl SimDisks {
    pub(super) fn of(host: &Inner, spec: &MachineSpec) -> Self {
        let numbered = spec.disks.iter().zip(args::places(&spec.disks));
        let mut disks: Vec<_> = numbered.map(|(disk, place)| SimDisk::of(host, disk, place)).collect();
        disks.sort_by(|a, b| a.id.cmp(&b.id));
        Self { disks, room: args::made_places(spec) }
    }

    pub(super) fn states(&self) -> Vec<DiskState> {
        self.disks.iter().map(SimDisk::state).collect()
    }

    fn position(&self, id: &str) -> Result<usize, usize> {
        self.disks.binary_search_by(|disk| (*disk.id).cmp(id))
    }

    fn disk(&mut self, id: &str) -> Result<&mut SimDisk, DiskError> {
        match self.position(id) {
            Ok(at) => Ok(&mut self.disks[at]),
            Err(_) => Err(DiskError::NotAttached { disk: id.to_owned() }),
        }
    }

    fn writable(&mut self, id: &str) -> Result<&mut SimDisk, DiskError> {
        let disk = self.disk(id)?;
        if disk.read_only { Err(DiskError::ReadOnly { disk: id.to_owned() }) } else { Ok(disk) }
    }

    pub(super) fn attach(
        &mut self,
        host: &Inner,
        machine: MachineType,
        spec: DiskSpec,
    ) -> Result<(), DiskError> {
        args::hot_disk(machine, &spec)?;
        let at = match self.position(&spec.id) {
            Ok(at) => {
                let there = &mut self.disks[at];
                if there.node_name() != names::layer_node(&spec, 0) {
                    return Err(DiskError::OtherAttached { disk: spec.id, top: there.node_name() });
                }
                there.limits = boxed(spec.limits);
                return Ok(());
            }
            Err(at) => at,
        };
        if spec.bus == DiskBus::Scsi && !self.room.scsi {
            return Err(DiskError::no_scsi(&spec.id));
        }
        let places = match spec.bus {
            DiskBus::Virtio => self.room.virtio.into(),
            DiskBus::Scsi | DiskBus::Sata | DiskBus::Ide => args::disk_places(machine, spec.bus),
        };
        let taken: Vec<_> =
            self.disks.iter().filter(|disk| disk.bus == spec.bus).map(|disk| disk.place).collect();
        let Some(place) = args::free_place(&spec, places, |number| taken.contains(&number)) else {
            return Err(DiskError::NoPlace { disk: spec.id, bus: spec.bus });
        };
        self.disks.insert(at, SimDisk::of(host, &spec, place.into()));
        Ok(())
    }

    pub(super) fn detach(&mut self, id: &str, releases: bool, after: Duration) -> Result<(), DiskError> {
        let Ok(at) = self.position(id) else { return Ok(()) };
        match self.disks[at].bus {
            DiskBus::Sata | DiskBus::Ide => return Err(DiskError::fixed_bus(id)),
            DiskBus::Virtio if !releases => {
                return Err(DiskError::GuestDidNotRelease { disk: id.to_owned(), after });
            }
            DiskBus::Virtio | DiskBus::Scsi => {}
        }
        self.disks.remove(at);
        Ok(())
    }

    pub(super) fn resize(&mut self, id: &str, bytes: u64) -> Result<(), DiskError> {
        let from = self.disk(id)?.size;
        if bytes < from {
            return Err(DiskError::Shrink { disk: id.to_owned(), from, to: bytes });
        }
        if !bytes.is_multiple_of(512) {
            let reason = format!("{bytes} bytes is not a multiple of 512");
            return Err(DiskError::invalid(format!("disks[{id}].size"), reason));
        }
        self.writable(id)?.size = bytes;
        Ok(())
    }

    pub(super) fn limit(&mut self, id: &str, limits: DiskLimits) -> Result<(), DiskError> {
        args::limits(id, &limits)?;
        self.disk(id)?.limits = boxed(limits);
        Ok(())
    }

    pub(super) fn snapshot(&mut self, host: &Inner, wanted: &[SnapshotDisk]) -> Result<(), DiskError> {
        let mut in_place = 0;
        for (number, new) in wanted.iter().enumerate() {
            args::new_layer(&new.id, &new.overlay)?;
            if wanted[..number].iter().any(|earlier| earlier.id == new.id) {
                return Err(DiskError::invalid("disks", format!("'{}' is given twice", new.id)));
            }
            in_place += usize::from(self.disk(&new.id)?.top() == new.overlay.name.as_deref());
        }
        if in_place == wanted.len() {
            return Ok(());
        }
        for new in wanted {
            if in_place > 0 && self.disk(&new.id)?.top() != new.overlay.name.as_deref() {
                return Err(DiskError::PartOfSnapshot { disk: new.id.clone() });
            }
        }
        for new in wanted {
            let size = self.writable(&new.id)?.size;
            let overlay = host.file_size(&new.overlay.path).unwrap_or(size);
            if overlay != size {
                return Err(DiskError::SizeDiffers { disk: new.id.clone(), size, overlay });
            }
        }
        for new in wanted {
            self.disk(&new.id)?.layers.insert(0, layer_name(&new.overlay));
        }
        Ok(())
    }

    /// How much there is to copy, if the merge can begin.
    pub(super) fn check_commit(&mut self, id: &str, commit: &Commit) -> Result<u64, DiskError> {
        let disk = self.writable(id)?;
        merged(disk, commit)?;
        Ok(disk.size)
    }

    pub(super) fn commit(&mut self, id: &str, commit: &Commit) -> Result<(), DiskError> {
        let disk = self.writable(id)?;
        let gone = merged(disk, commit)?;
        disk.layers.drain(gone);
        Ok(())
    }

    /// How much there is to copy, if the stream can begin.
    pub(super) fn check_stream(&mut self, id: &str, base: Option<&str>) -> Result<u64, DiskError> {
        let disk = self.writable(id)?;
        stream_end(disk, base)?;
        Ok(disk.size)
    }

    pub(super) fn stream(&mut self, id: &str, base: Option<&str>) -> Result<(), DiskError> {
        let disk = self.writable(id)?;
        let end = stream_end(disk, base)?;
        disk.layers.drain(1..end);
        Ok(())
    }
}

/// The layers that go.
fn merged(disk: &SimDisk, commit: &Commit) -> Result<Range<usize>, DiskError> {
    let find = |name: &str| disk.layers.iter().position(|layer| layer.as_deref() == Some(name));
    let missing = |name: &str| DiskError::NoLayer { disk: disk.id.to_string(), layer: name.to_owned() };
    let into = commit.into.name.as_deref().unwrap_or_default();
    let end = find(into).ok_or_else(|| missing(into))?;
    match find(&commit.layer) {
        // Merged before.
        None => Ok(end..end),
        Some(from) if from > 0 && from < end => Ok(from..end),
        Some(_) => Err(missing(&commit.layer)),
    }
}

/// The first layer that stays below the top.
fn stream_end(disk: &SimDisk, base: Option<&str>) -> Result<usize, DiskError> {
    let Some(base) = base else { return Ok(disk.layers.len()) };
    let below = disk.layers.iter().skip(1).position(|layer| layer.as_deref() == Some(base));
    let missing = || DiskError::NoLayer { disk: disk.id.to_string(), layer: base.to_owned() };
    below.map(|at| at + 1).ok_or_else(missing)
}
