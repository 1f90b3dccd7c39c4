//! VMs: what is wanted, what is, and the requests that change it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::image::ImageUse;
use crate::metadata::Labels;
use crate::resource::{resource, words};
use crate::vm_action::VmTask;
use crate::vm_phase::VmPhase;
use crate::{Accelerator, AcceleratorWish, ByteSize, Fault, Metadata, Name, Time, VolumeId};

pub const CPUS_MAX: u32 = 255;
pub const MEMORY_MIN: ByteSize = ByteSize::mib(16);
pub const MEMORY_MAX: ByteSize = ByteSize::gib(4096);
pub const CMDLINE_MAX: usize = 2047;
pub const PUBLISH_MAX: usize = 64;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    pub metadata: Metadata,
    pub spec: VmSpec,
    pub status: VmStatus,
}

resource!(Vm, Vm, project: true, phase: |vm| vm.status.phase.as_str(), node: |vm| vm.status.node.as_ref().map(Name::as_str));

words! {
    /// QEMU's machine: `q35` (PCIe, the default), `i440fx` (older guests), `microvm` (least, direct kernel boot only).
    MachineType { Q35 => "q35", I440fx => "i440fx", Microvm => "microvm" }
}

words! {
    /// What starts first in the guest.
    Firmware {
        /// SeaBIOS.
        Bios => "bios",
        /// OVMF, with variables of the VM's own.
        Uefi => "uefi",
    }
}

words! {
    /// How a disk is attached; `sata` and `ide` for guests without virtio drivers.
    DiskBus { Virtio => "virtio", Sata => "sata", Ide => "ide" }
}

words! {
    /// The network card the guest sees; `e1000` for guests without virtio drivers.
    NicModel { Virtio => "virtio", E1000 => "e1000" }
}

words! {
    /// The power state that is wanted.
    Power { Running => "running", Stopped => "stopped", Paused => "paused", Suspended => "suspended" }
}

words! {
    Protocol { Tcp => "tcp", Udp => "udp" }
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmSpec {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: ByteSize,
    pub machine: MachineType,
    pub firmware: Firmware,
    pub accelerator: AcceleratorWish,
    /// Boot this kernel directly and not from a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<KernelBoot>,
    #[serde(default)]
    pub disks: Vec<VmDisk>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cdrom: Option<ImageUse>,
    #[serde(default)]
    pub nics: Vec<VmNic>,
    /// Only nodes with these labels.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub node_selector: Labels,
    /// Only this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Name>,
    pub power: Power,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KernelBoot {
    pub kernel: ImageUse,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<ImageUse>,
    /// The kernel's command line.
    #[serde(default)]
    pub cmdline: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDisk {
    pub volume: VolumeId,
    pub bus: DiskBus,
    /// Deleted with the VM.
    pub owned: bool,
}

/// A network card on QEMU's user-mode network: NAT to the outside, in by published ports only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmNic {
    /// `52:54:xx:xx:xx:xx`, a locally administered address; stays for the VM's life.
    pub mac: String,
    pub model: NicModel,
    #[serde(default)]
    pub publish: Vec<Publish>,
}

/// A port of the node that leads to one of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    #[serde(default = "Publish::protocol_default")]
    pub protocol: Protocol,
    /// Address on the node; loopback when not given.
    #[serde(default = "Publish::host_addr_default")]
    #[schema(value_type = String)]
    pub host_addr: IpAddr,
    pub host_port: u16,
    pub guest_port: u16,
}

impl Publish {
    const fn protocol_default() -> Protocol {
        Protocol::Tcp
    }
    const fn host_addr_default() -> IpAddr {
        IpAddr::V4(std::net::Ipv4Addr::LOCALHOST)
    }
}

impl std::fmt::Display for Publish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host_addr {
            IpAddr::V4(addr) => write!(f, "{addr}:{}:{}", self.host_port, self.guest_port)?,
            IpAddr::V6(addr) => write!(f, "[{addr}]:{}:{}", self.host_port, self.guest_port)?,
        }
        match self.protocol {
            Protocol::Tcp => Ok(()),
            Protocol::Udp => f.write_str("/udp"),
        }
    }
}

impl std::str::FromStr for Publish {
    type Err = String;

    /// `[ADDR:]HOST_PORT:GUEST_PORT[/udp]`, an IPv6 address in brackets.
    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || format!("{text:?} is not [ADDR:]HOST_PORT:GUEST_PORT[/tcp|/udp]");
        let (ports, protocol) = match text.split_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, word)) => (ports, word.parse().map_err(|_| fail())?),
        };
        let (rest, guest_port) = ports.rsplit_once(':').ok_or_else(fail)?;
        let (addr, host_port) = match rest.rsplit_once(':') {
            None => (Self::host_addr_default(), rest),
            Some((addr, port)) => {
                let addr = addr.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(addr);
                (addr.parse().map_err(|_| fail())?, port)
            }
        };
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0).ok_or_else(fail);
        Ok(Self { protocol, host_addr: addr, host_port: port(host_port)?, guest_port: port(guest_port)? })
    }
}

/// What is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmStatus {
    /// Worked out from everything below by one function.
    pub phase: VmPhase,
    /// Why it is in `error`, `unknown` or waiting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Fault>,
    /// The node it is placed on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Name>,
    /// What is being done with it now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<VmTask>,
    /// What its node saw last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed: Option<VmObserved>,
    /// Set while its node does not report.
    #[serde(default)]
    pub node_silent: bool,
}

words! {
    /// What the node sees of a VM, read from QEMU and the host.
    MachineState {
        /// No process and no saved memory.
        Absent => "absent",
        /// Its process exists and the guest does not run yet.
        Starting => "starting",
        Running => "running",
        Paused => "paused",
        /// The guest's disk reported an error or is full; the guest waits.
        IoError => "io_error",
        /// The guest's kernel panicked.
        Panicked => "panicked",
        /// No process; its memory is in a file.
        Saved => "saved",
        /// There is a process that does not answer.
        Unresponsive => "unresponsive",
    }
}

words! {
    /// Why a machine that ran is absent.
    EndCause {
        /// Ended by a task.
        Asked => "asked",
        /// The guest powered itself off.
        GuestShutdown => "guest_shutdown",
        /// The process died.
        Died => "died",
        /// The host was restarted.
        HostRestarted => "host_restarted",
    }
}

/// One report of the node about one VM; `generation` grows with each, so that an old one is known as such.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmObserved {
    pub generation: u64,
    pub state: MachineState,
    pub at: Time,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<EndCause>,
    /// Why the state is not as wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<Fault>,
    /// What it was started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<MachineFacts>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MachineFacts {
    /// One start to the next end: a new id each time.
    pub boot: Uuid,
    /// QEMU's process id on the node.
    pub pid: u32,
    /// The versioned machine type, such as `pc-q35-7.2`.
    pub machine_version: String,
    pub accelerator: Accelerator,
    pub cpu_model: String,
    pub started: Time,
}

/// A new VM. Sizes are bytes. With no `image`, `snapshot`, `kernel` or `cdrom` there is nothing to boot, and it is refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmCreate {
    pub name: Name,
    #[serde(default)]
    pub labels: Labels,
    #[serde(default = "VmCreate::cpus_default")]
    pub cpus: u32,
    #[serde(default = "VmCreate::memory_default")]
    pub memory: ByteSize,
    /// Image (name or id) of the root disk.
    #[serde(default)]
    pub image: Option<String>,
    /// Snapshot (name or id): each of its disks becomes a disk of the VM, as a linked copy.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// Size of the root disk; at least the image's, which is the default. Without an image: a blank disk.
    #[serde(default)]
    pub disk: Option<ByteSize>,
    #[serde(default = "VmCreate::disk_bus_default")]
    pub disk_bus: DiskBus,
    /// Image of a kernel to boot directly.
    #[serde(default)]
    pub kernel: Option<String>,
    #[serde(default)]
    pub initrd: Option<String>,
    #[serde(default)]
    pub cmdline: Option<String>,
    /// Image in the CD-ROM drive.
    #[serde(default)]
    pub cdrom: Option<String>,
    #[serde(default = "VmCreate::machine_default")]
    pub machine: MachineType,
    #[serde(default = "VmCreate::firmware_default")]
    pub firmware: Firmware,
    #[serde(default = "VmCreate::accelerator_default")]
    pub accelerator: AcceleratorWish,
    #[serde(default = "VmCreate::nic_model_default")]
    pub nic_model: NicModel,
    #[serde(default)]
    pub publish: Vec<Publish>,
    #[serde(default)]
    pub node: Option<Name>,
    #[serde(default)]
    pub node_selector: Labels,
    /// Start it once it is made.
    #[serde(default = "VmCreate::start_default")]
    pub start: bool,
}

impl VmCreate {
    const fn cpus_default() -> u32 {
        1
    }
    const fn memory_default() -> ByteSize {
        ByteSize::mib(512)
    }
    const fn disk_bus_default() -> DiskBus {
        DiskBus::Virtio
    }
    const fn machine_default() -> MachineType {
        MachineType::Q35
    }
    const fn firmware_default() -> Firmware {
        Firmware::Bios
    }
    const fn accelerator_default() -> AcceleratorWish {
        AcceleratorWish::Auto
    }
    const fn nic_model_default() -> NicModel {
        NicModel::Virtio
    }
    const fn start_default() -> bool {
        true
    }

    /// A request with every default, for callers that set a few fields.
    pub fn named(name: Name) -> Self {
        Self {
            name,
            labels: Labels::new(),
            cpus: Self::cpus_default(),
            memory: Self::memory_default(),
            image: None,
            snapshot: None,
            disk: None,
            disk_bus: Self::disk_bus_default(),
            kernel: None,
            initrd: None,
            cmdline: None,
            cdrom: None,
            machine: Self::machine_default(),
            firmware: Self::firmware_default(),
            accelerator: Self::accelerator_default(),
            nic_model: Self::nic_model_default(),
            publish: Vec::new(),
            node: None,
            node_selector: Labels::new(),
            start: true,
        }
    }
}

/// Changes to a VM. What is absent stays. CPUs, memory and published ports change while it is stopped only.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmPatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// Replaces all labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ByteSize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publish: Option<Vec<Publish>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publish_reads_and_prints() {
        for (text, printed) in [
            ("2222:22", "127.0.0.1:2222:22"),
            ("0.0.0.0:80:8080", "0.0.0.0:80:8080"),
            ("[::1]:53:53/udp", "[::1]:53:53/udp"),
            ("127.0.0.1:1:2/tcp", "127.0.0.1:1:2"),
        ] {
            let publish: Publish = text.parse().unwrap();
            assert_eq!(publish.to_string(), printed);
            assert_eq!(printed.parse::<Publish>().unwrap(), publish);
        }
        for bad in ["22", "0:22", "22:0", "a:b", "1:2:3:4", "1:70000", "1:2/icmp", ",x:1:2"] {
            assert!(bad.parse::<Publish>().is_err(), "{bad}");
        }
    }
}
