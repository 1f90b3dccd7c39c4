//! Whole agents against a control plane in memory, with the simulated drivers.

mod actions;
mod behaviour;
mod crash;
mod disks;
mod ends;
mod faults;
mod guard;
mod images;
mod many;
mod plane;
mod random;
mod restart;
mod site;
mod snapshots;
mod streams;
mod tidy;
mod volumes;
