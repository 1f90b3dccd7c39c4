//! ostler-qemu
