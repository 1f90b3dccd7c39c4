//! Whether a foreign qcow2 image stands on its own: no other file, no key, no unknown feature, and no table that
//! points outside the file. `qemu-img check` looks at the second level later; this comes first, so that it is never run on a
//! header that could lead it elsewhere.

use std::io::{Read, Seek};

use super::header::{COMPRESSION_TYPE, CORRUPT, DATA_FILE, DIRTY, EXTENDED_L2, Header, damaged};
use crate::{
    ImageFormat, Refusal,
    probe::window::{Fields, Window},
};

const FORMAT: ImageFormat = ImageFormat::Qcow2;
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;
const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Bits 9 to 55 of a table entry.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

impl Header {
    /// Refuses an image that needs another file or a key, by its header alone.
    pub(crate) fn refuse_references(&self) -> Result<(), Refusal> {
        if let Some(name) = &self.backing_file {
            return Err(Refusal::BackingFile { format: FORMAT, name: name.clone() });
        }
        if let Some(name) = &self.data_file {
            return Err(Refusal::ExternalDataFile { format: FORMAT, name: name.clone() });
        }
        match self.crypt_method {
            0 => {}
            1 => return Err(Refusal::Encrypted { scheme: "AES" }),
            2 => return Err(Refusal::Encrypted { scheme: "LUKS" }),
            other => return Err(damaged("crypt_method", other, "known are 0, 1 and 2")),
        }
        self.check_features()
    }

    /// Refuses an image whose tables do not lie inside the file.
    pub(crate) fn check_tables<R: Read + Seek>(&self, window: &mut Window<'_, R>) -> Result<(), Refusal> {
        self.check_refcounts(window)?;
        self.check_l1(window)?;
        self.check_snapshots(window)
    }

    fn check_features(&self) -> Result<(), Refusal> {
        let known = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
        let unknown = self.incompatible & !known;
        if unknown != 0 {
            let bits: Vec<String> =
                (0..64).filter(|bit| unknown & (1 << bit) != 0).map(|bit| format!("bit {bit}")).collect();
            return Err(Refusal::UnknownFeatures { format: FORMAT, features: bits.join(", ") });
        }
        if self.incompatible & CORRUPT != 0 {
            return Err(Refusal::Unclean { format: FORMAT, why: "it is marked as corrupt" });
        }
        if self.incompatible & DIRTY != 0 {
            return Err(Refusal::Unclean { format: FORMAT, why: "its reference counts are marked as dirty" });
        }
        let typed = self.incompatible & COMPRESSION_TYPE != 0;
        match self.compression_type {
            0 if !typed => Ok(()),
            1 if typed => Ok(()),
            other => Err(damaged("compression_type", other, "it does not go with the feature bits")),
        }
    }

    fn check_refcounts<R: Read + Seek>(&self, window: &mut Window<'_, R>) -> Result<(), Refusal> {
        let bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if bytes == 0 || bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(damaged(
                "refcount_table_clusters",
                self.refcount_table_clusters,
                format!("the table must have 1 to {MAX_REFCOUNT_TABLE_BYTES} bytes"),
            ));
        }
        self.check_aligned("refcount_table_offset", self.refcount_table_offset)?;
        let (len, cluster) = (window.len(), self.cluster_size());
        window.table::<8>(FORMAT, "refcount table", self.refcount_table_offset, bytes / 8, |_, entry| {
            check_entry("refcount block offset", u64::from_be_bytes(entry), len, cluster)
        })
    }

    fn check_l1<R: Read + Seek>(&self, window: &mut Window<'_, R>) -> Result<(), Refusal> {
        let entry_bits = if self.incompatible & EXTENDED_L2 != 0 { 4 } else { 3 };
        let covered = 1u64 << (2 * self.cluster_bits - entry_bits);
        let needed = self.size.div_ceil(covered);
        let entries = u64::from(self.l1_size);
        if entries < needed {
            return Err(damaged(
                "l1_size",
                entries,
                format!("a virtual size of {} needs {needed} entries", self.size),
            ));
        }
        if entries * 8 > MAX_L1_BYTES {
            return Err(damaged("l1_size", entries, format!("the limit is {}", MAX_L1_BYTES / 8)));
        }
        self.check_aligned("l1_table_offset", self.l1_offset)?;
        let (len, cluster) = (window.len(), self.cluster_size());
        window.table::<8>(FORMAT, "L1 table", self.l1_offset, entries, |_, entry| {
            let entry = u64::from_be_bytes(entry);
            if entry & !(OFFSET_MASK | COPIED) != 0 {
                return Err(damaged("L1 entry", format!("{entry:#x}"), "reserved bits are set"));
            }
            check_entry("L2 table offset", entry & OFFSET_MASK, len, cluster)
        })
    }

    fn check_snapshots<R: Read + Seek>(&self, window: &mut Window<'_, R>) -> Result<(), Refusal> {
        if self.snapshots == 0 {
            return Ok(());
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(damaged("nb_snapshots", self.snapshots, format!("the limit is {MAX_SNAPSHOTS}")));
        }
        self.check_aligned("snapshots_offset", self.snapshots_offset)?;
        let mut at = self.snapshots_offset;
        for _ in 0..self.snapshots {
            let mut bytes = [0u8; 40];
            window.read_exact(FORMAT, "snapshot table", at, &mut bytes)?;
            let entry = Fields(&bytes);
            let (l1_offset, l1_size) = (entry.u64_be(0), u64::from(entry.u32_be(8)));
            let names = u64::from(entry.u16_be(12)) + u64::from(entry.u16_be(14));
            let extra = entry.u32_be(36);
            if extra > MAX_SNAPSHOT_EXTRA {
                return Err(damaged(
                    "snapshot extra_data_size",
                    extra,
                    format!("the limit is {MAX_SNAPSHOT_EXTRA}"),
                ));
            }
            if l1_size * 8 > MAX_L1_BYTES {
                return Err(damaged(
                    "snapshot l1_size",
                    l1_size,
                    format!("the limit is {}", MAX_L1_BYTES / 8),
                ));
            }
            self.check_aligned("snapshot l1_table_offset", l1_offset)?;
            window.require(FORMAT, "snapshot L1 table", l1_offset, l1_size * 8)?;
            let entry_end = at + 40 + u64::from(extra) + names;
            window.require(FORMAT, "snapshot table", at, entry_end - at)?;
            at = entry_end.next_multiple_of(8);
        }
        Ok(())
    }

    fn check_aligned(&self, field: &'static str, offset: u64) -> Result<(), Refusal> {
        if offset == 0 || !offset.is_multiple_of(self.cluster_size()) {
            return Err(damaged(
                field,
                offset,
                format!("it must be a multiple of {}, after the header", self.cluster_size()),
            ));
        }
        Ok(())
    }
}

/// A table entry is empty or names a whole cluster inside the file.
fn check_entry(field: &'static str, offset: u64, len: u64, cluster: u64) -> Result<(), Refusal> {
    if offset == 0 {
        return Ok(());
    }
    if !offset.is_multiple_of(cluster) {
        return Err(damaged(field, offset, format!("it must be a multiple of {cluster}")));
    }
    let needed = offset.saturating_add(cluster);
    if needed > len {
        return Err(Refusal::Truncated { format: FORMAT, field, needed, len });
    }
    Ok(())
}
