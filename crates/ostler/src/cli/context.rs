//! `ostler context`: the servers that this command line knows.

use std::path::PathBuf;

use clap::Subcommand;
use serde::Serialize;

use super::Globals;
use super::config::{self, Config, Context};
use super::error::{CliError, Exit, Result};
use super::output::{Format, Output, write};
use super::table::{Column, Table, col};

#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// List contexts; the current one has a star
    List,
    /// Make a context the current one
    Use {
        /// Name
        name: String,
    },
    /// Make or change a context from --host, --token, --ca-cert and --project, or their environment variables
    #[command(after_help = "\
Example:
  OSTLER_TOKEN=ostler_… ostler context set work --host https://cloud.example:8550 --ca-cert ca.pem")]
    Set {
        /// Name
        name: String,
    },
}

const COLUMNS: [Column; 5] = [col(""), col("NAME"), col("HOST"), col("PROJECT"), col("TOKEN")];

#[derive(Debug, Serialize)]
struct Listed<'a> {
    name: &'a str,
    current: bool,
    host: &'a str,
    project: Option<&'a str>,
    ca_cert: Option<&'a PathBuf>,
    has_token: bool,
}

pub(crate) fn run(globals: &Globals, command: ContextCommand) -> Result<()> {
    let path = config::path().ok_or_else(|| {
        CliError::failed("no place for a configuration").hint("set HOME or XDG_CONFIG_HOME")
    })?;
    let mut config = config::load(&path)?;
    let out = Output { format: globals.output };
    match command {
        ContextCommand::List => list(out, &config),
        ContextCommand::Use { name } => {
            if !config.contexts.contains_key(&name) {
                return Err(CliError::new(Exit::NotFound, format!("there is no context {name:?}"))
                    .hint("see them with: ostler context list"));
            }
            config.current = Some(name.clone());
            config::save(&path, &config)?;
            out.say(&format!("the current context is {name}"))
        }
        ContextCommand::Set { name } => {
            let context = changed(globals, config.contexts.remove(&name).unwrap_or_default())?;
            config.contexts.insert(name.clone(), context);
            config.current.get_or_insert_with(|| name.clone());
            config::save(&path, &config)?;
            out.say(&format!("context {name} is in {}", path.display()))
        }
    }
}

/// What is given replaces what was there.
fn changed(globals: &Globals, mut context: Context) -> Result<Context> {
    if let Some(host) = &globals.host {
        host.parse::<ostler_client::Target>()
            .map_err(|e| CliError::usage("the server's address is wrong").why(e.to_string()))?;
        context.host.clone_from(host);
    }
    if context.host.is_empty() {
        return Err(CliError::usage("a context needs a server").hint("give it with --host URL"));
    }
    if let Some(token) = &globals.token {
        context.token = Some(token.clone());
    }
    if let Some(file) = &globals.ca_cert {
        let whole = std::fs::canonicalize(file)
            .map_err(|e| CliError::usage(format!("cannot find {}", file.display())).why(e.to_string()))?;
        context.ca_cert = Some(whole);
    }
    if let Some(project) = &globals.project {
        context.project = Some(project.clone());
    }
    Ok(context)
}

fn list(out: Output, config: &Config) -> Result<()> {
    let listed: Vec<_> = config
        .contexts
        .iter()
        .map(|(name, context)| Listed {
            name,
            current: config.current.as_deref() == Some(name),
            host: &context.host,
            project: context.project.as_deref(),
            ca_cert: context.ca_cert.as_ref(),
            has_token: context.token.is_some(),
        })
        .collect();
    match out.format {
        Format::Table | Format::Wide => {
            let rows: Vec<_> = listed
                .iter()
                .map(|context| {
                    vec![
                        if context.current { "*" } else { " " }.to_owned(),
                        context.name.to_owned(),
                        context.host.to_owned(),
                        context.project.unwrap_or_default().to_owned(),
                        if context.has_token { "yes" } else { "no" }.to_owned(),
                    ]
                })
                .collect();
            write(&Table::new(&COLUMNS, true).whole(&rows))
        }
        Format::Json | Format::Yaml => out.value(&listed),
        Format::Name => {
            write(&listed.iter().map(|context| format!("{}\n", context.name)).collect::<String>())
        }
    }
}
