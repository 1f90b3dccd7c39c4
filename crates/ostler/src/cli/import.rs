//! `ostler image import`: from a file, standard input, or a URL that the server fetches.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use ostler_api::image::{Image, ImageCreate, ImagePhase};
use ostler_api::operation::Accepted;
use ostler_api::{ErrorCode, Name};
use ostler_client::ClientError;

use super::args::{WaitArgs, duration, labels, pair};
use super::conclude::{Deed, Ends, conclude};
use super::error::{CliError, Doing, Exit, Result};
use super::session::Session;
use super::upload::{Upload, upload};

pub(super) const EXAMPLES: &str = "\
Examples:
  ostler image import debian ./debian-13.qcow2
  ostler image import debian https://mirror.example/debian-13.qcow2 --sha256 3f8a…
  zstdcat disk.raw.zst | ostler image import disk -";

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// Name of the new image: a-z, 0-9 and '-'
    name: Name,

    /// File, '-' for standard input, or an http(s) URL that the server fetches; raw, qcow2, vmdk, vdi or vhdx, also
    /// compressed with gzip, xz or zstd
    source: String,

    /// SHA-256 that the source must have
    #[arg(long, value_parser = sha256, value_name = "HEX")]
    sha256: Option<String>,

    /// Label of the image
    #[arg(short, long, value_parser = pair, value_name = "KEY=VALUE")]
    label: Vec<(String, String)>,

    /// Go on with an import of this name that was broken off, from the same source
    #[arg(long)]
    resume: bool,

    /// Wait until the image can be used, which is the default
    #[arg(short, long, conflicts_with = "no_wait")]
    wait: bool,

    /// Return as soon as the data is there
    #[arg(long)]
    no_wait: bool,

    /// Longest time to wait after the upload, such as 90s or 5m; past it the exit code is 5 and the work goes on
    #[arg(long, value_parser = duration, default_value = "1h", value_name = "TIME")]
    timeout: Duration,
}

fn sha256(text: &str) -> Result<String, String> {
    let good = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if good { Ok(text.to_ascii_lowercase()) } else { Err("a SHA-256 has 64 hexadecimal digits".to_owned()) }
}

/// Where the data comes from.
enum Source {
    Url(String),
    Here(Upload),
}

impl Source {
    async fn open(text: &str) -> Result<Self> {
        if text.starts_with("http://") || text.starts_with("https://") {
            return Ok(Self::Url(text.to_owned()));
        }
        if text == "-" {
            if std::io::stdin().is_terminal() {
                return Err(CliError::usage("standard input is a terminal, which is no image")
                    .hint("pipe the image in, or name a file"));
            }
            return Ok(Self::Here(Upload::stdin()));
        }
        let fail = |why: String| {
            CliError::failed(format!("cannot read {text}"))
                .why(why)
                .hint("check the path; a URL begins with https://")
        };
        Upload::file(Path::new(text)).await.map(Self::Here).map_err(|e| fail(e.to_string()))
    }
}

pub(crate) async fn run(session: &Session, args: ImportArgs) -> Result<()> {
    let deed = Deed::new("import", "image", args.name.as_str(), Ends::Settled);
    // What cannot be read is found before anything is made.
    let source = Source::open(&args.source).await.doing(|| deed.failure.clone())?;
    let wait = WaitArgs { wait: !args.no_wait, timeout: args.timeout };
    let accepted = begin(session, &args, &source).await.doing(|| deed.failure.clone())?;
    if let Source::Here(data) = source {
        let id = accepted.resource.metadata.id.to_string();
        upload(&session.client, &id, &deed.title, data)
            .await
            .map_err(|error| broken_off(error, &args))
            .doing(|| deed.failure.clone())?;
    }
    let image = conclude(session, &deed, accepted, &wait).await?;
    session.out.changed(&[image], true)
}

async fn begin(session: &Session, args: &ImportArgs, source: &Source) -> Result<Accepted<Image>> {
    let client = &session.client;
    if args.resume {
        let image = client.image_get(args.name.as_str()).await?;
        if !waits_for_data(&image) {
            let what = format!("image {} is {} and waits for no data", args.name, image.status.phase);
            return Err(
                CliError::new(Exit::Conflict, what).hint("import it under another name, or delete it first")
            );
        }
        return Ok(Accepted { operation: None, resource: image });
    }
    let url = match source {
        Source::Url(url) => Some(url.clone()),
        Source::Here(_) => None,
    };
    let create = ImageCreate {
        name: args.name.clone(),
        labels: labels(args.label.clone()),
        url,
        expected_sha256: args.sha256.clone(),
    };
    match client.image_create(&create, None).await {
        Ok(accepted) => Ok(accepted),
        Err(error) if error.code() == Some(ErrorCode::AlreadyExists) => {
            Err(taken(session, args, error).await)
        }
        Err(error) => Err(error.into()),
    }
}

fn waits_for_data(image: &Image) -> bool {
    image.spec.url.is_none() && matches!(image.status.phase, ImagePhase::Queued | ImagePhase::Uploading)
}

/// The name may be that of an import that was broken off.
async fn taken(session: &Session, args: &ImportArgs, error: ClientError) -> CliError {
    let image = session.client.image_get(args.name.as_str()).await;
    let error = CliError::from(error);
    match image {
        Ok(image) if waits_for_data(&image) => error.hint(format!(
            "its import was broken off: go on with --resume, or begin anew after: ostler image delete {}",
            args.name
        )),
        Ok(_) | Err(_) => error,
    }
}

fn broken_off(error: CliError, args: &ImportArgs) -> CliError {
    match error.exit() {
        // Standard input cannot be read again from where it was.
        Exit::Failed | Exit::TimedOut if args.source != "-" => {
            error.hint(format!("go on with: ostler image import {} {} --resume", args.name, args.source))
        }
        _ => error,
    }
}
