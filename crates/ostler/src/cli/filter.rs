//! Filters of lists, and the one way in which all lists are fetched and followed.

use clap::Args;
use ostler_api::Time;
use ostler_api::list::{ListParams, WatchLine};

use super::error::Result;
use super::follow::follow;
use super::output::{Format, Show, json_line, write};
use super::session::Session;
use super::table::Table;

#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ListArgs {
    /// Only the one with this name
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,

    /// Only those with these labels: k=v, k!=v, k (is there) or !k; several must all hold
    #[arg(short, long, value_name = "SELECTOR")]
    pub(crate) label: Vec<String>,

    /// Go on and show every change, until it is interrupted
    #[arg(long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ScopeArgs {
    /// Of all projects that one may see
    #[arg(short = 'A', long, conflicts_with = "project")]
    pub(crate) all_projects: bool,
}

impl ListArgs {
    pub(crate) fn params(&self) -> ListParams {
        let label = (!self.label.is_empty()).then(|| self.label.join(","));
        ListParams { name: self.name.clone(), label, ..ListParams::default() }
    }
}

impl ScopeArgs {
    pub(crate) fn project(&self) -> Option<String> {
        self.all_projects.then(|| "*".to_owned())
    }
}

/// Several words as the API takes them; none when there are none.
pub(crate) fn words(words: &[impl ToString]) -> Option<String> {
    (!words.is_empty()).then(|| words.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
}

/// Fetches every page and writes it; with `watch` writes each change after that.
pub(crate) async fn list<T: Show>(session: &Session, params: &ListParams, watch: bool) -> Result<()> {
    let (items, revision) = session.client.list_all::<T>(params).await?;
    if !watch {
        return session.out.list(&items);
    }
    let mut rows = Rows::<T>::new(session);
    rows.begin(&items)?;
    follow::<T>(&session.client, params, Some(revision + 1), |line| rows.line(line)).await
}

/// A list that grows: people see rows, programs one JSON object on a line.
struct Rows<'a, T> {
    session: &'a Session,
    table: Table,
    kind: std::marker::PhantomData<T>,
}

impl<'a, T: Show> Rows<'a, T> {
    fn new(session: &'a Session) -> Self {
        let table = Table::new(T::COLUMNS, session.out.is_wide());
        Self { session, table, kind: std::marker::PhantomData }
    }

    fn begin(&mut self, items: &[T]) -> Result<()> {
        if self.session.out.is_human() {
            let now = Time::now();
            let rows: Vec<_> = items.iter().map(|item| item.cells(now)).collect();
            return write(&self.table.whole(&rows));
        }
        items.iter().try_for_each(|item| self.line(&WatchLine::Added { object: item.clone() }))
    }

    fn line(&mut self, line: &WatchLine<T>) -> Result<()> {
        let (object, gone) = match line {
            WatchLine::Added { object } | WatchLine::Modified { object } => (object, false),
            WatchLine::Deleted { object } => (object, true),
            WatchLine::Synced { .. } | WatchLine::Bookmark { .. } | WatchLine::Error { .. } => return Ok(()),
        };
        match self.session.out.format {
            Format::Table | Format::Wide if gone => {
                write(&format!("{} {} deleted\n", T::KIND, object.metadata().name))
            }
            Format::Table | Format::Wide => write(&self.table.row(&object.cells(Time::now()))),
            Format::Json | Format::Yaml => json_line(line),
            Format::Name => write(&format!("{}\n", object.metadata().name)),
        }
    }
}
