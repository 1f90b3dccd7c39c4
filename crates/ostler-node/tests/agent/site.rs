//! One simulated host with an agent that can be killed and started again, and its control plane.

use std::sync::Arc;
use std::time::Duration;

use ostler_node::{Agent, AgentConfig};
use ostler_qemu::{SimHost, SimHypervisor};
use ostler_storage::SimPool;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::crash::{Counts, Life, Metal, Mortal, When};
use crate::plane::{Plane, name};

pub(crate) struct Site {
    pub(crate) host: SimHost,
    pub(crate) pool: SimPool,
    pub(crate) plane: Arc<Plane>,
    pub(crate) config: AgentConfig,
    pub(crate) counts: Arc<Counts>,
    pub(crate) dir: tempfile::TempDir,
}

/// An agent at work.
pub(crate) struct Running {
    pub(crate) life: Arc<Life>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Site {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = AgentConfig::simulated(name("n1"), dir.path());
        config.look_every = Some(Duration::from_secs(10));
        Self {
            host: SimHost::default(),
            pool: SimPool::new(1 << 40),
            plane: Plane::new(),
            config,
            counts: Arc::default(),
            dir,
        }
    }

    pub(crate) fn agent(&self) -> Running {
        self.mortal_agent(None)
    }

    pub(crate) fn mortal_agent(&self, last: Option<(usize, When)>) -> Running {
        let life = Life::new(last, &self.counts);
        let agent = Agent::new(
            self.config.clone(),
            Arc::new(Mortal {
                inner: Metal { machines: SimHypervisor::new(self.host.clone()), pool: self.pool.clone() },
                life: Arc::clone(&life),
            }),
            Arc::new(Mortal { inner: self.pool.clone(), life: Arc::clone(&life) }),
            Arc::new(Mortal { inner: Arc::clone(&self.plane), life: Arc::clone(&life) }),
        );
        let shutdown = CancellationToken::new();
        let run = agent.run(shutdown.clone());
        let task = tokio::spawn(async move { run.await.unwrap() });
        Running { life, shutdown, task }
    }
}

impl Running {
    /// As kill -9 does it.
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    pub(crate) async fn end(self) {
        self.shutdown.cancel();
        self.task.await.unwrap();
    }
}

/// Waits until something is so; for what the control plane does not see.
pub(crate) async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("waited in vain for {what}");
}
