//! How a command that begins something ends: says what was begun, or follows it to its end.

use std::time::{Duration, Instant};

use ostler_api::operation::{Accepted, Operation, OperationPhase};

use super::args::WaitArgs;
use super::error::{CliError, Doing, Result};
use super::output::Show;
use super::progress::Progress;
use super::session::Session;

/// What a command does to one thing, in words.
#[derive(Debug, Clone)]
pub(crate) struct Deed {
    /// `cannot start vm web`
    pub(crate) failure: String,
    /// `start of vm web`
    pub(crate) title: String,
    pub(crate) ends: Ends,
}

/// What is there afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ends {
    Settled,
    Gone,
}

impl Deed {
    pub(crate) fn new(verb: &str, noun: &str, name: &str, ends: Ends) -> Self {
        Self { failure: format!("cannot {verb} {noun} {name}"), title: format!("{verb} {noun} {name}"), ends }
    }
}

/// Waits when that was asked for and says how it went. The thing as it is then, or as it was last when it is gone.
pub(crate) async fn conclude<T: Show>(
    session: &Session,
    deed: &Deed,
    accepted: Accepted<T>,
    wait: &WaitArgs,
) -> Result<T> {
    let (operation, resource) = (accepted.operation, accepted.resource);
    let name = format!("{} {}", T::KIND, resource.metadata().name);
    if !wait.wait {
        match (&operation, T::IN_PROJECT) {
            (Some(operation), _) => {
                session.out.say(&format!("{}: begun (operation {})", deed.title, operation.metadata.id))?
            }
            (None, _) if deed.ends == Ends::Gone => session.out.say(&format!("{name} deleted"))?,
            (None, _) => session.out.say(&format!("{name} is {} already", resource.phase()))?,
        }
        return Ok(resource);
    }
    let began = Instant::now();
    let end = finish(session, deed, operation.as_ref(), &resource, wait.timeout, began).await;
    let end = end.map_err(|error| late(error, operation.as_ref())).doing(|| deed.failure.clone())?;
    let took = super::age::span(began.elapsed());
    match &end {
        None => session.out.say(&format!("{name} deleted ({took})"))?,
        Some(now) => {
            let place = now.node().map_or_else(String::new, |node| format!(" on {node}"));
            session.out.say(&format!("{name} is {}{place} ({took})", now.phase()))?;
        }
    }
    Ok(end.unwrap_or(resource))
}

/// A wait that ended too early says that the work did not.
fn late(error: CliError, operation: Option<&Operation>) -> CliError {
    match (error.exit(), operation) {
        (super::error::Exit::TimedOut, Some(operation)) => error.hint(format!(
            "the work goes on; follow it with: ostler operation show {} --wait",
            operation.metadata.id
        )),
        _ => error,
    }
}

async fn finish<T: Show>(
    session: &Session,
    deed: &Deed,
    operation: Option<&Operation>,
    resource: &T,
    timeout: Duration,
    began: Instant,
) -> Result<Option<T>> {
    let client = &session.client;
    if let Some(operation) = operation {
        match follow(session, &deed.title, &operation.metadata.id.to_string(), timeout).await {
            Ok(end) => succeeded(&end)?,
            // It may be gone together with what it was about.
            Err(error) if deed.ends == Ends::Gone && error.exit() == super::error::Exit::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let id = resource.metadata().id.to_string();
    let left = timeout.saturating_sub(began.elapsed()).max(Duration::from_secs(1));
    let end = client
        .wait_until(&id, left, |now: Option<&T>| match (now, deed.ends) {
            (None, Ends::Gone) => Some(None),
            (Some(_), Ends::Gone) | (None, Ends::Settled) => None,
            (Some(now), Ends::Settled) => now.settled().then(|| Some(now.clone())),
        })
        .await?;
    match end {
        Some(now) if now.in_error() => Err(CliError::fault(format!("{} is in error", T::KIND), now.fault())
            .hint(format!("see more with: ostler {} show {}", T::KIND, now.metadata().name))),
        end => Ok(end),
    }
}

/// Follows an operation with progress on the terminal.
pub(crate) async fn follow(session: &Session, title: &str, id: &str, timeout: Duration) -> Result<Operation> {
    let mut progress = Progress::new(title);
    let end = session
        .client
        .operation_wait(id, timeout, |operation| {
            if let Some(step) = &operation.status.progress {
                progress.step(step);
            }
        })
        .await?;
    Ok(end)
}

/// An operation that ended otherwise is an error.
pub(crate) fn succeeded(operation: &Operation) -> Result<()> {
    let what = |word: &str| format!("operation {} ({}) {word}", operation.metadata.id, operation.spec.action);
    let target = &operation.spec.target;
    match operation.status.phase {
        OperationPhase::Succeeded => Ok(()),
        OperationPhase::Failed => Err(CliError::fault(what("failed"), operation.status.reason.as_ref())
            .hint(format!(
                "see what happened with: ostler {} show {}, ostler events",
                target.kind, target.name
            ))),
        OperationPhase::Cancelled => {
            Err(CliError::fault(what("was cancelled"), operation.status.reason.as_ref()))
        }
        OperationPhase::Pending | OperationPhase::Running => Err(CliError::failed(what("is not done"))),
    }
}

/// Does the same to several things: begins all, then concludes each. One that fails does not keep the others.
pub(crate) async fn each<T: Show>(
    session: &Session,
    names: &[String],
    wait: &WaitArgs,
    deed: impl Fn(&str) -> Deed,
    begin: impl AsyncFn(&str) -> Result<Accepted<T>>,
) -> Result<()> {
    let mut failed: Option<CliError> = None;
    let mut fail = |error: CliError| {
        error.report();
        if failed.is_none() {
            failed = Some(CliError::quiet(error.exit()));
        }
    };
    let mut begun = Vec::new();
    for name in names {
        let deed = deed(name);
        match begin(name).await.doing(|| deed.failure.clone()) {
            Ok(accepted) => begun.push((deed, accepted)),
            Err(error) => fail(error),
        }
    }
    let mut ends = Vec::new();
    for (deed, accepted) in begun {
        match conclude(session, &deed, accepted, wait).await {
            Ok(end) => ends.push(end),
            Err(error) if error.exit() == super::error::Exit::Done => return Err(error),
            Err(error) => fail(error),
        }
    }
    if !ends.is_empty() {
        session.out.changed(&ends, names.len() == 1)?;
    }
    failed.map_or(Ok(()), Err)
}
