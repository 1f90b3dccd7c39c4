//! `ostler config check`: reads the settings as `serve` would, and says what it would use.

use crate::cli::error::CliError;
use crate::settings::{Overrides, Settings};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum ConfigCommand {
    /// Read the server's settings as `ostler serve` would, and show what it would use
    Check(Box<ConfigCheckArgs>),
}

#[derive(Debug, clap::Args)]
pub(crate) struct ConfigCheckArgs {
    #[command(flatten)]
    settings: Overrides,
}

pub(crate) fn run(command: &ConfigCommand) -> Result<(), CliError> {
    let ConfigCommand::Check(args) = command;
    let settings = Settings::load(&args.settings)?;
    let none = || "none".to_owned();
    let path =
        |path: &Option<std::path::PathBuf>| path.as_ref().map_or_else(none, |p| p.display().to_string());
    let rows = [
        ("settings file", path(&settings.file)),
        ("data directory", settings.data_dir.display().to_string()),
        ("unix socket", path(&settings.server.unix_socket)),
        ("TLS", settings.server.tls.as_ref().map_or_else(none, |tls| tls.addr.to_string())),
        ("plain HTTP", settings.server.plain_http.map_or_else(none, |addr| addr.to_string())),
        ("node", settings.node.as_ref().map_or_else(none, |node| node.name.to_string())),
        ("log", settings.log.clone()),
        ("history", format!("{} s", settings.history.as_secs())),
        (
            "scheduler",
            format!(
                "CPU ratio {}, memory ratio {}, disk ratio {}, spread {}",
                settings.cloud.scheduler.cpu_ratio,
                settings.cloud.scheduler.memory_ratio,
                settings.cloud.scheduler.disk_ratio,
                settings.cloud.scheduler.spread
            ),
        ),
        ("private URLs", if settings.cloud.fetch_private { "allowed" } else { "refused" }.to_owned()),
        ("operations kept", format!("{} s", settings.cloud.operations_kept.as_secs())),
        ("events kept", format!("{} s", settings.cloud.events_kept.as_secs())),
        ("connections", settings.server.limits.max_connections.to_string()),
        ("largest image", settings.cloud.image_max.to_string()),
        ("node lease", format!("{} s", settings.cloud.node_lease.as_secs())),
    ];
    for (name, value) in rows {
        println!("{name:<16} {value}");
    }
    println!("\nThe settings are valid.");
    Ok(())
}
