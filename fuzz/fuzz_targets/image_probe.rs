//! The image prober on arbitrary bytes: it must refuse or accept, and never panic, hang or allocate without bound.

#![no_main]

use std::io::Cursor;

use libfuzzer_sys::fuzz_target;
use ostler_storage::{ProbeLimits, probe};

fuzz_target!(|bytes: &[u8]| {
    let _ = probe(&mut Cursor::new(bytes), &ProbeLimits::default());
});
