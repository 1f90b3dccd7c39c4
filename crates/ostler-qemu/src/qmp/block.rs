//! What QEMU tells of disks, their files and the work on them. Unknown fields are passed over, as everywhere.

use serde::{Deserialize, Serialize};

use crate::disk::{DiskLimits, Rate};

/// A set of descriptors that `/dev/fdset/N` stands for.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdSet {
    pub fdset_id: u32,
}

/// A device that holds a disk, of `query-block`.
#[derive(Debug, Deserialize)]
pub struct DriveInfo {
    /// The device's id, or its path in the object tree.
    pub qdev: Option<String>,
    /// Absent in an empty CD-ROM drive.
    pub inserted: Option<BlockNodeInfo>,
    /// `ok`, `nospace` or `failed`; absent where requests are answered with their error.
    #[serde(rename = "io-status")]
    pub io_status: Option<String>,
}

/// An opened block node.
#[derive(Debug, Deserialize)]
pub struct BlockNodeInfo {
    #[serde(rename = "node-name")]
    pub node_name: Option<String>,
    pub ro: bool,
    /// The file's name: `/dev/fdset/N` for the files of disks.
    pub file: String,
    pub cache: CacheInfo,
    pub detect_zeroes: DetectZeroes,
    pub image: ImageInfo,
    #[serde(flatten)]
    throttle: ThrottleInfo,
}

#[derive(Debug, Deserialize)]
pub struct CacheInfo {
    pub direct: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DetectZeroes {
    Off,
    On,
    Unmap,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    pub virtual_size: u64,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
#[derive(Default)]
struct ThrottleInfo {
    iops: u64,
    iops_rd: u64,
    iops_wr: u64,
    bps: u64,
    bps_rd: u64,
    bps_wr: u64,
    iops_max: u64,
    iops_rd_max: u64,
    iops_wr_max: u64,
    bps_max: u64,
    bps_rd_max: u64,
    bps_wr_max: u64,
    iops_max_length: u64,
    iops_rd_max_length: u64,
    iops_wr_max_length: u64,
    bps_max_length: u64,
    bps_rd_max_length: u64,
    bps_wr_max_length: u64,
}

impl BlockNodeInfo {
    pub fn limits(&self) -> DiskLimits {
        let info = &self.throttle;
        let lengths = [
            info.iops_max_length,
            info.iops_rd_max_length,
            info.iops_wr_max_length,
            info.bps_max_length,
            info.bps_rd_max_length,
            info.bps_wr_max_length,
        ];
        // One second is what QEMU says when nothing was given.
        let longest = lengths.into_iter().max().filter(|seconds| *seconds > 1).unwrap_or(0);
        let rate = |sustained, burst| Rate { sustained, burst };
        DiskLimits {
            iops_total: rate(info.iops, info.iops_max),
            iops_read: rate(info.iops_rd, info.iops_rd_max),
            iops_write: rate(info.iops_wr, info.iops_wr_max),
            bps_total: rate(info.bps, info.bps_max),
            bps_read: rate(info.bps_rd, info.bps_rd_max),
            bps_write: rate(info.bps_wr, info.bps_wr_max),
            burst_seconds: u32::try_from(longest).unwrap_or(u32::MAX),
        }
    }

    /// The descriptor set that this node's file is in.
    pub fn fdset(&self) -> Option<u32> {
        self.file.strip_prefix("/dev/fdset/")?.parse().ok()
    }
}

#[derive(Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
pub enum TransactionAction {
    BlockdevSnapshot { node: String, overlay: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobStatus {
    Undefined,
    Created,
    Running,
    Paused,
    Ready,
    Standby,
    Waiting,
    Pending,
    Aborting,
    /// Over, with or without an error, and waiting to be dismissed.
    Concluded,
    Null,
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    pub id: String,
    pub status: JobStatus,
    pub current_progress: u64,
    pub total_progress: u64,
    pub error: Option<String>,
}

/// A child of an object, of `qom-list`.
#[derive(Debug, Deserialize)]
pub struct ObjectInfo {
    pub name: String,
    /// `child<TYPE>` for what is part of it.
    #[serde(rename = "type")]
    pub kind: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_tells_its_limits_and_its_descriptors() {
        let text = r#"{"node-name": "b.root.x-f", "ro": false, "drv": "file", "file": "/dev/fdset/12",
            "cache": {"writeback": true, "direct": false, "no-flush": false}, "detect_zeroes": "unmap",
            "image": {"virtual-size": 1024, "filename": "x", "format": "file"},
            "iops": 10, "iops_rd": 0, "iops_wr": 0, "bps": 0, "bps_rd": 0, "bps_wr": 0,
            "iops_max": 20, "iops_max_length": 3}"#;
        let node: BlockNodeInfo = serde_json::from_str(text).unwrap();
        assert_eq!((node.fdset(), node.image.virtual_size), (Some(12), 1024));
        let iops_total = Rate { sustained: 10, burst: 20 };
        assert_eq!(node.limits(), DiskLimits { iops_total, burst_seconds: 3, ..DiskLimits::default() });
    }

    #[test]
    fn a_transaction_is_written_as_qemu_wants_it() {
        let action = TransactionAction::BlockdevSnapshot { node: "a".into(), overlay: "b".into() };
        assert_eq!(
            serde_json::to_string(&action).unwrap(),
            r#"{"type":"blockdev-snapshot","data":{"node":"a","overlay":"b"}}"#
        );
    }
}
