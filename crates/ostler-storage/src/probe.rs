//! Our strict reader of disk images: it alone decides what format a file has.
//!
//! Who calls it: the import pipeline, before and after `qemu-img` touches a file, and the pool when an image is added.
//! It is pure over a reader, allocates a few MiB at most whatever the file says, reads each table once, and never
//! follows a name that it finds inside. Everything that it does not know, it refuses.

mod raw;
mod refusal;
mod vdi;
mod vhdx;
mod vmdk;
pub(crate) mod window;

use std::{
    fmt,
    io::{Read, Seek},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

pub use refusal::Refusal;

use crate::qcow2;
use window::Window;

/// A disk format that we read. Only raw and qcow2 are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    Raw,
    Qcow2,
    Vmdk,
    Vdi,
    Vhdx,
}

impl ImageFormat {
    /// Every format, in the order in which help texts list them.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vdi, Self::Vhdx];

    /// The name, which is also QEMU's driver name and our file extension.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhdx => "vhdx",
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A name that is none of the known ones.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} {name:?}; known are {known}")]
pub struct UnknownName {
    pub what: &'static str,
    pub name: String,
    pub known: &'static str,
}

impl FromStr for ImageFormat {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        Self::ALL.into_iter().find(|format| format.as_str() == name).ok_or_else(|| UnknownName {
            what: "image format",
            name: name.to_owned(),
            known: "raw, qcow2, vmdk, vdi, vhdx",
        })
    }
}

/// How an uploaded file is compressed as a whole, told by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
}

impl Compression {
    /// Reads the magic number at the beginning of a file.
    pub fn detect(head: &[u8]) -> Self {
        if head.starts_with(&[0x1f, 0x8b, 0x08]) {
            Self::Gzip
        } else if head.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0x00]) {
            Self::Xz
        } else if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            Self::Zstd
        } else {
            Self::None
        }
    }
}

/// What a raw file holds. The other formats always hold a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageContent {
    Disk,
    Iso,
    Kernel,
    Initrd,
}

impl ImageContent {
    /// The name as people write it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Iso => "iso",
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        }
    }
}

impl fmt::Display for ImageContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// What the prober may accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeLimits {
    /// Bytes that the guest would see.
    pub max_virtual_size: u64,
}

impl Default for ProbeLimits {
    /// 2 TiB.
    fn default() -> Self {
        Self { max_virtual_size: 2 << 40 }
    }
}

impl ProbeLimits {
    fn check(&self, virtual_size: u64) -> Result<(), Refusal> {
        // Above 2^62 sums of sizes would overflow, whatever the caller allows.
        let limit = self.max_virtual_size.min(1 << 62);
        if virtual_size > limit {
            return Err(Refusal::TooLarge { what: "virtual size", value: virtual_size, limit });
        }
        Ok(())
    }
}

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbedImage {
    pub format: ImageFormat,
    pub content: ImageContent,
    /// Bytes that the guest sees, a multiple of 512.
    pub virtual_size: u64,
    /// The variant of the format for people, for example "qcow2 version 3" or "streamOptimized".
    pub detail: String,
}

/// Decides what the file is, or says why it is refused.
pub fn probe<R: Read + Seek>(reader: &mut R, limits: &ProbeLimits) -> Result<ProbedImage, Refusal> {
    let mut window = Window::new(reader)?;
    let (format, content, virtual_size, detail) = detect(&mut window, limits)?;
    limits.check(virtual_size)?;
    if virtual_size == 0 {
        return Err(Refusal::Empty { format });
    }
    // The last sector of a raw file may be cut short; QEMU reads its rest as zeroes.
    let virtual_size = virtual_size.next_multiple_of(512);
    Ok(ProbedImage { format, content, virtual_size, detail })
}

type Detected = (ImageFormat, ImageContent, u64, String);

fn detect<R: Read + Seek>(window: &mut Window<'_, R>, limits: &ProbeLimits) -> Result<Detected, Refusal> {
    let disk = ImageContent::Disk;
    if qcow2::is_qcow2(window)? {
        let header = qcow2::Header::read(window)?;
        header.refuse_references()?;
        limits.check(header.size)?;
        header.check_tables(window)?;
        return Ok((ImageFormat::Qcow2, disk, header.size, format!("qcow2 version {}", header.version)));
    }
    if vmdk::is_vmdk(window)? {
        let (size, detail) = vmdk::check(window)?;
        return Ok((ImageFormat::Vmdk, disk, size, detail));
    }
    if vdi::is_vdi(window)? {
        let (size, detail) = vdi::check(window)?;
        return Ok((ImageFormat::Vdi, disk, size, detail));
    }
    if vhdx::is_vhdx(window)? {
        let (size, detail) = vhdx::check(window)?;
        return Ok((ImageFormat::Vhdx, disk, size, detail));
    }
    let content = raw::check(window)?;
    Ok((ImageFormat::Raw, content, window.len(), content.as_str().to_owned()))
}
