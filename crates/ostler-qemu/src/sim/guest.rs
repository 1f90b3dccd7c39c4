//! How simulated guests behave.

use std::time::Duration;

/// One guest's habits. The default runs until told otherwise and obeys the power button at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SimGuest {
    pub on_powerdown: OnPowerdown,
    pub lifetime: SimLifetime,
    /// Does not release virtio disks. (SCSI disks are taken from a guest without asking.)
    pub keeps_disks: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnPowerdown {
    /// Powers itself off after this long.
    PowersOff(Duration),
    Ignores,
}

impl Default for OnPowerdown {
    fn default() -> Self {
        Self::PowersOff(Duration::ZERO)
    }
}

/// What a guest does by itself after each start of its virtual CPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SimLifetime {
    #[default]
    Runs,
    PowersOffAfter(Duration),
    PanicsAfter(Duration),
    /// Its QEMU dies of a signal.
    CrashesAfter(Duration),
}
