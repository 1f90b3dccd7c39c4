//! The qcow2 header and its extensions. Big-endian throughout.

use std::io::{Read, Seek};

use crate::{
    ImageFormat, Refusal,
    probe::window::{Fields, Window},
};

const FORMAT: ImageFormat = ImageFormat::Qcow2;
const V2_LENGTH: u64 = 72;
const V3_LENGTH: u64 = 104;
/// QEMU's own limit for the length of a backing file's name.
const MAX_NAME: u64 = 1023;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_DATA_FILE: u32 = 0x4441_5441;
const EXT_ENCRYPTION: u32 = 0x0537_be77;

/// Incompatible feature bits.
pub(super) const DIRTY: u64 = 1 << 0;
pub(super) const CORRUPT: u64 = 1 << 1;
pub(super) const DATA_FILE: u64 = 1 << 2;
pub(super) const COMPRESSION_TYPE: u64 = 1 << 3;
pub(super) const EXTENDED_L2: u64 = 1 << 4;

/// A parsed header. Offsets and sizes are as the file says and not yet checked against its length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) size: u64,
    /// Name of the backing file; what is unreadable is shown as such.
    pub(crate) backing_file: Option<String>,
    pub(crate) backing_format: Option<String>,
    pub(crate) data_file: Option<String>,
    pub(crate) crypt_method: u32,
    pub(crate) incompatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) compression_type: u8,
    pub(crate) l1_size: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
}

/// True when the file begins with qcow2's magic.
pub(crate) fn is_qcow2<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<bool, Refusal> {
    window.has(0, b"QFI\xfb")
}

pub(super) fn damaged(field: &'static str, value: impl ToString, why: impl Into<String>) -> Refusal {
    Refusal::Damaged { format: FORMAT, field, value: value.to_string(), why: why.into() }
}

impl Header {
    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Marked as corrupt or with reference counts to be rebuilt: a repair is due before it is used.
    pub(crate) fn is_unclean(&self) -> bool {
        self.incompatible & (DIRTY | CORRUPT) != 0
    }

    /// Features that a reader must know and that files of ours never have.
    pub(crate) fn foreign_features(&self) -> u64 {
        self.incompatible & !(DIRTY | CORRUPT)
    }

    /// Reads the header and its extensions.
    pub(crate) fn read<R: Read + Seek>(window: &mut Window<'_, R>) -> Result<Self, Refusal> {
        let mut bytes = [0u8; 112];
        window.read_exact(FORMAT, "header", 0, &mut bytes[..V2_LENGTH as usize])?;
        let fields = Fields(&bytes);
        let version = fields.u32_be(4);
        if version != 2 && version != 3 {
            return Err(Refusal::UnsupportedVersion { format: FORMAT, version: version.into() });
        }
        let cluster_bits = fields.u32_be(20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged("cluster_bits", cluster_bits, "allowed are 9 to 21"));
        }
        let cluster_size = 1u64 << cluster_bits;
        let mut length = V2_LENGTH;
        if version == 3 {
            window.read_exact(FORMAT, "header", 0, &mut bytes[..V3_LENGTH as usize])?;
            length = Fields(&bytes).u32_be(100).into();
            if length < V3_LENGTH || length > cluster_size || !length.is_multiple_of(8) {
                return Err(damaged(
                    "header_length",
                    length,
                    "it must be a multiple of 8 from 104 to one cluster",
                ));
            }
            if length > V3_LENGTH {
                window.read_exact(FORMAT, "header", 0, &mut bytes)?;
            }
            let refcount_order = Fields(&bytes).u32_be(96);
            if refcount_order > 6 {
                return Err(damaged("refcount_order", refcount_order, "allowed are 0 to 6"));
            }
        }
        let fields = Fields(&bytes);
        let v3 = version == 3;
        let mut header = Self {
            version,
            cluster_bits,
            size: fields.u64_be(24),
            backing_file: None,
            backing_format: None,
            data_file: None,
            crypt_method: fields.u32_be(32),
            incompatible: if v3 { fields.u64_be(72) } else { 0 },
            autoclear: if v3 { fields.u64_be(88) } else { 0 },
            compression_type: if v3 && length > V3_LENGTH { bytes[104] } else { 0 },
            l1_size: fields.u32_be(36),
            l1_offset: fields.u64_be(40),
            refcount_table_offset: fields.u64_be(48),
            refcount_table_clusters: fields.u32_be(56),
            snapshots: fields.u32_be(60),
            snapshots_offset: fields.u64_be(64),
        };
        let (backing_offset, backing_len) = (fields.u64_be(8), u64::from(fields.u32_be(16)));
        if backing_offset != 0 {
            header.backing_file = Some(read_name(window, backing_offset, backing_len)?);
        } else if backing_len != 0 {
            return Err(damaged("backing_file_size", backing_len, "there is no backing file"));
        }
        let end = if backing_offset == 0 { cluster_size } else { backing_offset.min(cluster_size) };
        header.read_extensions(window, length, end)?;
        if header.incompatible & DATA_FILE != 0 && header.data_file.is_none() {
            header.data_file = Some("(not named)".to_owned());
        }
        Ok(header)
    }

    fn read_extensions<R: Read + Seek>(
        &mut self,
        window: &mut Window<'_, R>,
        start: u64,
        end: u64,
    ) -> Result<(), Refusal> {
        let mut at = start;
        while at + 8 <= end {
            let mut bytes = [0u8; 8];
            window.read_exact(FORMAT, "header extension", at, &mut bytes)?;
            let (kind, len) = (Fields(&bytes).u32_be(0), u64::from(Fields(&bytes).u32_be(4)));
            if kind == EXT_END {
                return Ok(());
            }
            at += 8;
            if len > end - at {
                return Err(damaged(
                    "header extension length",
                    len,
                    format!("{} bytes are left for it", end - at),
                ));
            }
            match kind {
                EXT_BACKING_FORMAT => self.backing_format = Some(read_name(window, at, len)?),
                EXT_DATA_FILE => self.data_file = Some(read_name(window, at, len)?),
                EXT_ENCRYPTION if self.crypt_method == 0 => {
                    return Err(damaged("crypt_method", 0, "there is an encryption header"));
                }
                // Compatible by definition: what a reader does not know, it may skip.
                _ => {}
            }
            at += len.next_multiple_of(8);
        }
        Ok(())
    }
}

/// A name inside the header, for comparison and for messages.
fn read_name<R: Read + Seek>(window: &mut Window<'_, R>, offset: u64, len: u64) -> Result<String, Refusal> {
    if len > MAX_NAME {
        return Ok(format!("(a name of {len} bytes)"));
    }
    let mut name = vec![0; len as usize];
    let read = window.read_some(offset, &mut name)?;
    if read < name.len() {
        return Ok("(a name beyond the end of the file)".to_owned());
    }
    Ok(String::from_utf8_lossy(&name).into_owned())
}
