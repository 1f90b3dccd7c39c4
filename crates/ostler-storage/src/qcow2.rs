//! Placeholder until the reader lands.

use std::io::{Read, Seek};

use crate::probe::{Refusal, window::Window};

pub(crate) struct Header {
    pub(crate) size: u64,
    pub(crate) version: u32,
}

pub(crate) fn is_qcow2<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<bool, Refusal> {
    window.has(0, b"QFI\xfb")
}

impl Header {
    pub(crate) fn read<R: Read + Seek>(_window: &mut Window<'_, R>) -> Result<Self, Refusal> {
        unimplemented!()
    }

    pub(crate) fn check_standalone<R: Read + Seek>(
        &self,
        _window: &mut Window<'_, R>,
    ) -> Result<(), Refusal> {
        unimplemented!()
    }
}
