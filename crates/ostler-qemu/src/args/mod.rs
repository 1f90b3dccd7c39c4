//! A machine's launch plan, computed without touching anything: the command line, the descriptors QEMU inherits, and
//! the devices that are plugged in over QMP while the virtual CPUs still stand.
//!
//! Called by `qemu::launch`, and by the golden tests, which compare it with the texts in `tests/golden`. What always
//! holds: no value that a user chose can become an option of its own, and every file reaches QEMU as a descriptor.

mod devices;
mod disks;
mod escape;
mod layout;
pub(crate) mod names;
mod plan;
mod validate;

pub use devices::{
    BlockNode, CacheFlags, Device, DiskProperties, FileNode, IdePlace, Netdev, NetdevString, NicProperties,
    NodeProperties, PciAddress, ScsiPlace, Throttle,
};
pub(crate) use disks::{
    NodeOptions, disk_node, free_place, hot_device, layer_node, made_places, places, throttle,
};
pub use escape::escape_commas;
pub(crate) use layout::{DISK_PORT, disk_at_slot, disk_places};
pub(crate) use plan::FIRST_DISK_SET;
pub use plan::{FIRST_FD, FdUse, HostFacts, LaunchPlan, Limits, plan};
pub use validate::validate;
pub(crate) use validate::{hot_disk, limits, new_layer};
