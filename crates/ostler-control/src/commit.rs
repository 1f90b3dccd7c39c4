//! One write: planned against the cache by a pure function, committed as one compare-and-set transaction, seen by the
//! caller before it gets its answer.

use bytes::Bytes;
use ostler_api::event::{Event, EventSpec, Severity};
use ostler_api::operation::Target;
use ostler_api::{ApiError, ErrorCode, EventId, Metadata, Name, Resource};
use ostler_store::{Revision, StoreError, Txn, TxnOutcome};
use serde::Serialize;

use crate::cache::Tables;
use crate::cloud::Cloud;
use crate::keys;

/// How often a plan is made anew when others were quicker.
const ATTEMPTS: u32 = 32;

/// What a transaction checks and changes.
#[derive(Debug, Default)]
pub(crate) struct Change {
    txn: Txn,
}

impl Change {
    fn value<T: Serialize>(object: &T) -> Result<Bytes, ApiError> {
        serde_json::to_vec(object).map(Bytes::from).map_err(ApiError::internal)
    }

    /// A new resource; fails when its name is taken.
    pub(crate) fn create<T: Resource>(&mut self, object: &T) -> Result<(), ApiError> {
        self.create_as(object, Self::value(object)?);
        Ok(())
    }

    /// The same with other bytes than the object's own.
    pub(crate) fn create_as<T: Resource>(&mut self, object: &T, value: Bytes) {
        let id = object.metadata().id.to_string();
        let key = keys::resource(object);
        let txn = std::mem::take(&mut self.txn);
        self.txn = txn.absent(key.clone()).put(key, value);
        if object.metadata().name.as_str() != id {
            let name = keys::name(object);
            let txn = std::mem::take(&mut self.txn);
            self.txn = txn.absent(name.clone()).put(name, Bytes::from(id));
        }
    }

    /// A change of a resource that is as it was read.
    pub(crate) fn update<T: Resource>(&mut self, old: &T, new: &T) -> Result<(), ApiError> {
        self.guard(old);
        let txn = std::mem::take(&mut self.txn);
        self.txn = txn.put(keys::resource(old), Self::value(new)?);
        if old.metadata().name != new.metadata().name {
            let name = keys::name(new);
            let txn = std::mem::take(&mut self.txn);
            self.txn = txn
                .absent(name.clone())
                .delete(keys::name(old))
                .put(name, Bytes::from(new.metadata().id.to_string()));
        }
        Ok(())
    }

    /// The end of a resource that is as it was read.
    pub(crate) fn delete<T: Resource>(&mut self, old: &T) {
        self.guard(old);
        let txn = std::mem::take(&mut self.txn);
        self.txn = txn.delete(keys::resource(old));
        if old.metadata().name.as_str() != old.metadata().id.to_string() {
            let txn = std::mem::take(&mut self.txn);
            self.txn = txn.delete(keys::name(old));
        }
    }

    /// Only if this resource is as it was read.
    pub(crate) fn guard<T: Resource>(&mut self, seen: &T) {
        self.only_if(keys::resource(seen), Revision(seen.metadata().revision));
    }

    pub(crate) fn only_if(&mut self, key: String, at: Revision) {
        let txn = std::mem::take(&mut self.txn);
        self.txn = txn.modified(key, at);
    }

    pub(crate) fn put_absent(&mut self, key: String, value: Bytes) {
        let txn = std::mem::take(&mut self.txn);
        self.txn = txn.absent(key.clone()).put(key, value);
    }

    pub(crate) fn delete_key(&mut self, key: String) {
        let txn = std::mem::take(&mut self.txn);
        self.txn = txn.delete(key);
    }

    /// Tells people.
    pub(crate) fn event(
        &mut self,
        project: Option<Name>,
        severity: Severity,
        code: &str,
        target: Target,
        message: impl Into<String>,
    ) -> Result<(), ApiError> {
        let id = EventId::new();
        let name = Name::new(&id.to_string()).map_err(ApiError::internal)?;
        self.create(&Event {
            metadata: Metadata::new(id.into(), name, project),
            spec: EventSpec { code: code.to_owned(), severity, message: message.into(), target },
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.txn.ops.is_empty()
    }

    pub(crate) fn into_txn(self) -> Txn {
        self.txn
    }
}

impl Cloud {
    /// Plans and commits until nobody came in between. `plan` sees the present and must not do anything but plan.
    pub(crate) async fn commit<R>(
        &self,
        mut plan: impl FnMut(&Tables, &mut Change) -> Result<R, ApiError>,
    ) -> Result<R, ApiError> {
        for _ in 0..ATTEMPTS {
            let mut change = Change::default();
            let result = plan(&self.cache.read(), &mut change)?;
            if change.is_empty() {
                return Ok(result);
            }
            match self.store.txn(change.txn).await.map_err(store_error)? {
                TxnOutcome::Committed { revision } => {
                    self.cache.reached(revision).await;
                    return Ok(result);
                }
                TxnOutcome::Conflict { current, .. } => {
                    // The cache has to know what the store knows before a new plan can be better.
                    let known = match current {
                        Some(kv) => kv.modified,
                        None => self.store.revision().await.map_err(store_error)?,
                    };
                    self.cache.reached(known).await;
                }
            }
        }
        Err(ApiError::new(ErrorCode::Unavailable, "others keep changing this at the same time")
            .hint("try again in a moment"))
    }
}

/// What a caller learns of a fault of the store.
pub(crate) fn store_error(error: StoreError) -> ApiError {
    let text = error.to_string();
    match error {
        StoreError::TooOld { .. } => {
            ApiError::new(ErrorCode::RevisionTooOld, "that revision is no longer kept")
                .hint("list again and watch from the list's revision")
        }
        StoreError::FutureRevision { .. } => ApiError::invalid("from", "that revision has not happened yet"),
        StoreError::TooLarge { .. } => {
            ApiError::new(ErrorCode::TooLarge, "the resource is too large").log(text)
        }
        StoreError::Full { .. } => {
            ApiError::new(ErrorCode::NoSpace, "the disk of the control plane is full; nothing was changed")
                .hint("free space on the file system of the data directory, then try again")
                .log(text)
        }
        _ => ApiError::internal(text),
    }
}
