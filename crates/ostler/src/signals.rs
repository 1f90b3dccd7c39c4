//! Ending in order: the first SIGTERM or SIGINT begins it, the second ends at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cli::error::CliError;

/// A token that is cancelled when the process is asked to end.
pub(crate) fn shutdown() -> Result<CancellationToken, CliError> {
    let failed = |error: std::io::Error| CliError::failed("signals cannot be caught").why(error.to_string());
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let token = CancellationToken::new();
    let ask = token.clone();
    tokio::spawn(async move {
        for asked in 0.. {
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
            }
            if asked > 0 {
                tracing::warn!("asked twice: ending at once");
                std::process::exit(1);
            }
            ask.cancel();
        }
    });
    Ok(token)
}
