//! What this node says of itself: the host, QEMU, the pool, and what does not work as well as it could.

use ostler_api::node::NodeFacts;
use ostler_api::{Accelerator, ByteSize};
use ostler_qemu::HostProbe;
use ostler_storage::PoolUsage;

use crate::fault;
use crate::host::{Host, within};
use crate::machine_spec::accelerator_back;

/// Identifies this run of the host's kernel.
pub(crate) async fn host_boot() -> std::io::Result<String> {
    let id = tokio::fs::read_to_string("/proc/sys/kernel/random/boot_id").await?;
    Ok(id.trim().to_owned())
}

impl Host {
    pub(crate) async fn facts(&self) -> Result<NodeFacts, ostler_api::Fault> {
        let times = &self.config.times;
        let probe = within("looking at the host", times.start, self.hypervisor.probe()).await?;
        let mut warnings = Vec::new();
        let usage = within("looking at the storage pool", times.pool, self.pool.usage()).await;
        let usage = match usage {
            Ok(Ok(usage)) => usage,
            Ok(Err(error)) => {
                warnings.push(format!("the storage pool cannot be used: {}", fault::chain(&error)));
                PoolUsage::default()
            }
            Err(late) => {
                warnings.push(format!("the storage pool does not answer: {}", late.message));
                PoolUsage::default()
            }
        };
        let mut foreign: Vec<_> =
            self.vms.lock().values().filter(|vm| vm.is_estranged()).map(|vm| vm.id.to_string()).collect();
        foreign.sort();
        if !foreign.is_empty() {
            warnings.push(format!(
                "{} VMs here belong to another cloud or to a newer state of this one and are left alone: {}",
                foreign.len(),
                foreign.join(", ")
            ));
        }
        Ok(node_facts(&probe, usage, &self.host_boot, warnings))
    }
}

fn node_facts(probe: &HostProbe, usage: PoolUsage, boot: &str, mut warnings: Vec<String>) -> NodeFacts {
    let mut accelerators: Vec<Accelerator> = probe
        .accelerators
        .iter()
        .filter(|accelerator| accelerator.usable)
        .map(|accelerator| accelerator_back(accelerator.accelerator))
        .collect();
    // KVM sorts first: it is what `auto` takes.
    accelerators.sort();
    accelerators.dedup();
    for accelerator in probe.accelerators.iter().filter(|accelerator| !accelerator.usable) {
        let slow = match accelerator.accelerator {
            ostler_qemu::Accelerator::Kvm => "; VMs run under TCG, several times slower",
            ostler_qemu::Accelerator::Tcg => "",
        };
        warnings.push(format!("{} is not used: {}{slow}", accelerator.accelerator, accelerator.reason));
    }
    warnings.extend(probe.problems.iter().cloned());
    NodeFacts {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        boot: boot.to_owned(),
        cpus: probe.cpus,
        memory: ByteSize(probe.memory_bytes),
        disk: ByteSize(usage.total),
        disk_free: ByteSize(usage.available),
        cpu_model: probe.cpu_model.clone(),
        hypervisor: probe.qemu_version.clone(),
        accelerators,
        warnings,
    }
}

/// Whether `now` is worth another registration. Free space counts from a hundredth of the disk.
pub(crate) fn is_news(told: &NodeFacts, now: &NodeFacts) -> bool {
    let moved = told.disk_free.bytes().abs_diff(now.disk_free.bytes());
    let same_but_free = NodeFacts { disk_free: told.disk_free, ..now.clone() } == *told;
    !same_but_free || moved > told.disk.bytes() / 100
}

#[cfg(test)]
mod tests {
    use super::*;
    use ostler_qemu::AcceleratorProbe;

    fn probe() -> HostProbe {
        HostProbe {
            qemu_version: Some("7.2.0".into()),
            qemu_binary: None,
            machine_types: Vec::new(),
            accelerators: vec![
                AcceleratorProbe {
                    accelerator: ostler_qemu::Accelerator::Kvm,
                    usable: false,
                    reason: "the CPU offers neither vmx nor svm".into(),
                },
                AcceleratorProbe {
                    accelerator: ostler_qemu::Accelerator::Tcg,
                    usable: true,
                    reason: String::new(),
                },
            ],
            cpu_model: "cpu".into(),
            cpu_flags: Vec::new(),
            cpus: 2,
            memory_bytes: 8 << 30,
            problems: vec!["no UEFI firmware".into()],
        }
    }

    #[test]
    fn why_an_accelerator_is_not_used_is_a_warning() {
        let usage = PoolUsage { total: 1000, used: 0, available: 900, provisioned: 0 };
        let facts = node_facts(&probe(), usage, "boot", vec![]);
        assert_eq!(facts.accelerators, [Accelerator::Tcg]);
        assert_eq!(facts.warnings.len(), 2);
        assert!(facts.warnings[0].contains("vmx") && facts.warnings[0].contains("slower"));
        assert_eq!((facts.disk, facts.disk_free), (ByteSize(1000), ByteSize(900)));
    }

    #[test]
    fn a_little_less_space_is_no_news() {
        let facts = |available| {
            node_facts(
                &probe(),
                PoolUsage { total: 1000, used: 0, available, provisioned: 0 },
                "boot",
                vec![],
            )
        };
        assert!(!is_news(&facts(900), &facts(895)));
        assert!(is_news(&facts(900), &facts(800)));
        let mut other = facts(900);
        other.warnings.clear();
        assert!(is_news(&facts(900), &other));
    }
}
