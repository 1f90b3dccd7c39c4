//! What a watcher receives. Back ends make a [`Watch`] of any stream of batches.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;

use crate::{KeyValue, Result, Revision};

/// All events of one revision under the prefix that is watched; one revision is never split. At least one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchBatch {
    pub revision: Revision,
    /// In the order of the operations of the transaction.
    pub events: Vec<WatchEvent>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    Put { kv: KeyValue },
    Delete { key: Arc<str> },
}

impl WatchEvent {
    pub fn key(&self) -> &Arc<str> {
        match self {
            Self::Put { kv } => &kv.key,
            Self::Delete { key } => key,
        }
    }
}

/// A stream of batches that ends only after an error. Dropping it ends the watch.
///
/// One that is not read costs nothing but its position: it goes on from the history when it is read again.
pub struct Watch {
    inner: Pin<Box<dyn Stream<Item = Result<WatchBatch>> + Send>>,
}

impl Watch {
    pub(crate) fn new(inner: impl Stream<Item = Result<WatchBatch>> + Send + 'static) -> Self {
        Self { inner: Box::pin(inner) }
    }
}

impl Stream for Watch {
    type Item = Result<WatchBatch>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.inner.as_mut().poll_next(context)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
