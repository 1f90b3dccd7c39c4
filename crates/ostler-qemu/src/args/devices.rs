//! QEMU's devices as typed values. One value serves the command line (`-device JSON`) and QMP (`device_add`) alike.

use serde::Serialize;

/// A place on a PCI bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PciAddress {
    bus: String,
    addr: String,
}

impl PciAddress {
    pub(super) fn new(bus: impl Into<String>, slot: usize, function: usize) -> Self {
        Self { bus: bus.into(), addr: format!("{slot:02x}.{function}") }
    }
}

/// What disks have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskProperties {
    pub(super) id: String,
    pub(super) drive: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bootindex: Option<u32>,
    #[serde(rename = "write-cache", skip_serializing_if = "Option::is_none")]
    pub(super) write_cache: Option<&'static str>,
    /// A full or failing disk stops the guest rather than handing it write errors; it goes on when it is resumed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) werror: Option<&'static str>,
    /// The same for reads: a pool that is away for a while is away for both, and a guest that saw its root fail to read
    /// does not recover by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) rerror: Option<&'static str>,
}

/// What NICs have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NicProperties {
    pub(super) id: String,
    pub(super) netdev: String,
    pub(super) mac: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bootindex: Option<u32>,
    /// Empty: no network boot ROM, which otherwise costs boot time. Absent when the NIC is to be booted from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) romfile: Option<&'static str>,
}

/// A drive on an IDE or SATA controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IdePlace {
    pub(super) bus: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) unit: Option<usize>,
}

/// A target of the SCSI controller; each has one unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ScsiPlace {
    pub(super) bus: String,
    pub(super) scsi_id: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "driver")]
pub enum Device {
    #[serde(rename = "pcie-root-port")]
    PcieRootPort {
        id: String,
        #[serde(flatten)]
        at: PciAddress,
        chassis: usize,
        multifunction: bool,
    },
    #[serde(rename = "VGA")]
    Screen {
        id: &'static str,
        #[serde(flatten)]
        at: PciAddress,
    },
    #[serde(rename = "qemu-xhci")]
    Usb {
        id: &'static str,
        #[serde(flatten)]
        at: PciAddress,
    },
    #[serde(rename = "usb-tablet")]
    Tablet { id: &'static str, bus: &'static str },
    #[serde(rename = "isa-serial")]
    Serial { id: &'static str, chardev: &'static str },
    #[serde(rename = "pvpanic")]
    PanicNotifier { id: &'static str },
    #[serde(rename = "virtio-rng-pci")]
    RngPci {
        id: &'static str,
        rng: &'static str,
        #[serde(flatten)]
        at: PciAddress,
    },
    #[serde(rename = "virtio-rng-device")]
    RngMmio { id: &'static str, rng: &'static str },
    #[serde(rename = "virtio-balloon-pci", rename_all = "kebab-case")]
    BalloonPci {
        id: &'static str,
        free_page_reporting: bool,
        #[serde(flatten)]
        at: PciAddress,
    },
    #[serde(rename = "virtio-balloon-device", rename_all = "kebab-case")]
    BalloonMmio { id: &'static str, free_page_reporting: bool },
    #[serde(rename = "ich9-ahci")]
    Ahci {
        id: &'static str,
        #[serde(flatten)]
        at: PciAddress,
    },
    #[serde(rename = "virtio-blk-pci")]
    DiskPci {
        #[serde(flatten)]
        disk: DiskProperties,
        #[serde(flatten)]
        at: PciAddress,
    },
    #[serde(rename = "virtio-blk-device")]
    DiskMmio {
        #[serde(flatten)]
        disk: DiskProperties,
    },
    #[serde(rename = "ide-hd")]
    DiskIde {
        #[serde(flatten)]
        disk: DiskProperties,
        #[serde(flatten)]
        at: IdePlace,
    },
    #[serde(rename = "ide-cd")]
    CdromIde {
        #[serde(flatten)]
        disk: DiskProperties,
        #[serde(flatten)]
        at: IdePlace,
    },
    #[serde(rename = "virtio-scsi-pci")]
    Scsi {
        id: &'static str,
        #[serde(flatten)]
        at: PciAddress,
    },
    #[serde(rename = "scsi-hd")]
    DiskScsi {
        #[serde(flatten)]
        disk: DiskProperties,
        #[serde(flatten)]
        at: ScsiPlace,
    },
    #[serde(rename = "scsi-cd")]
    CdromScsi {
        #[serde(flatten)]
        disk: DiskProperties,
        #[serde(flatten)]
        at: ScsiPlace,
    },
    #[serde(rename = "virtio-net-pci")]
    NicPci {
        #[serde(flatten)]
        nic: NicProperties,
        #[serde(flatten)]
        at: PciAddress,
    },
    #[serde(rename = "virtio-net-device")]
    NicMmio {
        #[serde(flatten)]
        nic: NicProperties,
    },
    #[serde(rename = "e1000")]
    NicE1000 {
        #[serde(flatten)]
        nic: NicProperties,
        #[serde(flatten)]
        at: PciAddress,
    },
}

/// A node of the block graph, with what lies below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "driver", rename_all = "lowercase")]
pub enum BlockNode {
    Raw {
        #[serde(flatten)]
        node: NodeProperties,
        file: FileNode,
    },
    Qcow2 {
        #[serde(flatten)]
        node: NodeProperties,
        file: FileNode,
        /// Always given, `null` at the bottom, so that QEMU never follows the name in the file's header.
        backing: Option<Box<BlockNode>>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NodeProperties {
    pub(super) node_name: String,
    pub(super) read_only: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) discard: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) detect_zeroes: Option<&'static str>,
    pub(super) cache: CacheFlags,
}

/// Through the page cache unless `direct`, with every flush of the guest passed on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CacheFlags {
    pub(super) direct: bool,
    pub(super) no_flush: bool,
}

/// A file that was opened by us. QEMU's own locks would need a second open, so ours (the machine's lock) stand for them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileNode {
    pub(super) driver: &'static str,
    pub(super) node_name: String,
    pub(super) filename: String,
    pub(super) locking: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) aio: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) cache: Option<CacheFlags>,
}

/// The arguments of `block_set_io_throttle`: 0 is no limit, and what is left out is back to its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Throttle {
    pub(super) id: String,
    pub(super) iops: u64,
    pub(super) iops_rd: u64,
    pub(super) iops_wr: u64,
    pub(super) bps: u64,
    pub(super) bps_rd: u64,
    pub(super) bps_wr: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) iops_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) iops_rd_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) iops_wr_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bps_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bps_rd_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bps_wr_max: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) iops_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) iops_rd_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) iops_wr_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bps_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bps_rd_max_length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bps_wr_max_length: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Netdev {
    User {
        id: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        hostname: Option<String>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        hostfwd: Vec<NetdevString>,
    },
    Tap {
        id: String,
        /// A number on the command line, a name given by `getfd` over QMP.
        fd: String,
        vhost: bool,
    },
}

/// QEMU's list of strings is a list of objects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetdevString {
    pub(super) str: String,
}
