//! Filters: what a node must have to take a VM at all.

use super::{Candidate, Need};
use crate::config::SchedulerConfig;

/// The first filter that a node does not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Obstacle {
    OtherNode,
    NotReady,
    Cordoned,
    Labels,
    NoHypervisor,
    Accelerator,
    Cpus,
    Memory,
    Disk,
}

impl Obstacle {
    pub const fn text(self) -> &'static str {
        match self {
            Self::OtherNode => "another node is asked for",
            Self::NotReady => "not ready",
            Self::Cordoned => "closed for new VMs",
            Self::Labels => "without the labels asked for",
            Self::NoHypervisor => "without QEMU",
            Self::Accelerator => "without the accelerator asked for",
            Self::Cpus => "not enough CPUs",
            Self::Memory => "not enough memory",
            Self::Disk => "not enough disk",
        }
    }
}

/// How much may be promised of `have`.
fn limit(have: u64, ratio: f64) -> u64 {
    (have as f64 * ratio) as u64
}

/// Why `candidate` cannot take `need`; none when it can.
pub fn obstacle(need: &Need, candidate: &Candidate, config: &SchedulerConfig) -> Option<Obstacle> {
    if need.node.as_ref().is_some_and(|node| *node != candidate.name) {
        return Some(Obstacle::OtherNode);
    }
    if !candidate.ready {
        return Some(Obstacle::NotReady);
    }
    if !candidate.schedulable {
        return Some(Obstacle::Cordoned);
    }
    if need.selector.iter().any(|(key, value)| candidate.labels.get(key) != Some(value)) {
        return Some(Obstacle::Labels);
    }
    if !candidate.hypervisor {
        return Some(Obstacle::NoHypervisor);
    }
    if need.accelerator.pick(&candidate.accelerators).is_none() {
        return Some(Obstacle::Accelerator);
    }
    let fits = |used: u64, more: u64, have: u64, ratio: f64| {
        used.checked_add(more).is_some_and(|sum| sum <= limit(have, ratio))
    };
    let used = &candidate.used;
    if !fits(used.cpus.into(), need.cpus.into(), candidate.cpus.into(), config.cpu_ratio) {
        return Some(Obstacle::Cpus);
    }
    if !fits(used.memory.0, need.memory.0, candidate.memory.0, config.memory_ratio) {
        return Some(Obstacle::Memory);
    }
    if !fits(used.disk.0, need.disk.0, candidate.disk.0, config.disk_ratio) {
        return Some(Obstacle::Disk);
    }
    None
}
