//! The hypervisor driver: starts, watches, suspends and ends virtual machines on this host.
//!
//! The node agent calls it through two traits, [`Hypervisor`] (the host) and [`Machine`] (one running machine). It
//! knows nothing of the API types, the store or the server. [`QemuHypervisor`] runs real QEMU processes, which outlive
//! the agent; [`SimHypervisor`] keeps thousands of pretended ones in memory. Both pass the suite in `conformance`.

pub mod accel;
pub mod args;
mod config;
#[cfg(feature = "conformance")]
pub mod conformance;
mod disk;
mod error;
mod files;
mod firmware;
mod host;
mod machine;
mod process;
mod qemu;
pub mod qmp;
mod rundir;
mod sim;
mod spec;
mod text;

pub use config::{QemuConfig, QemuUser};
pub use error::{DiskError, Error, QmpError, Result, StartError, describe};
pub use host::{AcceleratorProbe, HostProbe};
pub use machine::{
    ExitReason, ExitReport, Hypervisor, Machine, MachineEvent, MachineFacts, Progress, RunState, Survey,
};
pub use qemu::QemuHypervisor;
pub use sim::{OnPowerdown, SimCapacity, SimGuest, SimHost, SimHypervisor, SimLifetime, SimOperation};
pub use spec::{
    Accelerator, Commit, DiskBus, DiskCache, DiskDiscard, DiskFormat, DiskIo, DiskLayer, DiskLimits,
    DiskPlaces, DiskSpec, DiskState, Firmware, KernelBoot, MacAddress, MacAddressError, MachineSpec,
    MachineType, NicBackend, NicModel, NicSpec, PortForward, PortProtocol, Rate, SnapshotDisk, StartOptions,
    Stream, StreamBase,
};
