//! The embedded back end: one SQLite file in WAL mode, every commit synced.
//!
//! One thread writes ([`writer`]); all transactions that wait for it share one durable commit. A few threads read, each
//! on a snapshot of its own, and never hold up the writer. Asynchronous callers reach both through bounded queues, so
//! that no disk ever blocks the runtime. Recent changes are also kept in memory, for watchers ([`crate::feed`]).
//!
//! Layout of the file: [`layout`]. One process at a time: [`lock`].

mod apply;
mod copy;
mod error;
mod layout;
mod lock;
mod open;
mod read;
mod sweep;
mod upgrade;
mod writer;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::feed::{Chunk, Feed, Past};
use crate::leases::{Leases, check_ttl};
use crate::limits::check_txn;
use crate::queue::Queue;
use crate::{
    KeyValue, LeaseId, ListPage, ListQuery, Result, Revision, RewriteFn, Store, StoreError, Txn, TxnOutcome,
    Watch,
};

use lock::Lock;
use writer::{Request, Writer};

/// Requests that may wait for the writer, and for the readers, before further callers wait for room.
const QUEUE_PLACES: usize = 4096;
const RING_CHANGES: usize = 8192;
const RING_BYTES: usize = 8 * 1024 * 1024;

#[derive(Clone, Debug)]
pub struct SqliteOptions {
    /// The database file. Files with the same name and a suffix belong to it (`-wal`, `-shm`, `.lock`).
    pub path: PathBuf,
    /// How long the past can be read and watched.
    pub history: Duration,
    /// Threads that read.
    pub readers: usize,
    /// The largest size of the database file in bytes; beyond it writes fail with [`StoreError::Full`].
    pub max_bytes: Option<u64>,
}

impl SqliteOptions {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), history: Duration::from_secs(3600), readers: 3, max_bytes: None }
    }
}

/// A store in an SQLite file. Dropping it ends its watches, finishes the writes that wait, and gives up the lock; this
/// waits for the threads, usually some milliseconds.
pub struct SqliteStore {
    core: Arc<Core>,
    readers: Vec<JoinHandle<()>>,
    writer: Option<JoinHandle<()>>,
    /// Let go last, when no thread uses the file any more.
    _lock: Lock,
}

/// What the callers, the watches and the threads share.
struct Core {
    path: PathBuf,
    feed: Arc<Feed>,
    requests: Queue<Request>,
    jobs: Queue<Job>,
    leases: Mutex<Leases>,
    /// Set after it is durable and before anything is swept away: a read that looks at it afterwards and finds it
    /// old enough has read complete history.
    compacted: AtomicU64,
    schema: AtomicU32,
}

type Job = Box<dyn FnOnce(&Connection) + Send>;

impl SqliteStore {
    /// Opens the database, or makes a new one where there is none.
    ///
    /// Blocks for the time of a few disk reads, longer to check a file of less than 32 MiB in full. Fails with
    /// [`StoreError::Locked`], [`StoreError::Damaged`], [`StoreError::NotADatabase`] or [`StoreError::SchemaTooNew`]
    /// rather than use a file that is not wholly and solely ours.
    pub fn open(options: SqliteOptions) -> Result<Arc<Self>> {
        let opened = open::open(&options)?;
        let core = Arc::new(Core {
            path: options.path.clone(),
            feed: Arc::new(Feed::new(opened.revision, RING_CHANGES, RING_BYTES)),
            requests: Queue::new(QUEUE_PLACES),
            jobs: Queue::new(QUEUE_PLACES),
            leases: Mutex::new(opened.leases),
            compacted: AtomicU64::new(opened.compacted),
            schema: AtomicU32::new(opened.schema),
        });
        let mut store = Self { core: core.clone(), readers: Vec::new(), writer: None, _lock: opened.lock };
        for _ in 0..options.readers.max(1) {
            let (core, connection) = (core.clone(), open::connect(&options)?);
            let work = move || {
                while let Some(job) = core.jobs.pop() {
                    job(&connection);
                }
            };
            store.readers.push(spawn("store-read", work)?);
        }
        let writer = Writer::new(core, opened.connection, opened.revision, opened.swept, options.history);
        store.writer = Some(spawn("store-write", move || writer.run())?);
        Ok(Arc::new(store))
    }

    /// Writes a consistent copy of the whole store to a new file, while everything goes on. The copy is complete and
    /// durable when this returns; an existing file is never overwritten.
    pub async fn backup_to(&self, path: impl Into<PathBuf>) -> Result<()> {
        let path = path.into();
        self.core.read(move |connection, _| copy::copy(connection, &path)).await
    }

    pub fn path(&self) -> &Path {
        &self.core.path
    }

    async fn request<T>(&self, make: impl FnOnce(oneshot::Sender<Result<T>>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.core.requests.push(make(reply)).await?;
        answer.await.map_err(|_| StoreError::Closed)?
    }
}

impl Core {
    fn compacted(&self) -> u64 {
        self.compacted.load(Ordering::Acquire)
    }

    /// Runs `job` on one of the reading threads.
    async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        job: impl FnOnce(&Connection, &Core) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let core = self.clone();
        let job = move |connection: &Connection| {
            // Nobody waits for it any more: leave the thread to others.
            if !reply.is_closed() {
                let _ = reply.send(job(connection, &core));
            }
        };
        self.jobs.push(Box::new(job)).await?;
        answer.await.map_err(|_| StoreError::Closed)?
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map_err(|error| StoreError::io(format!("starting the thread {name}"), error))
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.core.feed.close();
        let join = |thread: JoinHandle<()>| {
            if thread.join().is_err() {
                tracing::error!(path = %self.core.path.display(), "a thread of the store panicked");
            }
        };
        // The connection that closes last takes the log into the file. When several close at once, each finds that it is
        // not alone and none does; so the writer closes when the readers have.
        self.core.jobs.close();
        self.readers.drain(..).for_each(join);
        self.core.requests.close();
        self.writer.take().into_iter().for_each(join);
    }
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStore")
            .field("path", &self.core.path)
            .field("revision", &self.core.feed.revision())
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Past for Arc<Core> {
    async fn chunk(&self, prefix: &str, from: u64) -> Result<Chunk> {
        let prefix = prefix.to_owned();
        self.read(move |connection, core| read::chunk(connection, core, &prefix, from)).await
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn get(&self, key: &str, at: Option<Revision>) -> Result<Option<KeyValue>> {
        let key = key.to_owned();
        self.core.read(move |connection, core| read::get(connection, core, &key, at)).await
    }

    async fn list(&self, query: ListQuery) -> Result<ListPage> {
        self.core.read(move |connection, core| read::list(connection, core, &query)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        check_txn(&txn)?;
        self.request(|reply| Request::Txn { txn, reply }).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Watch> {
        let from = from.0.max(1);
        let compacted = self.core.compacted();
        if from <= compacted {
            return Err(StoreError::TooOld { compacted: Revision(compacted) });
        }
        Ok(self.core.feed.watch(Arc::new(self.core.clone()), prefix, from))
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId> {
        check_ttl(ttl)?;
        self.request(|reply| Request::Grant { ttl, reply }).await
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<()> {
        self.core.leases.lock().keep_alive(id, Instant::now())
    }

    async fn lease_revoke(&self, id: LeaseId) -> Result<()> {
        self.request(|reply| Request::Revoke { id, reply }).await
    }

    async fn compact(&self, before: Revision) -> Result<()> {
        self.request(|reply| Request::Compact { before, reply }).await
    }

    async fn revision(&self) -> Result<Revision> {
        Ok(Revision(self.core.feed.revision()))
    }

    async fn schema_version(&self) -> Result<u32> {
        Ok(self.core.schema.load(Ordering::Acquire))
    }

    async fn schema_upgrade(&self, from: u32, to: u32, rewrite: RewriteFn) -> Result<()> {
        self.request(|reply| Request::Upgrade { from, to, rewrite, reply }).await
    }
}
