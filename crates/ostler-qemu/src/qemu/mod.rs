//! The real hypervisor: QEMU processes on this host.
//!
//! One file per part of the story: [`hypervisor`] (the trait's entry points and what is known of each machine),
//! [`launch`] (files, sockets and the process), [`bring_up`] (plugging in, restoring, letting run), [`machine`] (a
//! machine that runs), [`save`] (suspend to disk), [`survey`] (finding machines again), [`disks`] (disks of a
//! machine that runs), [`probe`] (what the host can do), [`users`] (whom QEMU runs as), [`faults`] (QEMU's words made
//! into errors), [`events`] (QMP's events made ours).

mod bring_up;
mod disks;
mod events;
mod faults;
mod hypervisor;
mod launch;
mod machine;
mod probe;
mod save;
mod survey;
mod users;

pub use hypervisor::QemuHypervisor;
