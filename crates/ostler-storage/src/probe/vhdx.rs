//! Placeholder until the reader lands.

use std::io::{Read, Seek};

use super::{Refusal, window::Window};

pub(super) fn is_vhdx<R: Read + Seek>(_window: &mut Window<'_, R>) -> Result<bool, Refusal> {
    Ok(false)
}

pub(super) fn check<R: Read + Seek>(_window: &mut Window<'_, R>) -> Result<(u64, String), Refusal> {
    unimplemented!()
}
