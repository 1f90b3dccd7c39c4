//! `ostler events`: what happened.

use clap::Args;
use ostler_api::Time;
use ostler_api::event::Event;

use super::age::moment;
use super::error::Result;
use super::filter::{self, ListArgs, ScopeArgs};
use super::output::Show;
use super::session::Session;
use super::table::{Column, Fields, col, wide};

#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    #[command(flatten)]
    list: ListArgs,
    /// Go on and show events as they happen, until it is interrupted
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    scope: ScopeArgs,
}

pub(crate) async fn run(session: &Session, args: &EventsArgs) -> Result<()> {
    let mut params = args.list.params();
    params.project = args.scope.project();
    filter::list::<Event>(session, &params, args.follow || args.list.watch).await
}

impl Show for Event {
    const COLUMNS: &'static [Column] = &[
        col("TIME"),
        col("SEVERITY"),
        col("CODE"),
        col("TARGET"),
        wide("TARGET ID"),
        wide("PROJECT"),
        wide("ID"),
        col("MESSAGE"),
    ];

    fn cells(&self, _now: Time) -> Vec<String> {
        vec![
            moment(self.metadata.created),
            self.spec.severity.to_string(),
            self.spec.code.clone(),
            format!("{}/{}", self.spec.target.kind, self.spec.target.name),
            self.spec.target.id.to_string(),
            self.metadata.project.as_ref().map(ToString::to_string).unwrap_or_default(),
            self.metadata.id.to_string(),
            self.spec.message.clone(),
        ]
    }

    fn fields(&self, _now: Time) -> Fields {
        let mut fields = Fields::default();
        let target = &self.spec.target;
        fields
            .field("Id", self.metadata.id.to_string())
            .field("Time", moment(self.metadata.created))
            .field("Severity", self.spec.severity.to_string())
            .field("Code", self.spec.code.clone())
            .field("Target", format!("{} {} ({})", target.kind, target.name, target.id))
            .field("Message", self.spec.message.clone());
        fields
    }
}
