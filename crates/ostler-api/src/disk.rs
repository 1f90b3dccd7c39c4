//! How a disk behaves: its limits, what is cached, what becomes of blocks that the guest gives up.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::resource::words;

/// Longest burst, in seconds.
pub const BURST_SECONDS_MAX: u32 = 3600;
/// Largest limit; a larger one is none.
pub const LIMIT_MAX: u64 = 1 << 40;

words! {
    /// What the node keeps in memory of a disk. What the guest flushes reaches the medium with each of them.
    DiskCache {
        /// The node's page cache; the guest sees a disk with a cache.
        Writeback => "writeback",
        /// Past the node's page cache.
        None => "none",
        /// The node's page cache, and each write is flushed: for guests that never flush.
        Writethrough => "writethrough",
    }
}

words! {
    /// What becomes of blocks that the guest discards.
    DiskDiscard {
        /// Given back to the pool.
        Unmap => "unmap",
        /// Kept.
        Ignore => "ignore",
    }
}

/// Operations and bytes a second. 0 is no limit. A total excludes the limits of reads and writes alone; a burst is allowed
/// for `burst_seconds` at a stretch and needs its limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DiskLimits {
    #[serde(skip_serializing_if = "is_zero")]
    pub iops: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub iops_read: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub iops_write: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub bps: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub bps_read: u64,
    #[serde(skip_serializing_if = "is_zero")]
    pub bps_write: u64,
    /// Of all of the operations' limits.
    #[serde(skip_serializing_if = "is_zero")]
    pub iops_burst: u64,
    /// Of all of the bytes' limits.
    #[serde(skip_serializing_if = "is_zero")]
    pub bps_burst: u64,
    /// 1 when not given.
    #[serde(skip_serializing_if = "is_none")]
    pub burst_seconds: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_zero(value: &u64) -> bool {
    *value == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
const fn is_none(value: &u32) -> bool {
    *value == 0
}

impl DiskLimits {
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// The field at fault, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let kinds = [
            (
                ("iops", self.iops),
                ("iops_read", self.iops_read),
                ("iops_write", self.iops_write),
                ("iops_burst", self.iops_burst),
            ),
            (
                ("bps", self.bps),
                ("bps_read", self.bps_read),
                ("bps_write", self.bps_write),
                ("bps_burst", self.bps_burst),
            ),
        ];
        for (total, read, write, burst) in kinds {
            for (field, value) in [total, read, write, burst] {
                if value > LIMIT_MAX {
                    return Err((field, format!("at most {LIMIT_MAX}, not {value}")));
                }
            }
            if total.1 > 0 && (read.1 > 0 || write.1 > 0) {
                return Err((
                    total.0,
                    format!("{} and {} or {}: a total, or one for each", total.0, read.0, write.0),
                ));
            }
            let largest = total.1.max(read.1).max(write.1);
            if burst.1 > 0 && (largest == 0 || burst.1 < largest) {
                return Err((burst.0, format!("a burst is at least its limit, which is {largest}")));
            }
        }
        if self.burst_seconds > BURST_SECONDS_MAX {
            return Err((
                "burst_seconds",
                format!("at most {BURST_SECONDS_MAX}, not {}", self.burst_seconds),
            ));
        }
        if self.burst_seconds > 0 && self.iops_burst == 0 && self.bps_burst == 0 {
            return Err(("burst_seconds", "there is no burst to last so long".to_owned()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_contradict_each_other_name_the_field() {
        let none = DiskLimits::default();
        for (limits, field) in [
            (DiskLimits { iops: 100, iops_read: 50, ..none }, "iops"),
            (DiskLimits { bps: 1, bps_write: 1, ..none }, "bps"),
            (DiskLimits { iops_burst: 10, ..none }, "iops_burst"),
            (DiskLimits { bps_read: 100, bps_burst: 50, ..none }, "bps_burst"),
            (DiskLimits { burst_seconds: 5, ..none }, "burst_seconds"),
            (DiskLimits { iops: LIMIT_MAX + 1, ..none }, "iops"),
        ] {
            assert_eq!(limits.check().unwrap_err().0, field, "{limits:?}");
        }
        for limits in [
            none,
            DiskLimits { iops: 100, bps_read: 5, bps_write: 6, ..none },
            DiskLimits { iops: 100, iops_burst: 200, burst_seconds: 60, ..none },
        ] {
            assert_eq!(limits.check(), Ok(()), "{limits:?}");
        }
    }

    #[test]
    fn no_limits_are_nothing_to_write() {
        assert_eq!(serde_json::to_string(&DiskLimits::default()).unwrap(), "{}");
    }
}
