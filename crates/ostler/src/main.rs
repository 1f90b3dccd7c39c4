//! The `ostler` binary: `serve` and `node run` are the server's roles, all else is the command line.

mod cli;
mod config_check;
mod data_dir;
mod local_node;
mod logging;
mod node_run;
mod serve;
mod settings;
mod signals;
mod simulated;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
