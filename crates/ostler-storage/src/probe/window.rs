//! Bounded reads from an untrusted file: every read is checked against the length that the file really has.

use std::io::{Read, Seek, SeekFrom};

use super::{ImageFormat, Refusal};

/// A file being probed. Offsets and lengths come from the file itself, so none of them is believed.
pub(crate) struct Window<'a, R> {
    reader: &'a mut R,
    len: u64,
}

impl<'a, R: Read + Seek> Window<'a, R> {
    pub(crate) fn new(reader: &'a mut R) -> Result<Self, Refusal> {
        let len = reader.seek(SeekFrom::End(0))?;
        Ok(Self { reader, len })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Reads as many of the `buf.len()` bytes at `offset` as the file has.
    pub(crate) fn read_some(&mut self, offset: u64, buf: &mut [u8]) -> Result<usize, Refusal> {
        if offset >= self.len {
            return Ok(0);
        }
        let wanted = usize::try_from(self.len - offset).unwrap_or(usize::MAX).min(buf.len());
        self.reader.seek(SeekFrom::Start(offset))?;
        let mut done = 0;
        while done < wanted {
            match self.reader.read(&mut buf[done..wanted]) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(done)
    }

    /// True when the file has exactly these bytes at `offset`.
    pub(crate) fn has(&mut self, offset: u64, magic: &[u8]) -> Result<bool, Refusal> {
        let mut buf = [0u8; 64];
        let buf = &mut buf[..magic.len()];
        let read = self.read_some(offset, buf)?;
        Ok(read == magic.len() && buf == magic)
    }

    /// Fills `buf` from `offset`; `field` names what is being read if the file ends before.
    pub(crate) fn read_exact(
        &mut self,
        format: ImageFormat,
        field: &'static str,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), Refusal> {
        self.require(format, field, offset, buf.len() as u64)?;
        let read = self.read_some(offset, buf)?;
        if read == buf.len() {
            Ok(())
        } else {
            Err(Refusal::Truncated { format, field, needed: offset + buf.len() as u64, len: self.len })
        }
    }

    /// Checks that `offset..offset + len` lies inside the file.
    pub(crate) fn require(
        &self,
        format: ImageFormat,
        field: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<(), Refusal> {
        let needed = offset.saturating_add(len);
        if needed <= self.len {
            Ok(())
        } else {
            Err(Refusal::Truncated { format, field, needed, len: self.len })
        }
    }

    /// Reads a table of `count` entries of `N` bytes in pieces of bounded size and hands each entry to `visit`.
    pub(crate) fn table<const N: usize>(
        &mut self,
        format: ImageFormat,
        field: &'static str,
        offset: u64,
        count: u64,
        mut visit: impl FnMut(u64, [u8; N]) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        const ENTRIES: usize = 8192;
        self.require(format, field, offset, count.saturating_mul(N as u64))?;
        let mut buf = vec![0u8; N * ENTRIES.min(usize::try_from(count).unwrap_or(ENTRIES))];
        let mut next = 0;
        while next < count {
            let batch = (count - next).min(ENTRIES as u64);
            let bytes = &mut buf[..N * batch as usize];
            self.read_exact(format, field, offset + next * N as u64, bytes)?;
            for (index, entry) in bytes.as_chunks::<N>().0.iter().enumerate() {
                visit(next + index as u64, *entry)?;
            }
            next += batch;
        }
        Ok(())
    }
}

/// A fixed-size header with little- and big-endian fields at known offsets.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0[at..at + N].try_into().expect("the slice has N bytes")
    }

    pub(crate) fn u16_le(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    pub(crate) fn u32_le(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    pub(crate) fn u64_le(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    pub(crate) fn u16_be(&self, at: usize) -> u16 {
        u16::from_be_bytes(self.array(at))
    }

    pub(crate) fn u32_be(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.array(at))
    }

    pub(crate) fn u64_be(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.array(at))
    }

    pub(crate) fn guid(&self, at: usize) -> [u8; 16] {
        self.array(at)
    }
}
