//! A watch that outlives its connections.

use std::time::{Duration, Instant};

use ostler_api::list::{ListParams, WatchLine};
use ostler_api::{ErrorCode, Resource};
use ostler_client::{Client, ClientError};
use uuid::Uuid;

use super::error::{CliError, Result};
use super::output::note;

/// Without a server for this long it ends.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(500);

/// Calls `take` for each line from revision `from` on (from the present state when not given) until it fails. A
/// connection that breaks is made anew where it ended.
pub(crate) async fn follow<T: Resource>(
    client: &Client,
    params: &ListParams,
    from: Option<u64>,
    mut take: impl FnMut(&WatchLine<T>) -> Result<()>,
) -> Result<()> {
    let mut place = Place { next: from, ..Place::default() };
    let mut lost: Option<Instant> = None;
    let mut ever = false;
    loop {
        let mut connected = false;
        let end = watch(client, params, &mut place, &mut connected, &mut take).await;
        if connected {
            lost = None;
            ever = true;
        }
        match end {
            Ok(()) => {}
            Err(Broken::Taker(error)) => return Err(error),
            Err(Broken::Watch(error))
                if error.code() == Some(ErrorCode::RevisionTooOld) && place.next.is_some() =>
            {
                note("some changes were missed; the present state follows");
                place = Place::default();
            }
            Err(Broken::Watch(error)) if !ever || !error.is_passing() => return Err(error.into()),
            Err(Broken::Watch(error)) => {
                if lost.is_none() {
                    note("the connection broke; trying again");
                }
                if lost.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                    return Err(error.into());
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// How far the watch has come. Several changes may share a revision, so the last one is asked for again and what
/// was seen of it is left out.
#[derive(Debug, Default)]
struct Place {
    next: Option<u64>,
    seen: Vec<Uuid>,
}

impl Place {
    /// Everything up to `revision` has come.
    fn passed(&mut self, revision: u64) {
        self.next = Some(self.next.unwrap_or(0).max(revision + 1));
        self.seen.clear();
    }

    /// Whether a change is new.
    fn is_new(&mut self, revision: u64, id: Uuid) -> bool {
        match self.next {
            // The present state still comes, in no order of revisions.
            None => true,
            Some(next) if revision < next => false,
            Some(next) => {
                if revision > next {
                    self.next = Some(revision);
                    self.seen.clear();
                }
                let new = !self.seen.contains(&id);
                self.seen.push(id);
                new
            }
        }
    }
}

enum Broken {
    Taker(CliError),
    Watch(ClientError),
}

async fn watch<T: Resource>(
    client: &Client,
    params: &ListParams,
    place: &mut Place,
    connected: &mut bool,
    take: &mut impl FnMut(&WatchLine<T>) -> Result<()>,
) -> Result<(), Broken> {
    let params = ListParams { from: place.next, limit: None, ..params.clone() };
    let mut lines = client.watch::<T>(&params).await.map_err(Broken::Watch)?;
    *connected = true;
    while let Some(line) = lines.next().await.map_err(Broken::Watch)? {
        let new = match &line {
            WatchLine::Added { object } | WatchLine::Modified { object } => {
                place.is_new(object.metadata().revision, object.metadata().id)
            }
            // It carries the revision of the last state, not that of its end.
            WatchLine::Deleted { .. } => true,
            WatchLine::Synced { revision } | WatchLine::Bookmark { revision } => {
                place.passed(*revision);
                true
            }
            WatchLine::Error { problem } => {
                return Err(Broken::Watch(ClientError::Api(Box::new(problem.clone()))));
            }
        };
        if new {
            take(&line).map_err(Broken::Taker)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_missed_or_shown_twice_across_a_break() {
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let mut place = Place::default();
        assert!(place.is_new(9, a) && place.is_new(3, b));
        place.passed(9);
        assert_eq!(place.next, Some(10));
        // Two changes in one revision with a break between them: it is asked for again.
        assert!(place.is_new(12, a));
        assert_eq!(place.next, Some(12));
        assert!(!place.is_new(12, a));
        assert!(place.is_new(12, b));
        assert!(place.is_new(13, a));
        assert!(!place.is_new(12, b));
    }
}
