//! Storage driver: what an image is, how it comes in, and where disks live.
//!
//! Who calls it: the control plane's image service ([`ImageStore`], [`fetch`]) and the node agent ([`Pool`]).
//! It knows nothing of API types, of the store or of the server.
//!
//! What always holds:
//! - A format is decided once, at import, from the content by [`probe`]; every later open names its driver.
//! - A disk that a guest can write is never probed. Volumes are qcow2 files that we wrote ourselves.
//! - An image is addressed by the SHA-256 of its stored bytes and never changes.
//! - No file appears under its final name before it is whole and on disk.

mod blocking;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
mod error;
mod fetch;
mod files;
mod import;
mod pool;
mod probe;
mod qcow2;
mod tool;

pub use error::{ImportError, StorageError};
pub use fetch::{FetchError, FetchPolicy, fetch};
pub use import::{
    FinishOptions, ImageRef, ImageStore, ImportProgress, ImportStage, ImportedImage, Upload, UploadSource,
};
pub use pool::{
    Audit, Broken, CheckReport, DirPool, ImageSource, Layer, Merge, NewVolume, Orphan, Pool, PoolKind,
    PoolUsage, SimFault, SimFaults, SimPool, SnapshotInfo, SnapshotPlan, VolumeInfo, VolumeSource, Work,
};
pub use probe::{
    Compression, ImageContent, ImageFormat, ProbeLimits, ProbedImage, Refusal, UnknownName, probe,
};
pub use tool::{QemuImg, ToolError, ToolLimits};
