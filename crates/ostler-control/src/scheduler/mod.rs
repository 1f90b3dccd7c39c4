//! The scheduler: pure functions from a VM and the nodes to a place, or to why there is none.
//!
//! Filters take nodes out, each with a reason; weights order those that are left. Nothing here reads or writes anything.

mod filter;
mod weigh;

use ostler_api::metadata::Labels;
use ostler_api::node::{Allocation, Node, NodePhase};
use ostler_api::{Accelerator, AcceleratorWish, ByteSize, Name};

use crate::config::SchedulerConfig;

pub use filter::{Obstacle, obstacle};
pub use weigh::weight;

/// What a VM needs of a node.
#[derive(Debug, Clone)]
pub struct Need {
    pub cpus: u32,
    pub memory: ByteSize,
    pub disk: ByteSize,
    pub accelerator: AcceleratorWish,
    pub selector: Labels,
    pub node: Option<Name>,
}

/// A node as the scheduler sees it; `used` grows with each decision of a batch.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub name: Name,
    pub labels: Labels,
    pub ready: bool,
    pub schedulable: bool,
    pub hypervisor: bool,
    pub accelerators: Vec<Accelerator>,
    pub cpus: u32,
    pub memory: ByteSize,
    pub disk: ByteSize,
    pub used: Allocation,
}

impl Candidate {
    pub fn new(node: &Node, used: Allocation) -> Self {
        let facts = node.status.facts.as_ref();
        Self {
            name: node.metadata.name.clone(),
            labels: node.metadata.labels.clone(),
            ready: node.status.phase == NodePhase::Ready,
            schedulable: node.spec.schedulable,
            hypervisor: facts.is_some_and(|facts| facts.hypervisor.is_some()),
            accelerators: facts.map(|facts| facts.accelerators.clone()).unwrap_or_default(),
            cpus: facts.map_or(0, |facts| facts.cpus),
            memory: facts.map_or(ByteSize(0), |facts| facts.memory),
            disk: facts.map_or(ByteSize(0), |facts| facts.disk),
            used,
        }
    }

    /// Reserves what `need` needs.
    pub fn take(&mut self, need: &Need) {
        self.used.vms += 1;
        self.used.cpus = self.used.cpus.saturating_add(need.cpus);
        self.used.memory.0 = self.used.memory.0.saturating_add(need.memory.0);
        self.used.disk.0 = self.used.disk.0.saturating_add(need.disk.0);
    }
}

/// Why no node fits: each obstacle with the number of nodes it took out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoPlace {
    pub obstacles: Vec<(Obstacle, usize)>,
    /// Whether waiting can help: a node that is only full or away may have room later.
    pub hopeless: bool,
}

impl NoPlace {
    /// For people: which obstacle stood how often.
    pub fn message(&self) -> String {
        if self.obstacles.is_empty() {
            return "there is no node; start one with ostler serve".to_owned();
        }
        let parts: Vec<String> = self
            .obstacles
            .iter()
            .map(|(obstacle, count)| {
                format!("{} ({count} node{})", obstacle.text(), if *count == 1 { "" } else { "s" })
            })
            .collect();
        format!("no node fits: {}", parts.join(", "))
    }
}

/// The index of the best candidate. Of equals the first by name, so that the same question has the same answer.
pub fn place(need: &Need, candidates: &[Candidate], config: &SchedulerConfig) -> Result<usize, NoPlace> {
    let mut best: Option<(usize, f64)> = None;
    for (index, candidate) in candidates.iter().enumerate() {
        if obstacle(need, candidate, config).is_some() {
            continue;
        }
        let weight = weight(need, candidate, config);
        let better = match best {
            None => true,
            Some((other, highest)) => {
                weight > highest || (weight == highest && candidate.name < candidates[other].name)
            }
        };
        if better {
            best = Some((index, weight));
        }
    }
    best.map(|(index, _)| index).ok_or_else(|| why_not(need, candidates, config))
}

fn why_not(need: &Need, candidates: &[Candidate], config: &SchedulerConfig) -> NoPlace {
    let mut obstacles: Vec<(Obstacle, usize)> = Vec::new();
    let mut hopeless = true;
    for candidate in candidates {
        let Some(found) = obstacle(need, candidate, config) else { continue };
        match obstacles.iter_mut().find(|(other, _)| *other == found) {
            Some((_, count)) => *count += 1,
            None => obstacles.push((found, 1)),
        }
        // An empty node that is there: would it do?
        let mut empty = candidate.clone();
        empty.used = Allocation::default();
        empty.ready = true;
        empty.schedulable = true;
        hopeless &= obstacle(need, &empty, config).is_some();
    }
    obstacles.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    // A cloud without nodes may get one any moment.
    NoPlace { hopeless: hopeless && !obstacles.is_empty(), obstacles }
}

#[cfg(test)]
mod tests;
