//! Files without a container: told apart by what they hold, and refused when they are a container that we do not read.

use std::io::{Read, Seek};

use super::{Compression, ImageContent, Refusal, window::Window};

/// Containers that must not pass as raw disks: (offset, magic, name).
const UNSUPPORTED: [(u64, &[u8], &str); 14] = [
    (0, b"QED\0", "QED"),
    (0, b"conectix", "VHD (vpc)"),
    (0, b"COWD", "VMDK of the COWD kind"),
    (0, &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0], "VMDK of the seSparse kind"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"OOOM", "user-mode Linux COW"),
    (0, b"Bochs Virtual HD Image", "Bochs growing disk"),
    (0, b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"BZh", "bzip2"),
    (0, &[0x04, 0x22, 0x4d, 0x18], "lz4"),
    (257, b"ustar", "tar (and OVA)"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
];

/// Says what the file holds.
pub(super) fn check<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<ImageContent, Refusal> {
    if window.has(0, b"LUKS\xba\xbe")? {
        return Err(Refusal::Encrypted { scheme: "LUKS" });
    }
    for (offset, magic, what) in UNSUPPORTED {
        if window.has(offset, magic)? {
            return Err(Refusal::UnsupportedFormat { what });
        }
    }
    // A VHD of fixed size has only a footer.
    if let Some(footer) = window.len().checked_sub(512)
        && window.has(footer, b"conectix")?
    {
        return Err(Refusal::UnsupportedFormat { what: "VHD (vpc)" });
    }
    let mut head = [0u8; 8];
    let read = window.read_some(0, &mut head)?;
    if Compression::detect(&head[..read]) != Compression::None {
        return Err(Refusal::NestedCompression);
    }
    if window.has(0x8001, b"CD001")? {
        Ok(ImageContent::Iso)
    } else if window.has(0x202, b"HdrS")? && window.has(0x1fe, &[0x55, 0xaa])?
        || window.has(0x38, b"ARM\x64")?
    {
        Ok(ImageContent::Kernel)
    } else if window.has(0, b"070701")? || window.has(0, b"070702")? {
        Ok(ImageContent::Initrd)
    } else {
        Ok(ImageContent::Disk)
    }
}
