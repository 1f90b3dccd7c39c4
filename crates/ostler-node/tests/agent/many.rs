//! A thousand agents in one process, with ten VMs each.

use std::sync::Arc;

use ostler_api::vm_action::VmAction;
use ostler_node::{Agent, AgentConfig};
use ostler_qemu::{SimHost, SimHypervisor};
use ostler_storage::SimPool;
use tokio_util::sync::CancellationToken;

use crate::plane::{Plane, name};

/// Bytes of this process that are in memory.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[tokio::test(start_paused = true)]
async fn a_thousand_agents_are_small() {
    const AGENTS: usize = 1000;
    const VMS: usize = 10;
    let dir = tempfile::tempdir().unwrap();
    let shutdown = CancellationToken::new();
    let mut planes = Vec::new();
    let mut tasks = Vec::new();
    let before = resident();
    for _ in 0..AGENTS {
        let plane = Plane::new();
        let config = AgentConfig::simulated(name("n1"), dir.path());
        let hypervisor = Arc::new(SimHypervisor::new(SimHost::default()));
        let agent =
            Agent::new(config, hypervisor, Arc::new(SimPool::new(1 << 40)), Arc::<Plane>::clone(&plane));
        tasks.push(tokio::spawn(agent.run(shutdown.clone())));
        planes.push(plane);
    }
    for plane in &planes {
        plane.connected().await;
    }
    let idle = resident();
    for plane in &planes {
        for _ in 0..VMS {
            let vm = plane.vm_create();
            plane.act(vm, VmAction::Start);
        }
    }
    for plane in &planes {
        plane
            .wait("all machines", |inner| inner.vms.values().all(|vm| vm.status.task.is_none()).then_some(()))
            .await;
    }
    let full = resident();
    // Each VM is also kept by its control plane here, so this bounds the agent from above.
    let per_agent = (idle - before) / AGENTS;
    let per_vm = (full - idle) / (AGENTS * VMS);
    println!("{per_agent} bytes per idle agent, {per_vm} per idle VM with its side of the control plane");
    assert!(per_agent < 64 << 10, "{per_agent} bytes per idle agent");
    assert!(per_vm < 24 << 10, "{per_vm} bytes per idle VM");
    shutdown.cancel();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
}
