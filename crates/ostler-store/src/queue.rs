//! The way from asynchronous callers to a dedicated thread: bounded (callers wait for room without blocking their
//! runtime) and drained in one go, which is what makes group commit cheap.

use std::collections::VecDeque;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use tokio::sync::Semaphore;

use crate::{Result, StoreError};

#[derive(Debug)]
pub(crate) struct Queue<T> {
    inner: Mutex<Inner<T>>,
    ready: Condvar,
    /// A permit for each free place.
    room: Semaphore,
}

#[derive(Debug)]
struct Inner<T> {
    items: VecDeque<T>,
    closed: bool,
}

impl<T> Queue<T> {
    pub(crate) fn new(places: usize) -> Self {
        let inner = Inner { items: VecDeque::new(), closed: false };
        Self { inner: Mutex::new(inner), ready: Condvar::new(), room: Semaphore::new(places) }
    }

    /// Waits for room. [`StoreError::Closed`] after [`Queue::close`].
    pub(crate) async fn push(&self, item: T) -> Result<()> {
        // The permit is given back by the thread that takes the item out.
        self.room.acquire().await.map_err(|_| StoreError::Closed)?.forget();
        let mut inner = self.inner.lock();
        if inner.closed {
            return Err(StoreError::Closed);
        }
        inner.items.push_back(item);
        drop(inner);
        self.ready.notify_one();
        Ok(())
    }

    /// Moves up to `most` items into `batch`, waiting for the first until `deadline`. False when the queue is closed
    /// and everything in it was taken.
    pub(crate) fn take(&self, batch: &mut Vec<T>, most: usize, deadline: Option<Instant>) -> bool {
        let mut inner = self.inner.lock();
        while inner.items.is_empty() && !inner.closed {
            match deadline {
                Some(deadline) => {
                    if self.ready.wait_until(&mut inner, deadline).timed_out() {
                        break;
                    }
                }
                None => self.ready.wait(&mut inner),
            }
        }
        let count = inner.items.len().min(most);
        batch.extend(inner.items.drain(..count));
        let open = count > 0 || !inner.closed;
        drop(inner);
        self.room.add_permits(count);
        open
    }

    /// One item, or `None` when the queue is closed and empty.
    pub(crate) fn pop(&self) -> Option<T> {
        let mut one = Vec::with_capacity(1);
        self.take(&mut one, 1, None);
        one.pop()
    }

    /// Lets no more in. What is inside is still handed out.
    pub(crate) fn close(&self) {
        self.inner.lock().closed = true;
        self.room.close();
        self.ready.notify_all();
    }
}
