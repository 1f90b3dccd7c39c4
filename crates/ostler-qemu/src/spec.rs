//! What a machine is made of: the values the node agent hands to [`crate::Hypervisor::start`].
//!
//! Everything here is already decided (accelerator resolved, formats known, paths absolute); the driver only checks
//! that it is well formed and that the machine type can carry it.

use std::fmt;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use crate::disk::{
    Commit, DiskBus, DiskCache, DiskDiscard, DiskFormat, DiskIo, DiskLayer, DiskLimits, DiskPlaces, DiskSpec,
    DiskState, Rate, SnapshotDisk, Stream, StreamBase,
};

/// The chipset a guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineType {
    /// PCI Express, the default.
    Q35,
    /// Plain PCI, for old guests.
    I440fx,
    /// virtio-mmio only: quick, nothing can be hot-plugged.
    Microvm,
}

impl MachineType {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::I440fx => "i440fx",
            Self::Microvm => "microvm",
        }
    }
}

impl fmt::Display for MachineType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How guest code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Firmware {
    Bios,
    /// `vars` is this machine's variable store; it is made from the host's template when it does not exist.
    Uefi {
        vars: PathBuf,
    },
}

/// A kernel that QEMU loads itself. The files must be readable by everybody when QEMU runs as another user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelBoot {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NicModel {
    Virtio,
    E1000,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    Tcp,
    Udp,
}

impl fmt::Display for PortProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads into the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForward {
    pub protocol: PortProtocol,
    pub host_addr: IpAddr,
    pub host_port: u16,
    pub guest_port: u16,
}

#[derive(Debug, Clone)]
pub enum NicBackend {
    /// QEMU's own user-mode network: needs no rights.
    User { forwards: Vec<PortForward>, hostname: Option<String> },
    /// An opened tap device (`TUNSETIFF` done).
    Tap { fd: Arc<OwnedFd> },
}

#[derive(Debug, Clone)]
pub struct NicSpec {
    /// Short and unique within the machine: `[a-z0-9-]`, at most 20 characters.
    pub id: String,
    pub mac: MacAddress,
    pub model: NicModel,
    pub backend: NicBackend,
    pub boot_index: Option<u32>,
}

#[derive(Debug, Clone)]
pub struct MachineSpec {
    pub id: Uuid,
    pub name: String,
    pub machine: MachineType,
    /// The versioned type recorded at the first start, such as `pc-q35-7.2`; none takes the newest of this host.
    pub machine_version: Option<String>,
    pub accelerator: Accelerator,
    /// None takes `host` with KVM and `max` with TCG.
    pub cpu_model: Option<String>,
    pub cpus: u32,
    /// A multiple of 1 MiB.
    pub memory_bytes: u64,
    pub firmware: Firmware,
    pub kernel: Option<KernelBoot>,
    pub disks: Vec<DiskSpec>,
    /// None makes room for the disks and a few more.
    pub disk_places: Option<DiskPlaces>,
    pub nics: Vec<NicSpec>,
    pub rng: bool,
    pub balloon: bool,
    pub vnc: bool,
}

#[derive(Debug, Clone, Default)]
pub struct StartOptions {
    /// A state file that [`crate::Machine::save`] wrote for the same machine.
    pub restore_from: Option<PathBuf>,
    /// Leave the virtual CPUs stopped.
    pub paused: bool,
}

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no MAC address: six two-digit hexadecimal numbers with colons between, such as 52:54:00:12:34:56"
)]
pub struct MacAddressError(String);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = MacAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || MacAddressError(text.chars().take(64).collect());
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacAddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_round_trip_and_bad_ones_are_refused() {
        let mac: MacAddress = "52:54:00:AB:cd:0f".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:0f:11",
            "5:54:00:ab:cd:0ff",
            "+2:54:00:ab:cd:0f",
            "é:54:00:ab:cd:0f",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }
}
