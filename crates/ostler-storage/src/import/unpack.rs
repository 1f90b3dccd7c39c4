//! Unpacks a compressed upload, never into more than a given number of bytes.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

use liblzma::stream::{CONCATENATED, Stream};

use super::{ImportProgress, ImportStage};
use crate::{
    Compression, ImportError, Refusal, StorageError,
    files::{self, Context, Scratch},
};

/// Memory that an xz stream may ask for; `xz -9` needs 65 MiB.
const XZ_MEMORY: u64 = 256 << 20;
/// log2 of the largest zstd window, 128 MiB, which is what the `zstd` tool takes without being told more.
const ZSTD_WINDOW: u32 = 27;

/// Writes the unpacked content of `upload` to `to`, with holes for zeroes.
pub(super) fn unpack(
    upload: &File,
    upload_path: &Path,
    compression: Compression,
    to: &Scratch,
    limit: u64,
    step: &super::finish::Step<'_>,
) -> Result<(), ImportError> {
    let total = upload.metadata().context("look at", upload_path)?.len();
    let counted = Counted { file: upload, read: std::cell::Cell::new(0) };
    let mut reader = decoder(compression, &counted)?;
    let mut buf = vec![0u8; files::CHUNK];
    let mut done = 0u64;
    loop {
        step.check()?;
        // What the decoder says when the upload itself cannot be read is an I/O error of ours, with an OS error code.
        let read = files::read_full(&mut reader, &mut buf).map_err(|error| match error.raw_os_error() {
            Some(_) => ImportError::from(StorageError::io("read", upload_path, error)),
            None => Refusal::BadCompression { why: error.to_string() }.into(),
        })?;
        if read == 0 {
            break;
        }
        if done + read as u64 > limit {
            return Err(
                Refusal::TooLarge { what: "the unpacked file", value: done + read as u64, limit }.into()
            );
        }
        files::write_sparse(&to.file, done, &buf[..read]).context("write", &to.path)?;
        done += read as u64;
        step.report(ImportProgress {
            stage: ImportStage::Unpack,
            done: counted.read.get(),
            total: Some(total),
        });
    }
    to.file.set_len(done).context("write", &to.path)?;
    Ok(())
}

fn decoder<'a>(compression: Compression, reader: &'a Counted<'a>) -> Result<Box<dyn Read + 'a>, ImportError> {
    let bad = |error: &dyn std::fmt::Display| Refusal::BadCompression { why: error.to_string() };
    let reader = BufReader::with_capacity(256 << 10, reader);
    Ok(match compression {
        Compression::None => Box::new(reader),
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        Compression::Xz => {
            let stream = Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED).map_err(|error| bad(&error))?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(reader, stream))
        }
        Compression::Zstd => {
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(reader).map_err(|error| bad(&error))?;
            decoder.window_log_max(ZSTD_WINDOW).map_err(|error| bad(&error))?;
            Box::new(decoder)
        }
    })
}

/// Counts what was read, for progress in bytes of the upload.
struct Counted<'a> {
    file: &'a File,
    read: std::cell::Cell<u64>,
}

impl Read for &Counted<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut file = self.file;
        let read = file.read(buf)?;
        self.read.set(self.read.get() + read as u64);
        Ok(read)
    }
}
