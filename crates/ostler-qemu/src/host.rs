//! What a host can run.

use serde::{Deserialize, Serialize};

use crate::spec::Accelerator;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostProbe {
    /// None when QEMU was not found or does not run; `problems` says why.
    pub qemu_version: Option<String>,
    pub qemu_binary: Option<std::path::PathBuf>,
    /// Versioned machine types, newest first within a family.
    pub machine_types: Vec<String>,
    /// One entry for each accelerator, usable or not.
    pub accelerators: Vec<AcceleratorProbe>,
    /// The host CPU's name.
    pub cpu_model: String,
    pub cpu_flags: Vec<String>,
    pub cpus: u32,
    pub memory_bytes: u64,
    /// What stands in the way of running machines here, each with what to do.
    pub problems: Vec<String>,
}

impl HostProbe {
    /// What `auto` means on this host: KVM where it really works, else TCG.
    pub fn best_accelerator(&self) -> Accelerator {
        let kvm = self.accelerators.iter().any(|probe| probe.accelerator == Accelerator::Kvm && probe.usable);
        if kvm { Accelerator::Kvm } else { Accelerator::Tcg }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceleratorProbe {
    pub accelerator: Accelerator,
    pub usable: bool,
    /// Why it is or is not usable.
    pub reason: String,
}
