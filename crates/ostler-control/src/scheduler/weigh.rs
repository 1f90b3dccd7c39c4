//! Weights: which of the nodes that fit is best.

use super::{Candidate, Need};
use crate::config::SchedulerConfig;

/// The share of a resource that is left after `need`, 0 to 1.
fn left(used: u64, more: u64, have: u64, ratio: f64) -> f64 {
    let limit = have as f64 * ratio;
    if limit <= 0.0 { 0.0 } else { (1.0 - (used as f64 + more as f64) / limit).max(0.0) }
}

/// Higher is better. Memory counts most, since it is what runs out first.
pub fn weight(need: &Need, candidate: &Candidate, config: &SchedulerConfig) -> f64 {
    let used = &candidate.used;
    let free = 2.0 * left(used.memory.0, need.memory.0, candidate.memory.0, config.memory_ratio)
        + left(used.cpus.into(), need.cpus.into(), candidate.cpus.into(), config.cpu_ratio)
        + left(used.disk.0, need.disk.0, candidate.disk.0, config.disk_ratio);
    config.spread * free
}
