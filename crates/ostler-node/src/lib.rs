//! The node agent: makes one host run what the control plane placed on it, and tells what it sees.
//!
//! The binary makes an [`Agent`] from a configuration, the two drivers and a [`ControlPlane`], and runs it. The agent
//! speaks the public API only; it never reaches the store.
//!
//! ```text
//!                      agent ── adopts at start
//!   control plane ──► session ──► VM tasks, volume workers ──► hypervisor, pool
//!          ▲             │                  │
//!          │             └──► streams       ▼
//!          └─────────────────────────── outbox
//! ```
//!
//! What always holds: VMs outlive the agent. One task owns each VM, and a hung machine, disk or request costs that task
//! only. Nothing is done twice because the agent was killed, and nothing is forgotten.

mod agent;
mod client_plane;
mod config;
mod console;
mod console_log;
mod control_plane;
mod desk;
mod facts;
mod fault;
mod host;
mod images;
mod keep;
mod machine_spec;
mod ports;
mod record;
mod report;
mod session;
mod snapshot_task;
mod stream;
mod tidy;
mod vm_adopt;
mod vm_disks;
mod vm_handle;
mod vm_power;
mod vm_rebuild;
mod vm_start;
mod vm_stop;
mod vm_suspend;
mod vm_task;
mod vm_watch;
mod volume_flatten;
mod volume_task;

pub use agent::{Agent, AgentError};
pub use client_plane::ClientPlane;
pub use config::{AgentConfig, Times};
pub use control_plane::{ControlPlane, PlaneError, Wire, WorkStream};
pub use keep::Keep;
