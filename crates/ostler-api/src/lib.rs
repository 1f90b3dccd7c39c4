//! The nouns of Ostler: resources, requests, errors and the words between server and node agent.
//!
//! Plain serde structs and pure functions, no I/O. Every other crate may depend on this one; it depends on
//! none of them. One noun, one file: `vm`, `volume`, `snapshot`, `image`, `node`, `operation`, `event`, `token`.
//!
//! What always holds: a resource is `metadata` (who), `spec` (what is wanted, written by people) and `status`
//! (what is, written by the system). Requests refuse unknown fields; stored resources do not, so that a field may
//! be added without a schema change.

pub mod accelerator;
pub mod disk;
pub mod error;
pub mod event;
pub mod fault;
pub mod id;
pub mod image;
pub mod list;
pub mod metadata;
pub mod name;
pub mod node;
pub mod operation;
pub mod project;
pub mod resource;
pub mod size;
pub mod snapshot;
pub mod time;
pub mod token;
pub mod vm;
pub mod vm_action;
pub mod vm_phase;
pub mod volume;
pub mod work;

pub use accelerator::{Accelerator, AcceleratorWish};
pub use error::{ApiError, ErrorCode, Problem};
pub use fault::Fault;
pub use id::{
    EventId, ImageId, NodeId, OperationId, ProjectId, SnapshotId, StreamId, TokenId, VmId, VolumeId,
};
pub use metadata::Metadata;
pub use name::Name;
pub use resource::{Kind, Resource};
pub use size::ByteSize;
pub use time::Time;

/// The version of the shapes in the store. A server upgrades older stores and refuses newer ones.
pub const SCHEMA_VERSION: u32 = 1;

/// The project that exists from the first start.
pub const DEFAULT_PROJECT: &str = "default";
