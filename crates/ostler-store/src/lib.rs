//! The revisioned store: where the cloud's state lives.
//!
//! The services and controllers of `ostler-control` are its callers; nothing else in Ostler writes state to disk.
//! What a back end promises is written at [`Store`] and tested by [`conformance`]; the semantics are a subset of
//! those of etcd v3, so that one back end can be an etcd cluster:
//!
//! - every transaction that changes something gets one revision, a number that only grows and is global to the store;
//! - the past can be read and watched from any revision that is not yet compacted;
//! - what was acknowledged is durable.
//!
//! [`SqliteStore`] is the embedded back end, [`MemoryStore`] the one for tests.

#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
mod feed;
mod leases;
mod limits;
mod memory;
mod queue;
mod sqlite;
mod store;
mod types;
mod watch;

pub use error::{Result, StoreError};
pub use limits::{MAX_KEY_BYTES, MAX_REQUEST_BYTES, MAX_TXN_OPS, MAX_VALUE_BYTES};
pub use memory::MemoryStore;
pub use sqlite::{SqliteOptions, SqliteStore};
pub use store::{Rewrite, RewriteFn, Store, check_schema};
pub use types::{Compare, KeyValue, LeaseId, ListPage, ListQuery, Op, Revision, Txn, TxnOutcome};
pub use watch::{Watch, WatchBatch, WatchEvent};
