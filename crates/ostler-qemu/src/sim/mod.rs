//! The simulated hypervisor: the same interface and the same tests as the real one, without processes.
//!
//! What would survive an agent on a real host lives in [`SimHost`]; a [`SimHypervisor`] is one agent's view of it, so a
//! test restarts the agent by making another view. A machine that just runs costs a few hundred bytes, no task and no
//! timer. [`faults`] makes operations slow, failing or hanging; [`guest`] says what the guests do.

mod disks;
mod faults;
mod guest;
mod host;
mod hypervisor;
mod machine;

pub use faults::SimOperation;
pub use guest::{OnPowerdown, SimGuest, SimLifetime};
pub use host::{SimCapacity, SimHost};
pub use hypervisor::SimHypervisor;
