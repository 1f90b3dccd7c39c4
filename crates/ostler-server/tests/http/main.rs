//! The server from the outside: real sockets, a real cloud over a store in memory, no QEMU.

mod images;
mod input;
mod lifecycle;
mod limits;
mod openapi;
mod permission;
mod resources;
mod streams;
mod support;
mod tls;
mod watches;
