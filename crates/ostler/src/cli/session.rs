//! What a command has in hand: a client and a way to write.

use std::path::Path;

use ostler_client::Client;
use rustix::fs::Access;

use super::error::Result;
use super::output::Output;
use super::{Globals, config, endpoint};

pub(crate) struct Session {
    pub(crate) client: Client,
    pub(crate) out: Output,
    /// As named by flag, environment or context.
    pub(crate) project: Option<String>,
}

impl Session {
    /// Nothing is sent yet.
    pub(crate) fn open(globals: &Globals) -> Result<Self> {
        let config = match config::path() {
            Some(path) => config::load(&path)?,
            None => config::Config::default(),
        };
        let dirs = crate::data_dir::candidates(std::env::var_os("OSTLER_DATA_DIR"), std::env::var_os("HOME"));
        let endpoint = endpoint::resolve(globals, &config, &dirs, usable)?;
        let client = Client::connect(endpoint.target, endpoint.credentials)?;
        let client = match &endpoint.project {
            Some(project) => client.in_project(project.as_str()),
            None => client,
        };
        Ok(Self { client, out: Output { format: globals.output }, project: endpoint.project })
    }
}

fn usable(socket: &Path) -> bool {
    rustix::fs::access(socket, Access::WRITE_OK).is_ok()
}
