//! The thread that writes. It takes everything that waits, evaluates it in order inside one SQLite transaction, commits
//! once, and only then answers: one sync for all. While it syncs, the next group gathers.
//!
//! Between requests it ends leases whose time is over and lets the past go. What holds: memory (the ring, the leases, the
//! revision) changes only after the commit is durable, and a group that fails leaves no trace.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::sync::oneshot;

use super::apply::{Effects, Group};
use super::error::sql;
use super::layout::RowId;
use super::sweep::Sweep;
use super::{Core, upgrade};
use crate::{LeaseId, Result, Revision, RewriteFn, StoreError, Txn, TxnOutcome};

/// Requests in one commit.
const MAX_GROUP: usize = 1024;
/// Rows looked at in one step of sweeping when nobody waits. Steps that come with a group follow its size.
const SWEEP_ROWS: usize = 512;
/// How long own work rests after a failure (the disk is full, say).
const REST: Duration = Duration::from_secs(1);

type Reply<T> = oneshot::Sender<Result<T>>;

pub(super) enum Request {
    Txn { txn: Txn, reply: Reply<TxnOutcome> },
    Grant { ttl: Duration, reply: Reply<LeaseId> },
    Revoke { id: LeaseId, reply: Reply<()> },
    Compact { before: Revision, reply: Reply<()> },
    Upgrade { from: u32, to: u32, rewrite: RewriteFn, reply: Reply<()> },
}

/// An answer that waits for the commit.
enum Answer {
    Txn(Reply<TxnOutcome>, Result<TxnOutcome>),
    Lease(Reply<LeaseId>, Result<LeaseId>),
    Unit(Reply<()>, Result<()>),
}

pub(super) struct Writer {
    core: Arc<Core>,
    connection: Connection,
    revision: u64,
    sweep: Sweep,
    next_tick: Instant,
    /// When the next lease may end, at the earliest.
    next_lease: Option<Instant>,
    /// Own work rests until then.
    rest_until: Option<Instant>,
    failing: bool,
}

/// Own work that is due.
struct Due {
    leases: Vec<LeaseId>,
    tick: bool,
    sweep: bool,
}

impl Writer {
    pub(super) fn new(
        core: Arc<Core>,
        connection: Connection,
        revision: u64,
        swept: RowId,
        history: Duration,
    ) -> Self {
        let next_lease = core.leases.lock().next_deadline();
        let sweep = Sweep::new(swept, history);
        Self {
            core,
            connection,
            revision,
            sweep,
            next_tick: Instant::now(),
            next_lease,
            rest_until: None,
            failing: false,
        }
    }

    pub(super) fn run(mut self) {
        let mut batch = Vec::new();
        while self.core.requests.take(&mut batch, MAX_GROUP, Some(self.next_own_work())) {
            let mut group = Vec::with_capacity(batch.len());
            for request in batch.drain(..) {
                match request {
                    Request::Upgrade { from, to, rewrite, reply } => {
                        self.commit(std::mem::take(&mut group));
                        let _ = reply.send(self.upgrade(from, to, rewrite));
                    }
                    request @ (Request::Txn { .. }
                    | Request::Grant { .. }
                    | Request::Revoke { .. }
                    | Request::Compact { .. }) => group.push(request),
                }
            }
            self.commit(group);
        }
    }

    fn next_own_work(&self) -> Instant {
        let now = Instant::now();
        let sweep = self.sweep.pending.then_some(now);
        let next = [Some(self.next_tick), self.next_lease, sweep].into_iter().flatten().min().unwrap_or(now);
        self.rest_until.map_or(next, |rest| next.max(rest))
    }

    fn due(&self, now: Instant) -> Due {
        if self.rest_until.is_some_and(|rest| now < rest) {
            return Due { leases: Vec::new(), tick: false, sweep: false };
        }
        let leases = match self.next_lease {
            Some(next) if next <= now => self.core.leases.lock().ended(now),
            Some(_) | None => Vec::new(),
        };
        Due { leases, tick: self.next_tick <= now, sweep: self.sweep.pending }
    }

    /// One group: own work that is due, and the requests.
    fn commit(&mut self, requests: Vec<Request>) {
        let now = Instant::now();
        let due = self.due(now);
        if due.leases.is_empty() && !due.tick && !due.sweep && requests.is_empty() {
            self.next_lease = self.core.leases.lock().next_deadline();
            return;
        }
        let mut answers = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter();
        // What sweeping remembers changes only with the commit.
        let mut sweep = self.sweep.clone();
        let result = self.transaction(|group| {
            for id in &due.leases {
                // One that was revoked meanwhile is gone already.
                let _ = group.end_lease(*id)?;
            }
            for request in requests.by_ref() {
                answers.push(evaluate(group, request)?);
            }
            if due.tick {
                sweep.tick(group)?;
            }
            if due.sweep {
                let most = if answers.is_empty() { SWEEP_ROWS } else { answers.len() * 2 };
                sweep.step(group, most)?;
            }
            Ok(())
        });
        match result {
            Ok(effects) => {
                sweep.pending |= effects.compacted > self.core.compacted();
                self.sweep = sweep;
                if due.tick {
                    self.next_tick = now + self.sweep.interval();
                }
                self.rest_until = None;
                self.take_effect(effects);
                answers.into_iter().for_each(Answer::send);
                if self.next_lease.is_some_and(|next| next <= now) {
                    self.next_lease = self.core.leases.lock().next_deadline();
                }
            }
            Err(error) => {
                self.rest_until = Some(now + REST);
                answers.into_iter().for_each(|answer| answer.fail(&error));
                requests.for_each(|request| request.fail(&error));
            }
        }
    }

    /// Runs `work` in a transaction that is durable when this returns its effects, or has not happened.
    fn transaction(&mut self, work: impl FnOnce(&mut Group<'_>) -> Result<()>) -> Result<Effects> {
        let core = self.core.clone();
        let path = &core.path;
        let sql = sql("writing to", path);
        let mut group = Group::new(&self.connection, path, &core.leases, self.revision, core.compacted());
        let result = execute(&self.connection, "BEGIN IMMEDIATE")
            .map_err(&sql)
            .and_then(|()| work(&mut group))
            .and_then(|()| execute(&self.connection, "COMMIT").map_err(&sql));
        let effects = group.effects;
        match result {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!(path = %path.display(), "writing works again");
                }
                Ok(effects)
            }
            Err(error) => {
                let mut leases = core.leases.lock();
                effects.ended.into_iter().for_each(|(id, lease)| leases.put_back(id, lease));
                drop(leases);
                self.roll_back(&error);
                Err(error)
            }
        }
    }

    fn roll_back(&mut self, cause: &StoreError) {
        let path = self.core.path.display();
        if !self.connection.is_autocommit()
            && let Err(error) = execute(&self.connection, "ROLLBACK")
        {
            tracing::error!(%path, %error, "rolling back failed");
        }
        match cause {
            // The caller's affair.
            StoreError::Upgrade { .. } => return,
            // What is in the log already may find room in the file, after which the log is written from its start again.
            StoreError::Full { .. } => {
                let _ = self.connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
            }
            _ => {}
        }
        if !std::mem::replace(&mut self.failing, true) {
            tracing::error!(%path, error = cause as &dyn std::error::Error, "writing failed");
        }
    }

    fn take_effect(&mut self, effects: Effects) {
        self.revision = effects.revision;
        self.core.compacted.store(effects.compacted, Ordering::Release);
        if !effects.granted.is_empty() {
            let (mut leases, now) = (self.core.leases.lock(), Instant::now());
            for (id, ttl) in effects.granted {
                leases.insert(id, ttl, now);
                self.next_lease = Some(self.next_lease.map_or(now + ttl, |next| next.min(now + ttl)));
            }
        }
        if !effects.changes.is_empty() {
            self.core.feed.publish(effects.changes);
        }
    }

    fn upgrade(&mut self, from: u32, to: u32, rewrite: RewriteFn) -> Result<()> {
        upgrade::check_version(self.core.schema.load(Ordering::Acquire), from)?;
        let copy = upgrade::keep_copy(&self.connection, &self.core.path, self.revision, from)?;
        let effects = self
            .transaction(|group| upgrade::rewrite(group, to, rewrite))
            .inspect_err(|_| upgrade::drop_copy(copy))?;
        self.core.schema.store(to, Ordering::Release);
        if effects.revision > self.revision {
            self.core.feed.skip_to(effects.revision);
        }
        self.take_effect(effects);
        Ok(())
    }
}

fn execute(connection: &Connection, text: &str) -> rusqlite::Result<()> {
    connection.prepare_cached(text)?.execute([])?;
    Ok(())
}

/// The outer error breaks the whole group.
fn evaluate(group: &mut Group<'_>, request: Request) -> Result<Answer> {
    match request {
        Request::Txn { txn, reply } => match group.txn(&txn) {
            Ok(answer) => Ok(Answer::Txn(reply, answer)),
            Err(error) => broken(reply, error),
        },
        Request::Grant { ttl, reply } => match group.grant(ttl) {
            Ok(id) => Ok(Answer::Lease(reply, Ok(id))),
            Err(error) => broken(reply, error),
        },
        Request::Revoke { id, reply } => match group.end_lease(id) {
            Ok(answer) => Ok(Answer::Unit(reply, answer)),
            Err(error) => broken(reply, error),
        },
        Request::Compact { before, reply } => match group.compact(before) {
            Ok(answer) => Ok(Answer::Unit(reply, answer)),
            Err(error) => broken(reply, error),
        },
        Request::Upgrade { reply, .. } => {
            let error = StoreError::invalid("an upgrade has a transaction of its own");
            Ok(Answer::Unit(reply, Err(error)))
        }
    }
}

/// Answers the request that broke the group.
fn broken<T>(reply: Reply<T>, error: StoreError) -> Result<Answer> {
    let _ = reply.send(Err(error.clone()));
    Err(error)
}

impl Answer {
    // A receiver that is gone does not want to know.
    fn send(self) {
        match self {
            Self::Txn(reply, answer) => drop(reply.send(answer)),
            Self::Lease(reply, answer) => drop(reply.send(answer)),
            Self::Unit(reply, answer) => drop(reply.send(answer)),
        }
    }

    fn fail(self, error: &StoreError) {
        match self {
            Self::Txn(reply, _) => drop(reply.send(Err(error.clone()))),
            Self::Lease(reply, _) => drop(reply.send(Err(error.clone()))),
            Self::Unit(reply, _) => drop(reply.send(Err(error.clone()))),
        }
    }
}

impl Request {
    fn fail(self, error: &StoreError) {
        match self {
            Self::Txn { reply, .. } => drop(reply.send(Err(error.clone()))),
            Self::Grant { reply, .. } => drop(reply.send(Err(error.clone()))),
            Self::Revoke { reply, .. } | Self::Compact { reply, .. } | Self::Upgrade { reply, .. } => {
                drop(reply.send(Err(error.clone())));
            }
        }
    }
}
