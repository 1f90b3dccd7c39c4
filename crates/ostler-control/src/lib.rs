//! The cloud's rules: services, controllers and the scheduler.
//!
//! Who calls it: `ostler-server` calls the services (one per noun, methods of [`Cloud`]); [`Cloud::run_controllers`]
//! starts the controllers. What always holds:
//!
//! - Every service function takes a [`Caller`] and asks `permission` before it looks at anything.
//! - Reads come from the cache, which follows the store's watch; writes are planned against the cache as a pure
//!   function and committed as one compare-and-set transaction (`commit`). A caller reads its own writes.
//! - Controllers are level-triggered: whatever step they do, they can be killed and do it again.

mod cache;
mod caller;
mod clone;
mod cloud;
mod commit;
mod config;
mod controllers;
mod event;
mod idempotency;
mod image;
mod image_import;
mod keys;
mod list;
mod metrics;
mod node;
mod node_reports;
mod node_work;
mod operation;
mod permission;
pub mod scheduler;
mod snapshot;
mod snapshot_report;
mod stream;
mod token;
mod vm;
mod vm_act;
mod vm_create;
mod vm_disk;
mod vm_report;
mod volume;
mod volume_create;
mod volume_flatten;
mod wait;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use cache::Cached;
pub use caller::Caller;
pub use cloud::{Cloud, OpenError};
pub use config::{CloudConfig, SchedulerConfig};
pub use idempotency::Idempotency;
pub use image::ImageFile;
pub use permission::Identity;
pub use stream::StreamEnd;
pub use vm_act::VmActionRequest;
