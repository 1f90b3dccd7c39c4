//! Numbers of the control plane, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::cloud::Cloud;

/// Counters that grow for the life of the process.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    broken: AtomicBool,
    leader: AtomicBool,
    placements: AtomicU64,
    placement_micros: AtomicU64,
    unplaceable: AtomicU64,
    deadlines: AtomicU64,
}

impl Metrics {
    /// The store's watch has ended.
    pub(crate) fn broken(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }
    pub(crate) fn leads(&self, leads: bool) {
        self.leader.store(leads, Ordering::Relaxed);
    }
    pub(crate) fn placed(&self, count: u64, took: Duration) {
        self.placements.fetch_add(count, Ordering::Relaxed);
        self.placement_micros
            .fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
    pub(crate) fn unplaceable(&self) {
        self.unplaceable.fetch_add(1, Ordering::Relaxed);
    }
    pub(crate) fn deadline_passed(&self) {
        self.deadlines.fetch_add(1, Ordering::Relaxed);
    }
}

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

impl Cloud {
    /// All numbers, in Prometheus' text format.
    pub fn metrics(&self) -> String {
        let mut text = String::with_capacity(4096);
        let metrics = &self.metrics;
        let micros = metrics.placement_micros.load(Ordering::Relaxed);
        for (name, kind, help, value) in [
            ("ostler_store_revision", "gauge", "Newest revision served.", self.revision() as f64),
            (
                "ostler_controller_leader",
                "gauge",
                "1 while the controllers of this server act.",
                f64::from(u8::from(metrics.leader.load(Ordering::Relaxed))),
            ),
            (
                "ostler_scheduler_placements_total",
                "counter",
                "VMs placed.",
                metrics.placements.load(Ordering::Relaxed) as f64,
            ),
            (
                "ostler_scheduler_seconds_total",
                "counter",
                "Time spent deciding on places.",
                micros as f64 / 1e6,
            ),
            (
                "ostler_scheduler_unplaceable_total",
                "counter",
                "Looks at a VM for which no node had room.",
                metrics.unplaceable.load(Ordering::Relaxed) as f64,
            ),
            (
                "ostler_deadlines_passed_total",
                "counter",
                "Tasks whose deadline passed.",
                metrics.deadlines.load(Ordering::Relaxed) as f64,
            ),
        ] {
            family(&mut text, name, kind, help);
            let _ = writeln!(text, "{name} {value}");
        }
        let tables = self.cache.read();
        let mut phases: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        tables.vms.iter().for_each(|vm| *phases.entry(("vm", vm.status.phase.as_str())).or_default() += 1);
        tables.nodes.iter().for_each(|n| *phases.entry(("node", n.status.phase.as_str())).or_default() += 1);
        tables
            .volumes
            .iter()
            .for_each(|v| *phases.entry(("volume", v.status.phase.as_str())).or_default() += 1);
        tables
            .images
            .iter()
            .for_each(|i| *phases.entry(("image", i.status.phase.as_str())).or_default() += 1);
        tables
            .operations
            .iter()
            .for_each(|o| *phases.entry(("operation", o.status.phase.as_str())).or_default() += 1);
        family(&mut text, "ostler_resources", "gauge", "Resources by kind and phase.");
        for ((kind, phase), count) in phases {
            let _ = writeln!(text, "ostler_resources{{kind=\"{kind}\",phase=\"{phase}\"}} {count}");
        }
        for (name, help, of) in [
            ("ostler_node_allocated_cpus", "Virtual CPUs promised on a node.", 0),
            ("ostler_node_allocated_memory_bytes", "Memory promised on a node.", 1),
            ("ostler_node_allocated_disk_bytes", "Disk promised on a node.", 2),
        ] {
            family(&mut text, name, "gauge", help);
            for node in tables.nodes.iter() {
                let name_of = &node.metadata.name;
                let sum = tables.on_node.get(name_of).map(|on_node| on_node.allocation).unwrap_or_default();
                let value = [u64::from(sum.cpus), sum.memory.0, sum.disk.0][of];
                let _ = writeln!(text, "{name}{{node=\"{name_of}\"}} {value}");
            }
        }
        text
    }
}
