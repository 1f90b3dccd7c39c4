//! The values that go in and out of a store. Plain data, no I/O; every back end and every caller speaks these.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

/// The number of one change to the whole store. Revisions only grow; 0 is the store before its first change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl Revision {
    /// The revision after this one: where to watch from after having read at this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names a lease. Never given out twice by one store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A key with its value as of some revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    pub key: Arc<str>,
    pub value: Bytes,
    /// When the key came into being; a key that was deleted and put again was created again.
    pub created: Revision,
    /// When this value was written.
    pub modified: Revision,
    /// How many times the key was written since it was created; the first put makes it 1.
    pub version: u64,
    /// The lease whose end deletes the key.
    pub lease: Option<LeaseId>,
}

/// What must hold for a transaction to be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compare {
    /// The key does not exist.
    Absent { key: String },
    /// The key exists.
    Present { key: String },
    /// The key exists and was last written at this revision.
    Modified { key: String, at: Revision },
}

impl Compare {
    pub fn key(&self) -> &str {
        match self {
            Self::Absent { key } | Self::Present { key } | Self::Modified { key, .. } => key,
        }
    }

    /// Whether it holds for a key that was last written at `modified`, `None` meaning that it does not exist.
    pub(crate) fn holds(&self, modified: Option<Revision>) -> bool {
        match self {
            Self::Absent { .. } => modified.is_none(),
            Self::Present { .. } => modified.is_some(),
            Self::Modified { at, .. } => modified == Some(*at),
        }
    }
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes the key. Its lease becomes `lease`, also when that is `None`.
    Put { key: String, value: Bytes, lease: Option<LeaseId> },
    /// Deletes the key; does nothing when there is none.
    Delete { key: String },
}

impl Op {
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// Changes that happen together, or not at all when one of the compares does not hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Txn {
    pub compares: Vec<Compare>,
    /// Each key at most once.
    pub ops: Vec<Op>,
}

impl Txn {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn absent(mut self, key: impl Into<String>) -> Self {
        self.compares.push(Compare::Absent { key: key.into() });
        self
    }

    pub fn present(mut self, key: impl Into<String>) -> Self {
        self.compares.push(Compare::Present { key: key.into() });
        self
    }

    pub fn modified(mut self, key: impl Into<String>, at: Revision) -> Self {
        self.compares.push(Compare::Modified { key: key.into(), at });
        self
    }

    pub fn put(mut self, key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: None });
        self
    }

    pub fn put_leased(mut self, key: impl Into<String>, value: impl Into<Bytes>, lease: LeaseId) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: Some(lease) });
        self
    }

    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.ops.push(Op::Delete { key: key.into() });
        self
    }
}

/// How a transaction ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum TxnOutcome {
    /// Applied and durable. `revision` is its own, or the store's current one when nothing changed.
    Committed { revision: Revision },
    /// Nothing was applied: the first compare that did not hold was the one on `key`, which is now `current`.
    Conflict { key: String, current: Option<KeyValue> },
}

/// Which keys to list. The keys come in byte order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListQuery {
    pub prefix: String,
    /// Only keys after this one: the last key of the page before.
    pub after: Option<String>,
    pub limit: Option<usize>,
    /// The state as of this revision instead of the current one.
    pub at: Option<Revision>,
}

impl ListQuery {
    /// Everything that begins with `prefix`, as it is now.
    pub fn prefix(prefix: impl Into<String>) -> Self {
        Self { prefix: prefix.into(), ..Self::default() }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListPage {
    pub items: Vec<KeyValue>,
    /// The revision that the page shows: ask for the next page `at` this one, watch from the one after it.
    pub revision: Revision,
    /// Whether keys follow the last item.
    pub more: bool,
}
