//! The command line: nouns, then verbs. A client of the public API and nothing more.
//!
//! Arguments, terminal and environment are met here and nowhere else in the project. Every command ends in
//! [`error::CliError`] or in nothing; [`main`] alone turns that into text and an exit code.

mod age;
mod args;
mod completion;
mod conclude;
mod config;
mod console;
mod context;
mod endpoint;
pub(crate) mod error;
mod event;
mod export;
mod filter;
mod follow;
mod image;
mod import;
mod node;
mod operation;
mod output;
mod progress;
mod session;
mod snapshot;
mod table;
mod text;
mod token;
mod upload;
mod version;
mod vm;
mod volume;

pub(crate) use args::duration;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use error::{CliError, Result};
use output::Format;
use session::Session;

const AFTER_HELP: &str = "\
Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 timed out, 6 not permitted.

Examples:
  ostler serve                                    run a server and a node on this machine
  ostler image import debian ./debian.qcow2       bring in a disk image
  ostler vm create web --image debian --cpus 2 --memory 1G --disk 20G --publish 2222:22 --wait
  ostler vm console web                           leave with ctrl-]
  ostler vm list -o wide";

/// Turns Linux machines into a private cloud
#[derive(Debug, Parser)]
#[command(name = "ostler", version, after_help = AFTER_HELP, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Globals {
    /// How results are written; json and yaml are as the API has them
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) output: Format,

    /// The server: unix:///PATH, https://HOST:PORT or http://127.0.0.1:PORT
    #[arg(long, global = true, env = "OSTLER_HOST", hide_env_values = true, value_name = "URL")]
    pub(crate) host: Option<String>,

    /// Access token; better given in the environment, where others cannot read it
    #[arg(long, global = true, env = "OSTLER_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) token: Option<String>,

    /// Certificate of the CA that the server's own must come from
    #[arg(long, global = true, env = "OSTLER_CA_CERT", hide_env_values = true, value_name = "FILE")]
    pub(crate) ca_cert: Option<std::path::PathBuf>,

    /// Project to work in
    #[arg(long, global = true, env = "OSTLER_PROJECT", hide_env_values = true, value_name = "NAME")]
    pub(crate) project: Option<String>,

    /// Context to take server, token and project from, and not the current one
    #[arg(long, global = true, env = "OSTLER_CONTEXT", hide_env_values = true, value_name = "NAME")]
    pub(crate) context: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a server, with a node on this machine
    Serve(crate::serve::ServeArgs),
    /// Virtual machines
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Images that disks, kernels and CD-ROMs are made from
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Disks of VMs
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Snapshots of VMs and volumes
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Machines that run VMs
    #[command(subcommand)]
    Node(node::Node),
    /// What takes long: progress, result, cancel
    #[command(subcommand)]
    Operation(operation::OperationCommand),
    /// Show what happened
    Events(event::EventsArgs),
    /// Access tokens for the API
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Settings of the server
    #[command(subcommand)]
    Config(crate::config_check::ConfigCommand),
    /// Servers that this command line knows
    #[command(subcommand)]
    Context(context::ContextCommand),
    /// Show the versions of this program and of the server
    Version(version::VersionArgs),
    /// Print a completion script for a shell
    Completion(completion::CompletionArgs),
}

/// The whole program.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.report();
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let globals = cli.globals;
    match cli.command {
        Command::Serve(args) => crate::serve::run(args),
        Command::Node(node::Node::Run(args)) => crate::node_run::run(args),
        Command::Config(command) => crate::config_check::run(&command),
        Command::Completion(args) => completion::run(&args),
        Command::Context(command) => context::run(&globals, command),
        Command::Version(args) => client(globals, async |session| version::run(session, &args).await),
        Command::Vm(command) => client(globals, async |session| vm::run(session, command).await),
        Command::Image(command) => client(globals, async |session| image::run(session, command).await),
        Command::Volume(command) => client(globals, async |session| volume::run(session, command).await),
        Command::Snapshot(command) => client(globals, async |session| snapshot::run(session, command).await),
        Command::Node(node::Node::List(args)) => {
            client(globals, async |session| node::list(session, &args).await)
        }
        Command::Node(node::Node::Show { node }) => {
            client(globals, async |session| node::show(session, &node).await)
        }
        Command::Operation(command) => {
            client(globals, async |session| operation::run(session, command).await)
        }
        Command::Events(args) => client(globals, async |session| event::run(session, &args).await),
        Command::Token(command) => client(globals, async |session| token::run(session, command).await),
    }
}

/// Runs a command that talks to a server. One thread: a command starts fast and has little to do at once.
fn client(globals: Globals, command: impl AsyncFnOnce(&Session) -> Result<()>) -> Result<()> {
    if let Ok(filter) = tracing_subscriber::EnvFilter::try_from_env("OSTLER_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::failed(format!("cannot start: {e}")))?;
    let result = runtime.block_on(async {
        let session = Session::open(&globals)?;
        command(&session).await
    });
    // A read of standard input may still block; nobody waits for it.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests;
