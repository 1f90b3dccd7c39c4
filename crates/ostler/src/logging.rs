//! The log of the server and agent roles, on standard error.
//!
//! error: something was lost or needs a person now. warn: it works, and should be looked at. info: what an operator
//! wants to read the next morning. debug: each request and step. trace: everything.

use tracing_subscriber::EnvFilter;

use crate::cli::error::CliError;
use crate::settings::LogFormat;

pub(crate) fn init(filter: &str, format: LogFormat) -> Result<(), CliError> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| CliError::usage(format!("{filter:?} is not a log filter")).why(error.to_string()))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    match format {
        LogFormat::Text => log.with_ansi(ansi).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
