//! `ostler operation`: what takes long.

use clap::Subcommand;
use ostler_api::list::ListParams;
use ostler_api::operation::{Operation, OperationPhase, Progress};
use ostler_api::{Fault, Time};

use super::age::{age, moment_and_age};
use super::args::{WaitArgs, words};
use super::conclude::{follow, succeeded};
use super::error::{Doing, Result};
use super::filter::{self, ListArgs, ScopeArgs};
use super::output::Show;
use super::session::Session;
use super::table::{Column, Fields, col, wide};

#[derive(Debug, Subcommand)]
pub(crate) enum OperationCommand {
    /// List operations
    List(OperationListArgs),
    /// Show an operation; with --wait follow it to its end, which decides the exit code
    Show {
        /// Id
        operation: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Ask an operation to end; what it did so far is undone where that is possible
    Cancel {
        /// Id
        operation: String,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct OperationListArgs {
    #[command(flatten)]
    list: ListArgs,
    /// Only those in these phases
    #[arg(long, value_delimiter = ',', value_parser = words!(OperationPhase), value_name = "PHASE")]
    phase: Vec<OperationPhase>,
    #[command(flatten)]
    scope: ScopeArgs,
}

pub(crate) async fn run(session: &Session, command: OperationCommand) -> Result<()> {
    match command {
        OperationCommand::List(args) => {
            let params = ListParams {
                project: args.scope.project(),
                phase: filter::words(&args.phase),
                ..args.list.params()
            };
            filter::list::<Operation>(session, &params, args.list.watch).await
        }
        OperationCommand::Show { operation, wait } => {
            let doing = || format!("cannot show operation {operation}");
            let mut found = session.client.operation_get(&operation).await.doing(doing)?;
            if wait.wait {
                found = follow(session, &found.spec.action, &operation, wait.timeout).await.doing(doing)?;
            }
            session.out.one(&found)?;
            if wait.wait { succeeded(&found) } else { Ok(()) }
        }
        OperationCommand::Cancel { operation } => {
            let doing = || format!("cannot cancel operation {operation}");
            let asked = session.client.operation_cancel(&operation).await.doing(doing)?;
            session
                .out
                .say(&format!("operation {operation} is asked to end; it is {}", asked.status.phase))?;
            session.out.changed(&[asked], true)
        }
    }
}

/// `converting, 40%`.
fn progress_text(progress: &Progress) -> String {
    match progress.total.filter(|total| *total > 0) {
        Some(total) => {
            let percent = u128::from(progress.done.min(total)) * 100 / u128::from(total);
            format!("{}, {percent}%", progress.stage)
        }
        None => progress.stage.clone(),
    }
}

impl Show for Operation {
    const COLUMNS: &'static [Column] = &[
        col("ID"),
        col("ACTION"),
        col("TARGET"),
        col("PHASE"),
        col("PROGRESS"),
        wide("PROJECT"),
        col("AGE"),
        wide("REASON"),
    ];

    fn cells(&self, now: Time) -> Vec<String> {
        vec![
            self.metadata.id.to_string(),
            self.spec.action.clone(),
            format!("{}/{}", self.spec.target.kind, self.spec.target.name),
            self.status.phase.to_string(),
            self.status.progress.as_ref().map(progress_text).unwrap_or_default(),
            self.metadata.project.as_ref().map(ToString::to_string).unwrap_or_default(),
            age(self.metadata.created, now),
            self.status.reason.as_ref().map(|reason| reason.message.clone()).unwrap_or_default(),
        ]
    }

    fn fields(&self, now: Time) -> Fields {
        let mut fields = Fields::default();
        let target = &self.spec.target;
        fields
            .field("Id", self.metadata.id.to_string())
            .field("Action", self.spec.action.clone())
            .field("Target", format!("{} {} ({})", target.kind, target.name, target.id))
            .maybe("Project", self.metadata.project.as_ref())
            .field("Phase", self.status.phase.to_string())
            .maybe("Progress", self.status.progress.as_ref().map(progress_text))
            .maybe(
                "Reason",
                self.status.reason.as_ref().map(|reason| format!("{} ({})", reason.message, reason.code)),
            )
            .field("Begun", moment_and_age(self.metadata.created, now))
            .maybe("Finished", self.status.finished.map(|at| moment_and_age(at, now)));
        if self.spec.cancel && !self.status.phase.is_final() {
            fields.field("Cancel", "asked for");
        }
        fields
    }

    fn fault(&self) -> Option<&Fault> {
        self.status.reason.as_ref()
    }

    fn settled(&self) -> bool {
        self.status.phase.is_final()
    }
}
