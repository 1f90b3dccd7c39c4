//! VirtualBox disk images. Little-endian; only dynamic and static images of version 1.1 without a parent.

use std::io::{Read, Seek};

use super::{
    ImageFormat, Refusal,
    window::{Fields, Window},
};

const FORMAT: ImageFormat = ImageFormat::Vdi;
const SIGNATURE: u32 = 0xbeda_107f;
const HEADER: usize = 0x200;
const BLOCK: u64 = 1 << 20;
/// Block map entries from here on mean "not allocated" or "zero".
const UNALLOCATED: u32 = 0xffff_fffe;

pub(super) fn is_vdi<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<bool, Refusal> {
    window.has(0x40, &SIGNATURE.to_le_bytes())
}

fn damaged(field: &'static str, value: impl ToString, why: impl Into<String>) -> Refusal {
    Refusal::Damaged { format: FORMAT, field, value: value.to_string(), why: why.into() }
}

/// Checks the image; returns its virtual size and variant.
pub(super) fn check<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<(u64, String), Refusal> {
    let mut bytes = [0u8; HEADER];
    window.read_exact(FORMAT, "header", 0, &mut bytes)?;
    let fields = Fields(&bytes);
    let version = fields.u32_le(0x44);
    if version != 0x0001_0001 {
        return Err(Refusal::UnsupportedVersion { format: FORMAT, version: version.into() });
    }
    let kind = match fields.u32_le(0x4c) {
        1 => "dynamic",
        2 => "static",
        4 => {
            return Err(Refusal::BackingFile { format: FORMAT, name: guid_text(fields.guid(0x1a8)) });
        }
        other => return Err(damaged("image type", other, "known are 1 (dynamic) and 2 (static)")),
    };
    for (field, at) in [("link UUID", 0x1a8), ("parent UUID", 0x1b8)] {
        let uuid = fields.guid(at);
        if uuid != [0; 16] {
            return Err(match field {
                "link UUID" => Refusal::BackingFile { format: FORMAT, name: guid_text(uuid) },
                _ => damaged(field, guid_text(uuid), "an image without a parent has none"),
            });
        }
    }
    let sector_size = fields.u32_le(0x168);
    if sector_size != 512 {
        return Err(damaged("sector size", sector_size, "it must be 512"));
    }
    let block_size = fields.u32_le(0x178);
    if u64::from(block_size) != BLOCK {
        return Err(damaged("block size", block_size, format!("it must be {BLOCK}")));
    }
    let block_extra = fields.u32_le(0x17c);
    if block_extra != 0 {
        return Err(damaged("block extra data", block_extra, "it must be 0"));
    }
    let size = fields.u64_le(0x170);
    let blocks = u64::from(fields.u32_le(0x180));
    let allocated = u64::from(fields.u32_le(0x184));
    let blocks_needed = size.div_ceil(BLOCK);
    if blocks < blocks_needed {
        return Err(damaged(
            "blocks in image",
            blocks,
            format!("a disk of {size} bytes needs {blocks_needed}"),
        ));
    }
    if allocated > blocks {
        return Err(damaged("blocks allocated", allocated, format!("the image has {blocks}")));
    }
    let (map, data) = (u64::from(fields.u32_le(0x154)), u64::from(fields.u32_le(0x158)));
    if map < HEADER as u64 || !map.is_multiple_of(512) {
        return Err(damaged("block map offset", map, "it must be a multiple of 512 after the header"));
    }
    if data < map + blocks * 4 || !data.is_multiple_of(512) {
        return Err(damaged("data offset", data, "it must be a multiple of 512 after the block map"));
    }
    window.require(FORMAT, "data", data, allocated * BLOCK)?;
    window.table::<4>(FORMAT, "block map", map, blocks, |index, entry| {
        let entry = u32::from_le_bytes(entry);
        if entry < UNALLOCATED && u64::from(entry) >= allocated {
            return Err(damaged(
                "block map entry",
                entry,
                format!("entry {index} is beyond the {allocated} blocks"),
            ));
        }
        Ok(())
    })?;
    Ok((size, format!("{kind} VDI")))
}

fn guid_text(guid: [u8; 16]) -> String {
    format!("disk with the UUID {}", uuid::Uuid::from_bytes_le(guid))
}
