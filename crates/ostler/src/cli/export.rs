//! `ostler image export`.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use http_body_util::BodyExt;
use ostler_api::ByteSize;
use ostler_api::image::ImageFormat;
use ostler_client::Body;
use sha2::{Digest, Sha256};

use super::args::words;
use super::error::{CliError, Doing, Exit, Result};
use super::output::{note, write_bytes};
use super::progress::Progress;
use super::session::Session;

pub(super) const EXAMPLES: &str = "\
Examples:
  ostler image export debian debian.qcow2
  ostler image export debian debian.vmdk --format vmdk
  ostler image export debian - --format raw | dd of=/dev/sdX bs=4M";

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Name or id
    image: String,

    /// File to write, or '-' for standard output
    file: PathBuf,

    /// Convert it; without, it is written as it is stored
    #[arg(long, value_parser = words!(ImageFormat), value_name = "FORMAT")]
    format: Option<ImageFormat>,

    /// Replace the file if it is there
    #[arg(short, long)]
    force: bool,
}

pub(crate) async fn run(session: &Session, args: &ExportArgs) -> Result<()> {
    let doing = || format!("cannot export image {}", args.image);
    let to_stdout = args.file == Path::new("-");
    if to_stdout && std::io::stdout().is_terminal() {
        return Err(CliError::usage("standard output is a terminal, which is no place for an image")
            .hint("name a file, or pipe it on"));
    }
    if !to_stdout && !args.force && args.file.exists() {
        return Err(CliError::new(Exit::Conflict, format!("{} is there already", args.file.display()))
            .hint("choose another name, or replace it with --force"));
    }
    let image = session.client.image_get(&args.image).await.doing(doing)?;
    let id = image.metadata.id.to_string();
    let (size, body) = session.client.image_data(&id, args.format).await.doing(doing)?;
    // A conversion has no checksum that was known before.
    let expected = image.status.data.filter(|_| args.format.is_none()).map(|data| data.sha256);
    let mut copy = Copy { body, size, expected, title: format!("export image {}", args.image) };
    if to_stdout {
        copy.run(write_bytes).await.doing(doing)?;
        return Ok(());
    }
    let partial = partial(&args.file);
    let bytes = to_file(&mut copy, &partial).await.doing(doing).inspect_err(|_| {
        // Half an image is of no use to anybody.
        let _ = std::fs::remove_file(&partial);
    })?;
    std::fs::rename(&partial, &args.file)
        .map_err(|e| CliError::failed(format!("cannot write {}", args.file.display())).why(e.to_string()))?;
    note(&format!("{} written, {}", args.file.display(), ByteSize(bytes)));
    Ok(())
}

fn partial(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".part");
    name.into()
}

async fn to_file(copy: &mut Copy, path: &Path) -> Result<u64> {
    let fail =
        |e: std::io::Error| CliError::failed(format!("cannot write {}", path.display())).why(e.to_string());
    let mut file: File =
        OpenOptions::new().write(true).create(true).truncate(true).open(path).map_err(fail)?;
    let bytes = copy.run(|bytes| file.write_all(bytes).map_err(fail)).await?;
    file.sync_all().map_err(fail)?;
    Ok(bytes)
}

struct Copy {
    body: Body,
    size: Option<u64>,
    expected: Option<String>,
    title: String,
}

impl Copy {
    /// Copies the whole and checks that it is whole.
    async fn run(&mut self, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<u64> {
        let mut progress = Progress::new(&self.title);
        let mut hash = self.expected.is_some().then(Sha256::new);
        let mut done = 0;
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|e| CliError::failed("the connection broke").why(e.to_string()))?;
            let Ok(data) = frame.into_data() else { continue };
            if let Some(hash) = &mut hash {
                hash.update(&data);
            }
            take(&data)?;
            done += data.len() as u64;
            progress.show("downloading", done, self.size);
        }
        if let Some(size) = self.size.filter(|size| *size != done) {
            return Err(CliError::failed(format!("only {done} of {size} bytes came")));
        }
        let found =
            hash.map(|hash| hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        if let (Some(found), Some(expected)) = (found, &self.expected)
            && found != *expected
        {
            return Err(CliError::failed(format!(
                "what came has SHA-256 {found}, and should have {expected}"
            )));
        }
        take(&[])?;
        Ok(done)
    }
}
