//! What an operator can set about the cloud's rules.

use std::time::Duration;

use ostler_api::ByteSize;

/// Settings of the control plane. [`Default`] is what a new cloud gets.
#[derive(Debug, Clone)]
pub struct CloudConfig {
    pub scheduler: SchedulerConfig,
    /// A node that has not sent a heartbeat for this long is unreachable.
    pub node_lease: Duration,
    /// No other server can use this store, because it is locked: what an earlier one held is free at once.
    pub sole_server: bool,
    /// How long the acting controller may be silent before another takes over.
    pub leader_lease: Duration,
    /// Largest virtual size of an image.
    pub image_max: ByteSize,
    /// Whether images may be fetched from private, loopback and link-local addresses.
    pub fetch_private: bool,
    /// How long finished operations are kept.
    pub operations_kept: Duration,
    /// How long events are kept.
    pub events_kept: Duration,
    /// Most events kept, whatever their age.
    pub events_max: usize,
    /// Most finished operations kept, whatever their age.
    pub operations_max: usize,
    /// How often the janitor looks.
    pub janitor_every: Duration,
}

impl Default for CloudConfig {
    fn default() -> Self {
        Self {
            scheduler: SchedulerConfig::default(),
            node_lease: Duration::from_secs(15),
            sole_server: false,
            leader_lease: Duration::from_secs(10),
            image_max: ByteSize::gib(16 * 1024),
            fetch_private: false,
            operations_kept: Duration::from_secs(7 * 86_400),
            events_kept: Duration::from_secs(7 * 86_400),
            events_max: 20_000,
            operations_max: 20_000,
            janitor_every: Duration::from_secs(60),
        }
    }
}

/// How full nodes may get, and which of those that fit is taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerConfig {
    /// Virtual CPUs per CPU of the host.
    pub cpu_ratio: f64,
    /// Promised memory per memory of the host.
    pub memory_ratio: f64,
    /// Promised disk per disk of the pool.
    pub disk_ratio: f64,
    /// Positive spreads VMs over nodes, negative packs them.
    pub spread: f64,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self { cpu_ratio: 16.0, memory_ratio: 1.0, disk_ratio: 4.0, spread: 1.0 }
    }
}
