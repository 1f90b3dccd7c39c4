//! The storage driver from outside: real images made by `qemu-img`, hostile ones made by hand, killed imports and trees of snapshots, broken downloads.

mod crash;
mod fetch;
mod hostile;
mod images;
mod import;
mod killed;
mod pool;
mod snapshots;
mod support;
mod twin;
