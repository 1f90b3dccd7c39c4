//! `ostler version`.

use clap::Args;
use serde::Serialize;

use super::error::Result;
use super::output::note_raw;
use super::session::Session;

#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    /// Do not ask the server
    #[arg(long)]
    client: bool,
}

#[derive(Debug, Serialize)]
struct Versions {
    client: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<ostler_client::ServerVersion>,
}

/// A server that does not answer is no failure: this program's version is known.
pub(crate) async fn run(session: &Session, args: &VersionArgs) -> Result<()> {
    let client = env!("CARGO_PKG_VERSION");
    session.out.say(&format!("ostler {client}"))?;
    let server = if args.client { None } else { Some(session.client.version().await) };
    match server {
        Some(Err(error)) => {
            note_raw(&super::error::CliError::from(error).text().replacen("error:", "server:", 1));
            programs(session, Versions { client, server: None })
        }
        Some(Ok(server)) => {
            session.out.say(&format!(
                "server {} at {} (cloud {}, schema {})",
                server.version,
                session.client.target(),
                server.cloud,
                server.schema
            ))?;
            programs(session, Versions { client, server: Some(server) })
        }
        None => programs(session, Versions { client, server: None }),
    }
}

fn programs(session: &Session, versions: Versions) -> Result<()> {
    if session.out.is_human() { Ok(()) } else { session.out.value(&versions) }
}
