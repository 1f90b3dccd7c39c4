//! How many connections there may be, and whose. Pure counting; asked by the accept loops.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

/// Counts connections of one kind of listener, and caps them: in all, and for one address at half of that, so that one
/// client cannot keep all others out.
#[derive(Debug)]
pub(crate) struct Connections {
    max: usize,
    open: Mutex<Open>,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Open {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// Leave to hold one connection; given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    connections: Arc<Connections>,
    address: Option<IpAddr>,
}

/// The permit, shared with what goes on over the connection after its HTTP has ended (a WebSocket).
#[derive(Debug, Clone)]
pub(crate) struct Held(#[allow(dead_code, reason = "held for its drop")] Arc<Permit>);

impl Held {
    pub(crate) fn new(permit: Permit) -> Self {
        Self(Arc::new(permit))
    }
}

impl Connections {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max: max.max(1), open: Mutex::default(), refused: AtomicU64::new(0) })
    }

    /// A place for a connection from `address` (none for the unix socket), if there is one.
    pub(crate) fn admit(self: &Arc<Self>, address: Option<IpAddr>) -> Option<Permit> {
        let mut open = self.open.lock();
        let share = address.map(|address| open.by_address.get(&address).copied().unwrap_or(0));
        let too_many = share.is_some_and(|held| held >= self.max.div_ceil(2));
        if open.all >= self.max || too_many {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        open.all += 1;
        if let Some(address) = address {
            *open.by_address.entry(address).or_default() += 1;
        }
        Some(Permit { connections: Arc::clone(self), address })
    }

    pub(crate) fn open(&self) -> usize {
        self.open.lock().all
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut open = self.connections.open.lock();
        open.all -= 1;
        if let Some(address) = self.address
            && let Some(held) = open.by_address.get_mut(&address)
        {
            *held -= 1;
            if *held == 0 {
                open.by_address.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_gets_half() {
        let connections = Connections::new(4);
        let (greedy, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let held: Vec<_> = (0..4).filter_map(|_| connections.admit(Some(greedy))).collect();
        assert_eq!(held.len(), 2);
        assert!(connections.admit(Some(other)).is_some());
        assert_eq!((connections.open(), connections.refused()), (2, 2));
        drop(held);
        assert_eq!(connections.open(), 0);
        assert!(connections.open.lock().by_address.is_empty());
        assert!(connections.admit(Some(greedy)).is_some());
    }

    #[test]
    fn the_unix_socket_is_one_peer() {
        let connections = Connections::new(2);
        let held: Vec<_> = (0..3).filter_map(|_| connections.admit(None)).collect();
        assert_eq!(held.len(), 2);
    }
}
