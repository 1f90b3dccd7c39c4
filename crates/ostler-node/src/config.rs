//! The agent's settings. Made by the binary (one agent per host) and by tests and benchmarks (thousands in a process).

use std::path::PathBuf;
use std::time::Duration;

use ostler_api::Name;
use ostler_api::metadata::Labels;

use crate::keep::Keep;

#[derive(Debug, Clone)]
pub struct AgentConfig {
    pub node_name: Name,
    /// Holds the node's id, a directory per VM (record, saved memory, UEFI variables, last console output) and the
    /// records of volumes.
    pub data_dir: PathBuf,
    /// Where the pool keeps cached images (`SHA256.FORMAT`): kernels, initrds and CDs are opened from here.
    pub pool_images: PathBuf,
    /// The control plane's image store when it is on this host: linked from there instead of downloaded.
    pub image_source: Option<PathBuf>,
    /// Sent with the registration; the scheduler selects by them.
    pub labels: Labels,
    /// Where records are kept.
    pub keep: Keep,
    /// Identifies one run of the host; none reads it from the kernel.
    pub host_boot: Option<String>,
    /// How often a machine is looked at although it reports nothing; never when none.
    pub look_every: Option<Duration>,
    /// Whether published ports are tried on the host before QEMU is started.
    pub check_ports: bool,
    /// Most machines that start at the same time.
    pub starts_max: usize,
    pub times: Times,
}

/// Deadlines and intervals. Every call to a driver or to the control plane has one.
#[derive(Debug, Clone)]
pub struct Times {
    /// One question to a machine's monitor.
    pub ask: Duration,
    /// A machine's end, by force in the last resort.
    pub end: Duration,
    /// A start, reading a saved state not counted.
    pub start: Duration,
    /// Writing or reading a machine's memory.
    pub state: Duration,
    /// One call to the storage pool that is expected to be quick.
    pub pool: Duration,
    /// Bringing an image here.
    pub image: Duration,
    /// How long a start waits for its volumes to be announced.
    pub volumes: Duration,
    /// Between two presses of the power button.
    pub press: Duration,
    /// One request to the control plane.
    pub request: Duration,
    /// A work stream that is silent for so long is dead; the control plane sends a bookmark every 5 s.
    pub silence: Duration,
    /// First and longest pause before a reconnect.
    pub backoff: (Duration, Duration),
    /// Between two looks at the host's own facts.
    pub facts: Duration,
    /// After this an answer that the control plane still waits for is said again.
    pub repeat: Duration,
    /// What is under way when the agent is told to stop may take so long.
    pub grace: Duration,
}

impl Default for Times {
    fn default() -> Self {
        let secs = Duration::from_secs;
        Self {
            ask: secs(15),
            end: secs(45),
            start: secs(90),
            state: secs(1800),
            pool: secs(60),
            image: secs(1800),
            volumes: secs(120),
            press: secs(10),
            request: secs(30),
            silence: secs(20),
            backoff: (Duration::from_millis(100), secs(10)),
            facts: secs(60),
            repeat: secs(5),
            grace: secs(3),
        }
    }
}

impl AgentConfig {
    /// A real host: records in `data_dir`, the pool in `data_dir/pool`.
    pub fn new(node_name: Name, data_dir: impl Into<PathBuf>) -> Self {
        let data_dir = data_dir.into();
        Self {
            node_name,
            pool_images: data_dir.join("pool").join("images"),
            keep: Keep::directory(&data_dir),
            data_dir,
            image_source: None,
            labels: Labels::new(),
            host_boot: None,
            look_every: Some(Duration::from_secs(10)),
            check_ports: true,
            starts_max: 32,
            times: Times::default(),
        }
    }

    /// A simulated host: nothing is looked at without need, and only suspended memory is kept in `data_dir`. A clone
    /// of the same configuration is the same host after a restart of its agent.
    pub fn simulated(node_name: Name, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            keep: Keep::memory(),
            look_every: None,
            check_ports: false,
            host_boot: Some("simulated".to_owned()),
            ..Self::new(node_name, data_dir)
        }
    }
}
