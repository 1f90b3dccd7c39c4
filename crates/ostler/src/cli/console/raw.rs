//! The terminal in raw mode, put right again on every way out.

use std::io::stdin;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::cli::error::{CliError, Result};

/// While it lives, every key comes through at once and unchanged. A panic unwinds through it.
pub(super) struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    pub(super) fn enter() -> Result<Self> {
        let fail = |e: rustix::io::Errno| CliError::failed("cannot set up the terminal").why(e.to_string());
        let before = tcgetattr(stdin()).map_err(fail)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Flush, &raw).map_err(fail)?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone: then there is nothing to put right.
        let _ = tcsetattr(stdin(), OptionalActions::Flush, &self.before);
    }
}
