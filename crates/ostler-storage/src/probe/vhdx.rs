//! Hyper-V disk images (VHDX). Little-endian; checksums are CRC-32C. Only complete images without a parent and with an
//! empty log.

use std::io::{Read, Seek};

use uuid::{Uuid, uuid};

use super::{
    ImageFormat, Refusal,
    window::{Fields, Window},
};

const FORMAT: ImageFormat = ImageFormat::Vhdx;
const KIB64: u64 = 64 << 10;
const MIB: u64 = 1 << 20;
const HEADERS: [u64; 2] = [KIB64, 2 * KIB64];
const REGION_TABLES: [u64; 2] = [3 * KIB64, 4 * KIB64];
const MAX_ENTRIES: u32 = 2047;

const REGION_BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const REGION_METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");
const ITEM_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const ITEM_DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const ITEM_DISK_ID: Uuid = uuid!("beca12ab-b2e6-4523-93ef-c309e000c746");
const ITEM_LOGICAL_SECTOR: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
const ITEM_PHYSICAL_SECTOR: Uuid = uuid!("cda348c7-445d-4471-9cc9-e9885251c556");
const ITEM_PARENT: Uuid = uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c");

pub(super) fn is_vhdx<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<bool, Refusal> {
    window.has(0, b"vhdxfile")
}

fn damaged(field: &'static str, value: impl ToString, why: impl Into<String>) -> Refusal {
    Refusal::Damaged { format: FORMAT, field, value: value.to_string(), why: why.into() }
}

/// A part of the file that the region table names.
#[derive(Clone, Copy)]
struct Region {
    offset: u64,
    len: u64,
}

/// Checks the image; returns its virtual size and variant.
pub(super) fn check<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<(u64, String), Refusal> {
    check_header(window)?;
    let (bat, metadata) = regions(window)?;
    let disk = read_metadata(window, metadata)?;
    check_bat(window, bat, &disk)?;
    Ok((disk.size, "VHDX version 1".to_owned()))
}

/// Both copies are read; the valid one with the higher sequence number counts.
fn check_header<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<(), Refusal> {
    let mut current: Option<(u64, [u8; 4096])> = None;
    for offset in HEADERS {
        let mut bytes = [0u8; 4096];
        window.read_exact(FORMAT, "header", offset, &mut bytes)?;
        if &bytes[..4] != b"head" || !checksum_matches(&mut bytes) {
            continue;
        }
        let sequence = Fields(&bytes).u64_le(8);
        if current.as_ref().is_none_or(|(best, _)| sequence > *best) {
            current = Some((sequence, bytes));
        }
    }
    let Some((_, bytes)) = current else {
        return Err(damaged("header", "invalid", "neither copy has the right signature and checksum"));
    };
    let fields = Fields(&bytes);
    let version = fields.u16_le(66);
    if version != 1 {
        return Err(Refusal::UnsupportedVersion { format: FORMAT, version: version.into() });
    }
    if fields.guid(48) != [0; 16] {
        return Err(Refusal::Unclean {
            format: FORMAT,
            why: "its log holds changes that are not written back",
        });
    }
    let (log_len, log_offset) = (u64::from(fields.u32_le(68)), fields.u64_le(72));
    if !log_offset.is_multiple_of(MIB) || !log_len.is_multiple_of(MIB) {
        return Err(damaged("log offset", log_offset, "offset and length must be multiples of 1 MiB"));
    }
    window.require(FORMAT, "log", log_offset, log_len)
}

fn regions<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<(Region, Region), Refusal> {
    let mut bytes = vec![0u8; KIB64 as usize];
    let mut valid = false;
    for offset in REGION_TABLES {
        window.read_exact(FORMAT, "region table", offset, &mut bytes)?;
        if &bytes[..4] == b"regi" && checksum_matches(&mut bytes) {
            valid = true;
            break;
        }
    }
    if !valid {
        return Err(damaged("region table", "invalid", "neither copy has the right signature and checksum"));
    }
    let count = Fields(&bytes).u32_le(8);
    if count > MAX_ENTRIES {
        return Err(damaged("region count", count, format!("the limit is {MAX_ENTRIES}")));
    }
    let (mut bat, mut metadata) = (None, None);
    for entry in bytes[16..].as_chunks::<32>().0.iter().take(count as usize) {
        let fields = Fields(entry);
        let id = Uuid::from_bytes_le(fields.guid(0));
        let region = Region { offset: fields.u64_le(16), len: fields.u32_le(24).into() };
        let slot = match id {
            REGION_BAT => &mut bat,
            REGION_METADATA => &mut metadata,
            _ if fields.u32_le(28) & 1 != 0 => {
                return Err(Refusal::UnknownFeatures { format: FORMAT, features: format!("region {id}") });
            }
            _ => continue,
        };
        if region.offset < MIB || !region.offset.is_multiple_of(MIB) || !region.len.is_multiple_of(MIB) {
            return Err(damaged(
                "region offset",
                region.offset,
                "offset and length must be multiples of 1 MiB",
            ));
        }
        window.require(FORMAT, "region", region.offset, region.len)?;
        if slot.replace(region).is_some() {
            return Err(damaged("region table", id, "the region is there twice"));
        }
    }
    match (bat, metadata) {
        (Some(bat), Some(metadata)) => Ok((bat, metadata)),
        _ => Err(damaged("region table", "incomplete", "it must name the block table and the metadata")),
    }
}

struct Disk {
    size: u64,
    block: u64,
    sector: u64,
}

fn read_metadata<R: Read + Seek>(window: &mut Window<'_, R>, region: Region) -> Result<Disk, Refusal> {
    let mut table = vec![0u8; KIB64 as usize];
    window.read_exact(FORMAT, "metadata table", region.offset, &mut table)?;
    if &table[..8] != b"metadata" {
        return Err(damaged("metadata table", "invalid", "the signature is wrong"));
    }
    let count = Fields(&table).u16_le(10);
    if u32::from(count) > MAX_ENTRIES {
        return Err(damaged("metadata count", count, format!("the limit is {MAX_ENTRIES}")));
    }
    let (mut parameters, mut size, mut sector) = (None, None, None);
    for entry in table[32..].as_chunks::<32>().0.iter().take(count.into()) {
        let fields = Fields(entry);
        let id = Uuid::from_bytes_le(fields.guid(0));
        let (offset, len) = (u64::from(fields.u32_le(16)), u64::from(fields.u32_le(20)));
        let mut value = [0u8; 8];
        let slot = match id {
            ITEM_PARAMETERS => &mut parameters,
            ITEM_DISK_SIZE => &mut size,
            ITEM_LOGICAL_SECTOR => &mut sector,
            ITEM_DISK_ID | ITEM_PHYSICAL_SECTOR => continue,
            ITEM_PARENT => {
                return Err(Refusal::BackingFile {
                    format: FORMAT,
                    name: "(a differencing disk)".to_owned(),
                });
            }
            _ if fields.u32_le(24) & 4 != 0 => {
                return Err(Refusal::UnknownFeatures { format: FORMAT, features: format!("metadata {id}") });
            }
            _ => continue,
        };
        let expected = if id == ITEM_LOGICAL_SECTOR { 4 } else { 8 };
        if len != expected || offset < KIB64 || offset + len > region.len {
            return Err(damaged("metadata item", id, format!("offset {offset} and length {len} do not fit")));
        }
        window.read_exact(FORMAT, "metadata item", region.offset + offset, &mut value[..len as usize])?;
        if slot.replace(u64::from_le_bytes(value)).is_some() {
            return Err(damaged("metadata table", id, "the item is there twice"));
        }
    }
    let (Some(parameters), Some(size), Some(sector)) = (parameters, size, sector) else {
        return Err(damaged(
            "metadata table",
            "incomplete",
            "block size, disk size or sector size is missing",
        ));
    };
    let (block, flags) = (parameters & 0xffff_ffff, parameters >> 32);
    if flags & 2 != 0 {
        return Err(Refusal::BackingFile { format: FORMAT, name: "(a differencing disk)".to_owned() });
    }
    if !block.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
        return Err(damaged("block size", block, "it must be a power of two from 1 to 256 MiB"));
    }
    if sector != 512 && sector != 4096 {
        return Err(damaged("logical sector size", sector, "it must be 512 or 4096"));
    }
    if !size.is_multiple_of(sector) || size > 64 << 40 {
        return Err(damaged("disk size", size, format!("it must be a multiple of {sector}, at most 64 TiB")));
    }
    Ok(Disk { size, block, sector })
}

fn check_bat<R: Read + Seek>(window: &mut Window<'_, R>, bat: Region, disk: &Disk) -> Result<(), Refusal> {
    // Each run of `ratio` payload entries is followed by one for their sector bitmap.
    let ratio = (disk.sector << 23) / disk.block;
    let payload = disk.size.div_ceil(disk.block);
    let entries = payload + payload.saturating_sub(1) / ratio;
    if entries * 8 > bat.len {
        return Err(damaged("block table length", bat.len, format!("{entries} entries do not fit")));
    }
    let len = window.len();
    window.table::<8>(FORMAT, "block table", bat.offset, entries, |index, entry| {
        let entry = u64::from_le_bytes(entry);
        let (state, offset) = (entry & 7, (entry >> 20) * MIB);
        let is_bitmap = index % (ratio + 1) == ratio;
        match state {
            0..=3 => Ok(()),
            6 if is_bitmap => Err(damaged("block table entry", index, "a sector bitmap without a parent")),
            6 => {
                let needed = offset.saturating_add(disk.block);
                if offset < MIB {
                    Err(damaged("block table entry", index, "the block overlaps the header"))
                } else if needed > len {
                    Err(Refusal::Truncated { format: FORMAT, field: "block", needed, len })
                } else {
                    Ok(())
                }
            }
            7 => Err(Refusal::BackingFile { format: FORMAT, name: "(a differencing disk)".to_owned() }),
            _ => Err(damaged("block table entry", index, format!("the state {state} is unknown"))),
        }
    })
}

/// Compares the checksum at byte 4 with the content and clears it meanwhile.
fn checksum_matches(bytes: &mut [u8]) -> bool {
    let stored = Fields(bytes).u32_le(4);
    bytes[4..8].fill(0);
    let matches = crc32c(bytes) == stored;
    bytes[4..8].copy_from_slice(&stored.to_le_bytes());
    matches
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};

/// CRC-32C (Castagnoli).
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| CRC_TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize] ^ (crc >> 8))
}

#[cfg(test)]
mod tests {
    #[test]
    fn crc32c_of_the_well_known_text() {
        assert_eq!(super::crc32c(b"123456789"), 0xe306_9283);
    }
}
