//! Which leases there are and when each ends. Pure: time is an argument. Both back ends keep one such table in memory;
//! which keys hang on a lease is their affair.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::{LeaseId, Result, StoreError};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Lease {
    ttl: Duration,
    deadline: Instant,
}

#[derive(Debug, Default)]
pub(crate) struct Leases {
    leases: HashMap<LeaseId, Lease>,
}

impl Leases {
    pub(crate) fn insert(&mut self, id: LeaseId, ttl: Duration, now: Instant) {
        self.leases.insert(id, Lease { ttl, deadline: now + ttl });
    }

    /// Refuses a lease whose time is over, even when its keys are not deleted yet: an ended lease never revives.
    pub(crate) fn check(&self, id: LeaseId, now: Instant) -> Result<()> {
        match self.leases.get(&id) {
            Some(lease) if now < lease.deadline => Ok(()),
            Some(_) | None => Err(StoreError::LeaseNotFound { id }),
        }
    }

    pub(crate) fn keep_alive(&mut self, id: LeaseId, now: Instant) -> Result<()> {
        match self.leases.get_mut(&id) {
            Some(lease) if now < lease.deadline => {
                lease.deadline = now + lease.ttl;
                Ok(())
            }
            Some(_) | None => Err(StoreError::LeaseNotFound { id }),
        }
    }

    pub(crate) fn remove(&mut self, id: LeaseId) -> Result<Lease> {
        self.leases.remove(&id).ok_or(StoreError::LeaseNotFound { id })
    }

    /// Undoes a [`Leases::remove`].
    pub(crate) fn put_back(&mut self, id: LeaseId, lease: Lease) {
        self.leases.insert(id, lease);
    }

    /// Those whose time is over, in a fixed order.
    pub(crate) fn ended(&self, now: Instant) -> Vec<LeaseId> {
        let mut ended: Vec<_> =
            self.leases.iter().filter(|(_, lease)| lease.deadline <= now).map(|(id, _)| *id).collect();
        ended.sort_unstable();
        ended
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.deadline).min()
    }
}

/// The longest lease, so that adding one to a clock cannot overflow.
const MAX_TTL: Duration = Duration::from_secs(365 * 24 * 3600);

pub(crate) fn check_ttl(ttl: Duration) -> Result<()> {
    if ttl.is_zero() || ttl > MAX_TTL {
        return Err(StoreError::invalid(format!(
            "a lease of {ttl:?}: it must be above 0 and at most {MAX_TTL:?}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_lives_while_kept_alive_and_never_revives() {
        let (id, ttl, start) = (LeaseId(1), Duration::from_secs(10), Instant::now());
        let mut leases = Leases::default();
        leases.insert(id, ttl, start);
        leases.keep_alive(id, start + Duration::from_secs(9)).unwrap();
        assert_eq!(leases.next_deadline(), Some(start + Duration::from_secs(19)));
        assert!(leases.ended(start + Duration::from_secs(18)).is_empty());

        let end = start + Duration::from_secs(19);
        assert_eq!(leases.ended(end), [id]);
        assert!(leases.check(id, end).is_err());
        assert!(leases.keep_alive(id, end).is_err());
        leases.remove(id).unwrap();
        assert!(leases.remove(id).is_err());
        assert_eq!(leases.next_deadline(), None);
    }
}
