//! QEMU as a process of the host: started so that it outlives us, found again through its lock, ended through its pidfd.

pub(crate) mod lock;
pub(crate) mod pidfd;
pub(crate) mod spawn;
