//! The QEMU Machine Protocol in three layers: [`wire`] (bytes to messages and nothing else), [`connection`] (matching
//! replies to commands, deadlines, events, descriptors), [`commands`] (one type per command, with its reply;
//! what is told of disks is in [`block`]).

pub mod block;
pub mod commands;
pub mod connection;
pub mod log;
pub mod wire;

pub use connection::{Connection, Pending};
