//! VMware disk images in one file: monolithicSparse and streamOptimized ("KDMV", little-endian).
//!
//! A descriptor is a text that names the files which hold the data ("extents"). Alone, it is refused with those names; inside
//! a sparse file it may name nothing but that file. A sparse header with capacity 0 makes QEMU follow the embedded
//! descriptor, so it is refused as well.

use std::io::{Read, Seek};

use super::{
    ImageFormat, Refusal,
    window::{Fields, Window},
};

const FORMAT: ImageFormat = ImageFormat::Vmdk;
const MAGIC: &[u8; 4] = b"KDMV";
const SECTOR: u64 = 512;
const MAX_DESCRIPTOR: u64 = 64 << 10;
/// The grain directory's offset when it stands in the footer.
const AT_END: u64 = u64::MAX;
const FLAG_COMPRESSED: u32 = 1 << 16;

pub(super) fn is_vmdk<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<bool, Refusal> {
    Ok(window.has(0, MAGIC)? || is_descriptor(window)?)
}

/// A text that QEMU or VMware would take for a descriptor: comments and blank lines, then `version=`, or the usual title.
fn is_descriptor<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<bool, Refusal> {
    let mut head = [0u8; 2048];
    let read = window.read_some(0, &mut head)?;
    let text = head[..read].to_ascii_lowercase();
    let title = b"# disk descriptorfile";
    if text.trim_ascii_start().starts_with(title) {
        return Ok(true);
    }
    let first = text
        .split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .find(|line| !line.is_empty() && !line.starts_with(b"#"));
    Ok(first.is_some_and(|line| line.starts_with(b"version=")))
}

fn damaged(field: &'static str, value: impl ToString, why: impl Into<String>) -> Refusal {
    Refusal::Damaged { format: FORMAT, field, value: value.to_string(), why: why.into() }
}

/// Checks the image; returns its virtual size and variant.
pub(super) fn check<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<(u64, String), Refusal> {
    if !window.has(0, MAGIC)? {
        let descriptor = Descriptor::read(window, 0, window.len().min(MAX_DESCRIPTOR))?;
        let name = descriptor.extents.into_iter().next().map_or("(none)".to_owned(), |extent| extent.name);
        return Err(Refusal::ExternalExtent { format: FORMAT, name });
    }
    let header = SparseHeader::read(window, 0)?;
    if header.capacity == 0 {
        return Err(damaged("capacity", 0, "the data would be looked for in other files"));
    }
    if header.descriptor_offset == 0 || header.descriptor_sectors == 0 {
        return Err(damaged(
            "descriptor offset",
            0,
            "this is one piece of a disk that is split over several files",
        ));
    }
    let descriptor = Descriptor::read(
        window,
        header.descriptor_offset.saturating_mul(SECTOR),
        header.descriptor_sectors.saturating_mul(SECTOR),
    )?;
    descriptor.check_embedded()?;
    // The header's own copy counts, not the footer's, except for the grain directory that only the footer knows.
    let directory = if header.directory_offset == AT_END {
        let footer = window
            .len()
            .checked_sub(2 * SECTOR)
            .ok_or_else(|| damaged("footer", "missing", "the file is too short"))?;
        let copy = SparseHeader::read(window, footer)?;
        if (copy.capacity, copy.grain, copy.entries) != (header.capacity, header.grain, header.entries) {
            return Err(damaged("footer", "different", "header and footer do not describe the same disk"));
        }
        copy.directory_offset
    } else {
        header.directory_offset
    };
    header.check_tables(window, directory)?;
    let size = header
        .capacity
        .checked_mul(SECTOR)
        .ok_or_else(|| damaged("capacity", header.capacity, "it is too large"))?;
    Ok((size, descriptor.create_type))
}

struct SparseHeader {
    capacity: u64,
    grain: u64,
    descriptor_offset: u64,
    descriptor_sectors: u64,
    /// Entries of one grain table.
    entries: u64,
    directory_offset: u64,
}

impl SparseHeader {
    fn read<R: Read + Seek>(window: &mut Window<'_, R>, offset: u64) -> Result<Self, Refusal> {
        let mut bytes = [0u8; SECTOR as usize];
        window.read_exact(FORMAT, "header", offset, &mut bytes)?;
        if &bytes[..4] != MAGIC {
            return Err(damaged("footer", "missing", "the grain directory should be there"));
        }
        let fields = Fields(&bytes);
        let version = fields.u32_le(4);
        if !(1..=3).contains(&version) {
            return Err(Refusal::UnsupportedVersion { format: FORMAT, version: version.into() });
        }
        let flags = fields.u32_le(8);
        let compression = fields.u16_le(77);
        if compression > 1 || (compression == 0 && flags & FLAG_COMPRESSED != 0) {
            return Err(damaged("compression", compression, "known are 0 (none) and 1 (deflate)"));
        }
        let header = Self {
            capacity: fields.u64_le(12),
            grain: fields.u64_le(20),
            descriptor_offset: fields.u64_le(28),
            descriptor_sectors: fields.u64_le(36),
            entries: fields.u32_le(44).into(),
            directory_offset: fields.u64_le(56),
        };
        if !header.grain.is_power_of_two() || header.grain > 64 << 10 {
            return Err(damaged("grain size", header.grain, "it must be a power of two up to 65536 sectors"));
        }
        if header.entries == 0 || header.entries > 512 {
            return Err(damaged("grain table entries", header.entries, "allowed are 1 to 512"));
        }
        Ok(header)
    }

    /// The grain directory and each grain table that it names lie inside the file.
    fn check_tables<R: Read + Seek>(
        &self,
        window: &mut Window<'_, R>,
        directory: u64,
    ) -> Result<(), Refusal> {
        let covered = self.grain * self.entries;
        let tables = self.capacity.div_ceil(covered);
        let offset = directory
            .checked_mul(SECTOR)
            .filter(|offset| *offset != 0)
            .ok_or_else(|| damaged("grain directory offset", directory, "it lies outside the file"))?;
        let len = window.len();
        let table_bytes = self.entries * 4;
        window.table::<4>(FORMAT, "grain directory", offset, tables, |_, entry| {
            let at = u64::from(u32::from_le_bytes(entry)) * SECTOR;
            if at != 0 && at + table_bytes > len {
                return Err(Refusal::Truncated {
                    format: FORMAT,
                    field: "grain table",
                    needed: at + table_bytes,
                    len,
                });
            }
            Ok(())
        })
    }
}

struct Extent {
    kind: String,
    name: String,
}

struct Descriptor {
    create_type: String,
    parent: Option<String>,
    extents: Vec<Extent>,
}

impl Descriptor {
    fn read<R: Read + Seek>(window: &mut Window<'_, R>, offset: u64, len: u64) -> Result<Self, Refusal> {
        if len > MAX_DESCRIPTOR {
            return Err(damaged("descriptor size", len, format!("the limit is {MAX_DESCRIPTOR} bytes")));
        }
        let mut bytes = vec![0; len as usize];
        window.read_exact(FORMAT, "descriptor", offset, &mut bytes)?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        Ok(Self::parse(&String::from_utf8_lossy(&bytes[..end])))
    }

    fn parse(text: &str) -> Self {
        let mut descriptor = Self { create_type: String::new(), parent: None, extents: Vec::new() };
        let mut parent_cid = None;
        for line in text.lines().map(str::trim) {
            if let Some(extent) = parse_extent(line) {
                descriptor.extents.push(extent);
            } else if let Some((key, value)) = line.split_once('=') {
                let value = value.trim().trim_matches('"');
                match key.trim().to_ascii_lowercase().as_str() {
                    "createtype" => descriptor.create_type = value.to_owned(),
                    "parentfilenamehint" => descriptor.parent = Some(value.to_owned()),
                    "parentcid" => parent_cid = Some(value.to_ascii_lowercase()),
                    _ => {}
                }
            }
        }
        if let Some(cid) = parent_cid
            && cid != "ffffffff"
            && descriptor.parent.is_none()
        {
            descriptor.parent = Some(format!("disk with the CID {cid}"));
        }
        descriptor
    }

    /// A descriptor inside a sparse file: of a kind that is one file, without a parent, naming one sparse extent.
    fn check_embedded(&self) -> Result<(), Refusal> {
        if let Some(name) = &self.parent {
            return Err(Refusal::BackingFile { format: FORMAT, name: name.clone() });
        }
        if !matches!(self.create_type.as_str(), "monolithicSparse" | "streamOptimized") {
            return Err(match self.extents.first() {
                Some(extent) => Refusal::ExternalExtent { format: FORMAT, name: extent.name.clone() },
                None => {
                    damaged("createType", &self.create_type, "known are monolithicSparse and streamOptimized")
                }
            });
        }
        match self.extents.as_slice() {
            [] => Ok(()),
            // The name is that of the file when it was written, which may have been renamed since: it says nothing, as
            // long as it is a plain name.
            [extent] if extent.kind == "SPARSE" && !extent.name.contains(['/', '\\', ':']) => Ok(()),
            [extent] => Err(Refusal::ExternalExtent { format: FORMAT, name: extent.name.clone() }),
            [_, second, ..] => Err(Refusal::ExternalExtent { format: FORMAT, name: second.name.clone() }),
        }
    }
}

/// `RW 4192256 SPARSE "name.vmdk"`, with any white space between the words.
fn parse_extent(line: &str) -> Option<Extent> {
    let (access, rest) = first_word(line);
    if !matches!(access.to_ascii_uppercase().as_str(), "RW" | "RDONLY" | "NOACCESS") {
        return None;
    }
    let (_sectors, rest) = first_word(rest);
    let (kind, rest) = first_word(rest);
    let name = rest.split('"').nth(1).unwrap_or(rest).to_owned();
    Some(Extent { kind: kind.to_ascii_uppercase(), name })
}

fn first_word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_once(char::is_whitespace).unwrap_or((text, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_read_as_the_tools_write_them() {
        let text = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\
                    RW 8 FLAT \"/etc/passwd\" 0\n";
        let descriptor = Descriptor::parse(text);
        assert_eq!(descriptor.create_type, "monolithicFlat");
        assert_eq!(descriptor.extents[0].name, "/etc/passwd");
        assert!(descriptor.parent.is_none());
        assert!(matches!(descriptor.check_embedded(), Err(Refusal::ExternalExtent { .. })));
    }

    #[test]
    fn a_parent_is_seen_by_name_and_by_content_id() {
        let by_name =
            Descriptor::parse("createType=\"monolithicSparse\"\nparentFileNameHint=\"base.vmdk\"\n");
        assert!(
            matches!(by_name.check_embedded(), Err(Refusal::BackingFile { name, .. }) if name == "base.vmdk")
        );
        let by_id = Descriptor::parse("createType=\"monolithicSparse\"\nparentCID=12345678\n");
        assert!(matches!(by_id.check_embedded(), Err(Refusal::BackingFile { .. })));
    }

    #[test]
    fn a_second_extent_is_outside() {
        let text = "createType=\"streamOptimized\"\nRW 8 SPARSE \"a.vmdk\"\nRW 8 SPARSE \"b.vmdk\"\n";
        let refusal = Descriptor::parse(text).check_embedded().unwrap_err();
        assert_eq!(refusal.code(), "external_extent");
    }
}
