//! How a command fails: one text for a person, one exit code for a script.

use std::io;

use ostler_api::{ErrorCode, Fault};
use ostler_client::ClientError;

use super::text::clean;

pub(crate) type Result<T, E = CliError> = std::result::Result<T, E>;

/// What the exit code says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Not an error: whoever read our output has enough.
    Done,
    Failed,
    Usage,
    NotFound,
    Conflict,
    TimedOut,
    NotPermitted,
    /// Ended by this signal.
    Signal(u8),
}

impl Exit {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::TimedOut => 5,
            Self::NotPermitted => 6,
            Self::Signal(number) => 128 + number,
        }
    }

    pub(crate) const fn of(code: ErrorCode) -> Self {
        match code {
            ErrorCode::Invalid => Self::Usage,
            ErrorCode::Unauthenticated | ErrorCode::Forbidden => Self::NotPermitted,
            ErrorCode::NotFound => Self::NotFound,
            ErrorCode::AlreadyExists
            | ErrorCode::Conflict
            | ErrorCode::InUse
            | ErrorCode::RevisionMismatch
            | ErrorCode::IdempotencyMismatch => Self::Conflict,
            ErrorCode::TimedOut => Self::TimedOut,
            ErrorCode::RevisionTooOld
            | ErrorCode::TooLarge
            | ErrorCode::NoCapacity
            | ErrorCode::NoSpace
            | ErrorCode::NodeUnavailable
            | ErrorCode::Unavailable
            | ErrorCode::Internal => Self::Failed,
        }
    }
}

/// What failed, why, and what to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CliError {
    exit: Exit,
    /// Empty when it was reported already, or when there is nothing to say.
    what: String,
    why: Vec<String>,
    hint: Option<String>,
}

impl CliError {
    pub(crate) fn new(exit: Exit, what: impl Into<String>) -> Self {
        Self { exit, what: what.into(), why: Vec::new(), hint: None }
    }

    pub(crate) fn failed(what: impl Into<String>) -> Self {
        Self::new(Exit::Failed, what)
    }

    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self::new(Exit::Usage, what)
    }

    /// Ends with this code and says nothing.
    pub(crate) fn quiet(exit: Exit) -> Self {
        Self::new(exit, "")
    }

    #[must_use]
    pub(crate) fn why(mut self, why: impl Into<String>) -> Self {
        self.why.push(why.into());
        self
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Puts `what` in front: what was tried when this happened.
    #[must_use]
    pub(crate) fn doing(mut self, what: impl Into<String>) -> Self {
        if !self.what.is_empty() {
            let why = std::mem::replace(&mut self.what, what.into());
            self.why.insert(0, why);
        }
        self
    }

    /// A fault in a status: the system tried and failed.
    pub(crate) fn fault(what: impl Into<String>, fault: Option<&Fault>) -> Self {
        let error = Self::failed(what);
        match fault {
            Some(fault) => error.why(format!("{} ({})", fault.message, fault.code)),
            None => error,
        }
    }

    pub(crate) const fn exit(&self) -> Exit {
        self.exit
    }

    pub(crate) const fn exit_code(&self) -> u8 {
        self.exit.code()
    }

    /// The lines for standard error.
    pub(crate) fn text(&self) -> String {
        if self.what.is_empty() {
            return String::new();
        }
        let mut text = format!("error: {}\n", clean(&self.what));
        for why in &self.why {
            text.push_str(&format!("  why: {}\n", clean(why)));
        }
        if let Some(hint) = &self.hint {
            text.push_str(&format!("  hint: {}\n", clean(hint)));
        }
        text
    }

    pub(crate) fn report(&self) {
        super::output::note_raw(&self.text());
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let hint = error.hint();
        let exit = match &error {
            ClientError::Api(problem) => Exit::of(problem.code),
            ClientError::Timeout { .. } => Exit::TimedOut,
            ClientError::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Exit::NotPermitted
            }
            ClientError::Connect { .. }
            | ClientError::Tls { .. }
            | ClientError::Broken { .. }
            | ClientError::Protocol(_) => Exit::Failed,
        };
        let what = match &error {
            ClientError::Api(problem) => match &problem.field {
                Some(field) => format!("{field}: {}", problem.detail),
                None => problem.detail.clone(),
            },
            other => other.to_string(),
        };
        let mut cli = Self::new(exit, what);
        let mut source = std::error::Error::source(&error);
        while let Some(inner) = source {
            let text = inner.to_string();
            // Wrappers often repeat what they wrap.
            if cli.why.last().is_none_or(|last| !last.contains(&text)) {
                cli.why.push(text);
            }
            source = inner.source();
        }
        if let ClientError::Api(problem) = &error
            && problem.code == ErrorCode::Internal
            && let Some(id) = &problem.request_id
        {
            cli.why.push(format!("request {id} in the server's log"));
        }
        cli.hint = hint.or_else(|| own_hint(&error).map(str::to_owned));
        cli
    }
}

/// Where the server gave no hint.
fn own_hint(error: &ClientError) -> Option<&'static str> {
    Some(match error.code()? {
        ErrorCode::Unauthenticated => {
            "give a token with OSTLER_TOKEN or --token; make one on the server: ostler token create NAME"
        }
        ErrorCode::Forbidden => "ask an administrator, or use another token",
        ErrorCode::NotFound => "see what there is with: ostler vm list, ostler image list",
        ErrorCode::AlreadyExists => "choose another name, or delete the other one first",
        ErrorCode::Conflict | ErrorCode::RevisionMismatch => "look at its present state, then try again",
        ErrorCode::InUse => "delete what uses it first",
        ErrorCode::TimedOut => "the work goes on: ostler operation list",
        ErrorCode::NoCapacity | ErrorCode::NodeUnavailable => "see the nodes with: ostler node list",
        ErrorCode::NoSpace => "free space on the server's disk",
        ErrorCode::Unavailable => "try again in a moment",
        ErrorCode::Internal => "see the server's log",
        ErrorCode::Invalid
        | ErrorCode::RevisionTooOld
        | ErrorCode::IdempotencyMismatch
        | ErrorCode::TooLarge => return None,
    })
}

/// Says what was tried.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<CliError>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| error.into().doing(what()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ostler_api::ApiError;

    #[test]
    fn every_code_has_its_exit() {
        for (code, exit) in [
            (ErrorCode::Invalid, 2),
            (ErrorCode::Unauthenticated, 6),
            (ErrorCode::Forbidden, 6),
            (ErrorCode::NotFound, 3),
            (ErrorCode::AlreadyExists, 4),
            (ErrorCode::Conflict, 4),
            (ErrorCode::InUse, 4),
            (ErrorCode::RevisionMismatch, 4),
            (ErrorCode::RevisionTooOld, 1),
            (ErrorCode::IdempotencyMismatch, 4),
            (ErrorCode::TooLarge, 1),
            (ErrorCode::TimedOut, 5),
            (ErrorCode::NoCapacity, 1),
            (ErrorCode::NoSpace, 1),
            (ErrorCode::NodeUnavailable, 1),
            (ErrorCode::Unavailable, 1),
            (ErrorCode::Internal, 1),
        ] {
            assert_eq!(Exit::of(code).code(), exit, "{code}");
        }
    }

    #[test]
    fn the_text_has_what_why_and_hint() {
        let problem =
            ApiError::invalid("cpus", "0 is not between 1 and 255").hint("give --cpus 1").problem(None);
        let error = CliError::from(ClientError::Api(Box::new(problem))).doing("cannot create VM web");
        assert_eq!(
            error.text(),
            "error: cannot create VM web\n  why: cpus: 0 is not between 1 and 255\n  hint: give --cpus 1\n"
        );
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn a_server_s_text_cannot_touch_the_terminal() {
        let problem = ApiError::conflict("\u{1b}]0;owned\u{7}").problem(None);
        assert!(!CliError::from(ClientError::Api(Box::new(problem))).text().contains('\u{1b}'));
    }

    #[test]
    fn no_connection_names_the_cause_and_the_way_out() {
        let source = io::Error::from(io::ErrorKind::ConnectionRefused);
        let error = CliError::from(ClientError::Connect { target: "unix:///x".to_owned(), source });
        assert!(
            error.text().contains("unix:///x") && error.text().contains("ostler serve"),
            "{}",
            error.text()
        );
        assert_eq!(error.exit_code(), 1);
        let source = io::Error::from(io::ErrorKind::PermissionDenied);
        let error = CliError::from(ClientError::Connect { target: "unix:///x".to_owned(), source });
        assert_eq!(error.exit_code(), 6);
    }
}
