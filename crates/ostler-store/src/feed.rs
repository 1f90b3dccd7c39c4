//! Recent changes in memory, and the streams that follow them. Both back ends publish here; a [`Watch`] pulls from here.
//!
//! A watcher is only a position. What it asks for comes from the ring of recent changes, or from the back end's
//! history when it has fallen behind the ring. So a slow watcher never holds up a writer and holds no memory, and the
//! ring has a fixed size. Revisions in the ring are contiguous.

use std::collections::VecDeque;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{Result, Revision, StoreError, Watch, WatchBatch, WatchEvent};

/// What a watcher buffers at most before it is read again, unless a single batch is larger.
pub(crate) const CHUNK_BYTES: usize = 512 * 1024;
pub(crate) const CHUNK_BATCHES: usize = 128;
/// How many changes a watcher looks through while it holds the ring's lock.
const SCAN: usize = 1024;

/// One committed revision with all its events.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) revision: u64,
    pub(crate) events: Vec<WatchEvent>,
}

/// Batches read at once, and where to go on.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) batches: Vec<WatchBatch>,
    pub(crate) next: u64,
}

/// The back end's history, for watchers that the ring has left behind.
#[async_trait]
pub(crate) trait Past: Send + Sync + 'static {
    /// Some batches from revision `from` on, which is at most the current one. Always makes progress: the chunk's
    /// `next` is beyond `from`. [`StoreError::TooOld`] when `from` is compacted.
    async fn chunk(&self, prefix: &str, from: u64) -> Result<Chunk>;
}

#[derive(Clone, Copy, Debug)]
struct Head {
    revision: u64,
    closed: bool,
}

#[derive(Debug)]
pub(crate) struct Feed {
    ring: Mutex<Ring>,
    head: watch::Sender<Head>,
}

#[derive(Debug)]
struct Ring {
    changes: VecDeque<Change>,
    /// The revision of the first change, or of the next one to come when there is none.
    first: u64,
    bytes: usize,
    max_bytes: usize,
    max_changes: usize,
}

enum Recent {
    Chunk(Chunk),
    /// Nothing new.
    UpToDate,
    /// Older than the ring.
    Behind,
}

impl Feed {
    /// A feed of the changes after `revision`.
    pub(crate) fn new(revision: u64, max_changes: usize, max_bytes: usize) -> Self {
        let ring = Ring { changes: VecDeque::new(), first: revision + 1, bytes: 0, max_bytes, max_changes };
        Self { ring: Mutex::new(ring), head: watch::Sender::new(Head { revision, closed: false }) }
    }

    /// The newest revision that was published.
    pub(crate) fn revision(&self) -> u64 {
        self.head.borrow().revision
    }

    /// Makes durable changes known. They follow the newest revision without a gap.
    pub(crate) fn publish(&self, changes: impl IntoIterator<Item = Change>) {
        let mut ring = self.ring.lock();
        changes.into_iter().for_each(|change| ring.push(change));
        let revision = ring.end() - 1;
        drop(ring);
        self.head.send_modify(|head| head.revision = revision);
    }

    /// Makes known that there were changes up to `revision` which only the history has.
    pub(crate) fn skip_to(&self, revision: u64) {
        let mut ring = self.ring.lock();
        ring.changes.clear();
        (ring.first, ring.bytes) = (revision + 1, 0);
        drop(ring);
        self.head.send_modify(|head| head.revision = revision);
    }

    /// Ends all watches with [`StoreError::Closed`].
    pub(crate) fn close(&self) {
        self.head.send_modify(|head| head.closed = true);
    }

    /// Follows what happens under `prefix` from revision `from` on.
    pub(crate) fn watch(self: &Arc<Self>, past: Arc<dyn Past>, prefix: &str, from: u64) -> Watch {
        let follower = Follower {
            head: self.head.subscribe(),
            feed: self.clone(),
            past,
            prefix: prefix.to_owned(),
            next: from,
            pending: VecDeque::new(),
            ended: false,
        };
        Watch::new(stream::unfold(follower, |mut follower| async {
            if follower.ended {
                return None;
            }
            let item = follower.next().await;
            follower.ended = item.is_err();
            Some((item, follower))
        }))
    }

    fn recent(&self, prefix: &str, from: u64) -> Recent {
        let ring = self.ring.lock();
        if from < ring.first {
            return Recent::Behind;
        }
        if from >= ring.end() {
            return Recent::UpToDate;
        }
        let mut collect = Collect::new(from);
        let start = usize::try_from(from - ring.first).expect("the position lies in the ring");
        for change in ring.changes.range(start..).take(SCAN) {
            if !collect.wants_more() {
                break;
            }
            let events: Vec<_> =
                change.events.iter().filter(|e| e.key().starts_with(prefix)).cloned().collect();
            collect.add(change.revision, events);
        }
        Recent::Chunk(collect.chunk)
    }
}

impl Ring {
    fn end(&self) -> u64 {
        self.first + self.changes.len() as u64
    }

    fn push(&mut self, change: Change) {
        debug_assert_eq!(change.revision, self.end(), "revisions are contiguous");
        self.bytes += weight(&change.events);
        self.changes.push_back(change);
        while self.changes.len() > self.max_changes || self.bytes > self.max_bytes {
            let Some(oldest) = self.changes.pop_front() else { break };
            self.first = oldest.revision + 1;
            self.bytes -= weight(&oldest.events);
        }
    }
}

/// About what events take in memory.
pub(crate) fn weight(events: &[WatchEvent]) -> usize {
    let of = |event: &WatchEvent| match event {
        WatchEvent::Put { kv } => kv.key.len() + kv.value.len(),
        WatchEvent::Delete { key } => key.len(),
    };
    events.iter().map(|event| of(event) + size_of::<WatchEvent>()).sum()
}

/// Gathers a chunk up to its limits.
pub(crate) struct Collect {
    pub(crate) chunk: Chunk,
    bytes: usize,
}

impl Collect {
    pub(crate) fn new(from: u64) -> Self {
        Self { chunk: Chunk { batches: Vec::new(), next: from }, bytes: 0 }
    }

    pub(crate) fn wants_more(&self) -> bool {
        self.bytes < CHUNK_BYTES && self.chunk.batches.len() < CHUNK_BATCHES
    }

    /// Takes all the matching events of one revision, which may be none.
    pub(crate) fn add(&mut self, revision: u64, events: Vec<WatchEvent>) {
        self.chunk.next = revision + 1;
        if !events.is_empty() {
            self.bytes += weight(&events);
            self.chunk.batches.push(WatchBatch { revision: Revision(revision), events });
        }
    }
}

/// One watcher.
struct Follower {
    feed: Arc<Feed>,
    past: Arc<dyn Past>,
    head: watch::Receiver<Head>,
    prefix: String,
    /// The first revision that was not looked at.
    next: u64,
    pending: VecDeque<WatchBatch>,
    ended: bool,
}

impl Follower {
    async fn next(&mut self) -> Result<WatchBatch> {
        loop {
            if let Some(batch) = self.pending.pop_front() {
                return Ok(batch);
            }
            // Marked as seen before the ring is looked at, so that no change between the two is slept through.
            let head = *self.head.borrow_and_update();
            if head.closed {
                return Err(StoreError::Closed);
            }
            let chunk = match self.feed.recent(&self.prefix, self.next) {
                Recent::Chunk(chunk) => chunk,
                Recent::Behind => self.past.chunk(&self.prefix, self.next).await?,
                Recent::UpToDate => {
                    self.head.changed().await.map_err(|_| StoreError::Closed)?;
                    continue;
                }
            };
            self.next = chunk.next;
            self.pending = chunk.batches.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(revision: u64, size: usize) -> Change {
        Change { revision, events: vec![WatchEvent::Delete { key: "x".repeat(size).into() }] }
    }

    #[test]
    fn the_ring_is_bounded_by_count_and_bytes() {
        let feed = Feed::new(7, 4, 10_000);
        feed.publish((8..20).map(|revision| change(revision, 1)));
        assert_eq!(feed.revision(), 19);
        assert!(matches!(feed.recent("", 15), Recent::Behind));
        assert!(matches!(feed.recent("", 16), Recent::Chunk(c) if c.batches.len() == 4 && c.next == 20));
        assert!(matches!(feed.recent("other", 16), Recent::Chunk(c) if c.batches.is_empty() && c.next == 20));
        assert!(matches!(feed.recent("", 20), Recent::UpToDate));

        feed.publish([change(20, 20_000)]);
        assert!(matches!(feed.recent("", 20), Recent::Behind));
        assert_eq!(feed.revision(), 20);
        feed.skip_to(22);
        assert!(matches!(feed.recent("", 22), Recent::Behind));
        feed.publish([change(23, 1)]);
        assert!(matches!(feed.recent("", 23), Recent::Chunk(_)));
    }
}
