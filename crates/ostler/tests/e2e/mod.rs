//! What the end-to-end tests share: the built binary, real QEMU under TCG, the tiny guest.
//!
//! Each `tests/e2e_*.rs` includes this file as a module. A test has a [`TestServer`] with a data directory of its own
//! and ends with [`TestServer::nothing_left`]. Whatever happens, also after a panic, no process of a test outlives it:
//! processes are found by their working directory and ended by their pid.

// Each test binary uses a part of it.
#![allow(dead_code, unused_imports)]

mod console;
mod guest;
mod http;
mod leaks;
mod process;
mod random;
mod server;
mod shell;
mod small_disk;
mod wait;

pub(crate) use guest::{Marker, guest_file, kernel_cmdline};
pub(crate) use http::{Response, answer_of, http};
pub(crate) use process::{ends, is_alive, kill_qemu};
pub(crate) use random::Random;
pub(crate) use server::{Done, TestServer, cli_command};
pub(crate) use shell::disk_write;
pub(crate) use small_disk::SmallDisk;
pub(crate) use wait::{PATIENCE, calm, wait_for, wait_until};
