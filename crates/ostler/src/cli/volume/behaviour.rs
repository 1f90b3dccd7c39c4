//! How a volume behaves, on the command line: limits, cache, discard.

use clap::Args;
use ostler_api::ByteSize;
use ostler_api::disk::{DiskCache, DiskDiscard, DiskLimits};

use crate::cli::args::{seconds, words};
use crate::cli::vm::size;

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Limits (a second; 0 is none)")]
pub(crate) struct LimitArgs {
    /// Operations
    #[arg(long, value_name = "N")]
    iops: Option<u64>,
    /// Reads
    #[arg(long, value_name = "N")]
    iops_read: Option<u64>,
    /// Writes
    #[arg(long, value_name = "N")]
    iops_write: Option<u64>,
    /// Bytes, such as 50M
    #[arg(long, value_parser = size, value_name = "SIZE")]
    bps: Option<ByteSize>,
    /// Bytes read
    #[arg(long, value_parser = size, value_name = "SIZE")]
    bps_read: Option<ByteSize>,
    /// Bytes written
    #[arg(long, value_parser = size, value_name = "SIZE")]
    bps_write: Option<ByteSize>,
    /// Operations for a short time
    #[arg(long, value_name = "N")]
    iops_burst: Option<u64>,
    /// Bytes for a short time
    #[arg(long, value_parser = size, value_name = "SIZE")]
    bps_burst: Option<ByteSize>,
    /// How long a burst may last; 1s when not given
    #[arg(long, value_parser = seconds, value_name = "TIME")]
    burst_time: Option<u32>,
}

/// The names of its arguments, for groups.
pub(crate) const LIMIT_ARGS: [&str; 9] = [
    "iops",
    "iops_read",
    "iops_write",
    "bps",
    "bps_read",
    "bps_write",
    "iops_burst",
    "bps_burst",
    "burst_time",
];

impl LimitArgs {
    pub(crate) fn any(&self) -> bool {
        let counts = [self.iops, self.iops_read, self.iops_write, self.iops_burst];
        let sizes = [self.bps, self.bps_read, self.bps_write, self.bps_burst];
        counts.iter().any(Option::is_some) || sizes.iter().any(Option::is_some) || self.burst_time.is_some()
    }

    /// `now` with what was given in the place of what it has.
    pub(crate) fn over(&self, now: DiskLimits) -> DiskLimits {
        let bytes = |size: Option<ByteSize>, now| size.map_or(now, ByteSize::bytes);
        DiskLimits {
            iops: self.iops.unwrap_or(now.iops),
            iops_read: self.iops_read.unwrap_or(now.iops_read),
            iops_write: self.iops_write.unwrap_or(now.iops_write),
            bps: bytes(self.bps, now.bps),
            bps_read: bytes(self.bps_read, now.bps_read),
            bps_write: bytes(self.bps_write, now.bps_write),
            iops_burst: self.iops_burst.unwrap_or(now.iops_burst),
            bps_burst: bytes(self.bps_burst, now.bps_burst),
            burst_seconds: self.burst_time.unwrap_or(now.burst_seconds),
        }
    }
}

#[derive(Debug, Clone, Default, Args)]
pub(crate) struct OpenArgs {
    /// What the node keeps in memory of it
    #[arg(long, value_parser = words!(DiskCache), value_name = "KIND")]
    pub(crate) cache: Option<DiskCache>,
    /// What becomes of blocks that the guest discards
    #[arg(long, value_parser = words!(DiskDiscard), value_name = "KIND")]
    pub(crate) discard: Option<DiskDiscard>,
}

/// `500 operations, 50 MiB`, a second; none when there are none.
pub(crate) fn limits_text(limits: &DiskLimits) -> Option<String> {
    let DiskLimits {
        iops,
        iops_read,
        iops_write,
        bps,
        bps_read,
        bps_write,
        iops_burst,
        bps_burst,
        burst_seconds,
    } = *limits;
    let count = |value: u64, what: &str| (value > 0).then(|| format!("{value} {what}"));
    let bytes = |value: u64, what: &str| (value > 0).then(|| format!("{}{what}", ByteSize(value)));
    let parts = [
        count(iops, "operations"),
        count(iops_read, "reads"),
        count(iops_write, "writes"),
        bytes(bps, ""),
        bytes(bps_read, " read"),
        bytes(bps_write, " written"),
        count(iops_burst, "operations in bursts"),
        bytes(bps_burst, " in bursts"),
        (burst_seconds > 0).then(|| format!("bursts of {burst_seconds} s")),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join(", ") + " (a second)")
}
