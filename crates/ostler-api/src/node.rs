//! Nodes: the hosts that run VMs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::metadata::Labels;
use crate::resource::{resource, words};
use crate::{Accelerator, ByteSize, Fault, Metadata, NodeId, Time};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    pub metadata: Metadata,
    pub spec: NodeSpec,
    pub status: NodeStatus,
}

resource!(Node, Node, project: false, phase: |n| n.status.phase.as_str(), node: |n| Some(n.metadata.name.as_str()));

words! {
    NodePhase {
        /// Registered; has not reported what it has.
        Joining => "joining",
        Ready => "ready",
        /// Does not report.
        Unreachable => "unreachable",
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeSpec {
    /// Whether new VMs may be placed on it.
    pub schedulable: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    pub phase: NodePhase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Fault>,
    /// When the phase began.
    pub since: Time,
    /// What it said of itself last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<NodeFacts>,
    /// What the VMs placed on it were promised; filled in when it is read.
    #[serde(default)]
    pub allocated: Allocation,
}

/// What a node is and has, as it says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeFacts {
    /// Ostler's version there.
    pub version: String,
    /// Changes with each start of the host.
    pub boot: String,
    pub cpus: u32,
    pub memory: ByteSize,
    /// Size of the pool's file system.
    pub disk: ByteSize,
    pub disk_free: ByteSize,
    pub cpu_model: String,
    /// Version of QEMU; absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<String>,
    /// The first is what `auto` takes.
    pub accelerators: Vec<Accelerator>,
    /// What works less well than it could, or not at all.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// Sums over VMs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Allocation {
    pub vms: u32,
    pub cpus: u32,
    pub memory: ByteSize,
    pub disk: ByteSize,
}

/// Sent by the agent when it starts and whenever its facts change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeRegister {
    /// Made by the agent at its first start and kept on its disk.
    pub id: NodeId,
    #[serde(default)]
    pub labels: Labels,
    pub facts: NodeFacts,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NodePatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Labels>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedulable: Option<bool>,
}
