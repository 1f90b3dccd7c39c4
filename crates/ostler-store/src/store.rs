//! The contract between the cloud's rules and where its state is kept. [`crate::conformance`] tests every clause.

use std::fmt::Debug;
use std::time::Duration;

use async_trait::async_trait;

use crate::{KeyValue, LeaseId, ListPage, ListQuery, Result, Revision, StoreError, Txn, TxnOutcome, Watch};

/// What a schema upgrade does with one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rewrite {
    Keep,
    Replace(Vec<u8>),
    Delete,
}

/// Decides over one key and its value; an error stops the upgrade, and nothing is changed.
pub type RewriteFn = Box<dyn FnMut(&str, &[u8]) -> Result<Rewrite, String> + Send>;

/// A revisioned key-value store.
///
/// Keys are non-empty strings in byte order. Every method may be called from any number of tasks. When the future of a
/// write is dropped before it ends, the write may or may not happen.
#[async_trait]
pub trait Store: Send + Sync + Debug + 'static {
    /// The key as it is now or as it was `at` a revision.
    ///
    /// [`StoreError::TooOld`] when that revision is compacted, [`StoreError::FutureRevision`] when it is yet to come.
    async fn get(&self, key: &str, at: Option<Revision>) -> Result<Option<KeyValue>>;

    /// A page of keys, all as of one revision. Errors as for [`Store::get`].
    async fn list(&self, query: ListQuery) -> Result<ListPage>;

    /// Applies the operations if all compares hold. Acknowledged means durable, and seen by every read after.
    ///
    /// A transaction that changes nothing (no operations, or only deletes of keys that do not exist) makes no revision.
    /// [`StoreError::TooLarge`] beyond the limits of this crate, [`StoreError::Invalid`] for an empty key or two
    /// operations on one key, [`StoreError::LeaseNotFound`] for a put on a lease that has ended.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome>;

    /// Every batch with a revision of at least `from` that touches a key under `prefix`, in order, none missed or repeated,
    /// for as long as it is read.
    ///
    /// `from` may lie in the future; 0 means the beginning. [`StoreError::TooOld`], from here or later from the stream
    /// of a watcher that was overtaken by compaction, when not all of these are kept any more.
    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch>;

    /// A lease that ends when it was not kept alive for `ttl` (back ends may round it up). Its end deletes the keys put
    /// with it, in one transaction with its own revision. After a restart of the store it has its full `ttl` again.
    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId>;

    /// Gives the lease its full time again. [`StoreError::LeaseNotFound`] when it has ended, then or earlier.
    async fn lease_keep_alive(&self, id: LeaseId) -> Result<()>;

    /// Ends the lease now. [`StoreError::LeaseNotFound`] when it has ended already.
    async fn lease_revoke(&self, id: LeaseId) -> Result<()>;

    /// Gives up the history before this revision: it may no longer be read or watched from, and its space is freed in the
    /// background. `before` is at most the revision after the current one ([`StoreError::FutureRevision`]).
    /// Does nothing when that much is compacted already.
    async fn compact(&self, before: Revision) -> Result<()>;

    /// The revision of the newest change that was acknowledged.
    async fn revision(&self) -> Result<Revision>;

    /// The version of what is written in the values, which is the callers' affair; 0 when it was never set.
    async fn schema_version(&self) -> Result<u32>;

    /// Rewrites all values from one schema version to another, in one transaction with at most one revision. Keys keep
    /// their leases. The back end keeps a copy of what was before where it can.
    ///
    /// [`StoreError::SchemaMismatch`] when the version is not `from`, [`StoreError::Upgrade`] when `rewrite` refuses a
    /// key; nothing is changed then.
    async fn schema_upgrade(&self, from: u32, to: u32, rewrite: RewriteFn) -> Result<()>;
}

/// Refuses data that a newer server wrote. Otherwise tells the version, for the caller to upgrade from.
pub async fn check_schema(store: &dyn Store, supported: u32) -> Result<u32> {
    let found = store.schema_version().await?;
    if found > supported {
        return Err(StoreError::SchemaTooNew { found, supported });
    }
    Ok(found)
}
