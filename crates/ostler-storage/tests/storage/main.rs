//! The storage driver from outside: real images made by `qemu-img`, hostile ones made by hand, killed imports, broken downloads.

mod fetch;
mod hostile;
mod images;
mod import;
mod killed;
mod pool;
mod support;
