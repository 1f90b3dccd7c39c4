//! How the QEMU driver is set up; made by the agent from its settings.

use std::path::PathBuf;
use std::time::Duration;

/// As whom QEMU runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QemuUser {
    /// As the agent's own user.
    Same,
    /// Each machine as a user (and group) of its own from this range. Takes effect only when the agent is root.
    PerMachine { first_uid: u32, count: u32 },
}

#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// One directory per machine is kept below it. Made if missing.
    pub run_dir: PathBuf,
    /// None looks for `qemu-system-x86_64` on the PATH.
    pub qemu_binary: Option<PathBuf>,
    /// Where UEFI firmware is looked for, in this order.
    pub firmware_dirs: Vec<PathBuf>,
    pub user: QemuUser,
    /// The translation cache of a TCG guest, in MiB. Bounds its resident memory.
    pub tcg_tb_size_mib: u32,
    /// From the spawn to a machine that is ready, reading a saved state not counted.
    pub start_timeout: Duration,
    /// For one answer of QEMU's monitor.
    pub qmp_timeout: Duration,
    /// For an orderly end before force is used.
    pub quit_timeout: Duration,
    /// For writing or reading a machine's whole state.
    pub state_timeout: Duration,
}

impl QemuConfig {
    pub fn new(run_dir: impl Into<PathBuf>) -> Self {
        Self {
            run_dir: run_dir.into(),
            qemu_binary: None,
            firmware_dirs: [
                "/usr/share/OVMF",
                "/usr/share/edk2/ovmf",
                "/usr/share/edk2/x64",
                "/usr/share/qemu",
            ]
            .map(PathBuf::from)
            .to_vec(),
            user: QemuUser::Same,
            tcg_tb_size_mib: 64,
            start_timeout: Duration::from_secs(30),
            qmp_timeout: Duration::from_secs(10),
            quit_timeout: Duration::from_secs(10),
            state_timeout: Duration::from_secs(1800),
        }
    }
}
