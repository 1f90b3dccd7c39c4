//! The qcow2 format, as far as we read and write it ourselves.
//!
//! `header` parses without believing anything, `standalone` decides whether a foreign image may be imported, and
//! `create` writes new empty volumes. Guest data is never read or written here.

mod create;
mod header;
mod standalone;

pub(crate) use create::Empty;
pub(crate) use header::{Header, is_qcow2};
