//! `ostler volume`: the disks of VMs.

use clap::Subcommand;
use ostler_api::list::ListParams;
use ostler_api::volume::{Volume, VolumePhase};
use ostler_api::{Fault, Time};
use ostler_client::Delete;

use super::age::{age, moment_and_age};
use super::args::{WaitArgs, words};
use super::conclude::{Deed, Ends, each};
use super::error::{Doing, Result};
use super::filter::{self, ListArgs, ScopeArgs};
use super::output::Show;
use super::session::Session;
use super::table::{Column, Fields, col, wide};
use super::vm::label_text;

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// List volumes
    List(VolumeListArgs),
    /// Show a volume
    Show {
        /// Name or id
        volume: String,
    },
    /// Delete volumes that no VM has
    Delete {
        /// Names or ids
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct VolumeListArgs {
    #[command(flatten)]
    list: ListArgs,
    /// Only those in these phases
    #[arg(long, value_delimiter = ',', value_parser = words!(VolumePhase), value_name = "PHASE")]
    phase: Vec<VolumePhase>,
    /// Only those on this node
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    #[command(flatten)]
    scope: ScopeArgs,
}

pub(crate) async fn run(session: &Session, command: VolumeCommand) -> Result<()> {
    match command {
        VolumeCommand::List(args) => {
            let params = ListParams {
                project: args.scope.project(),
                phase: filter::words(&args.phase),
                node: args.node,
                ..args.list.params()
            };
            filter::list::<Volume>(session, &params, args.list.watch).await
        }
        VolumeCommand::Show { volume } => {
            let found =
                session.client.volume_get(&volume).await.doing(|| format!("cannot show volume {volume}"))?;
            session.out.one(&found)
        }
        VolumeCommand::Delete { volumes, wait } => {
            let deed = |volume: &str| Deed::new("delete", "volume", volume, Ends::Gone);
            each(session, &volumes, &wait, deed, async |volume| {
                Ok(session.client.volume_delete(volume, &Delete::default()).await?)
            })
            .await
        }
    }
}

impl Show for Volume {
    const COLUMNS: &'static [Column] = &[
        col("NAME"),
        col("PHASE"),
        col("NODE"),
        col("SIZE"),
        col("USED"),
        wide("VM"),
        wide("PROJECT"),
        wide("ID"),
        col("AGE"),
        wide("REASON"),
    ];

    fn cells(&self, now: Time) -> Vec<String> {
        let text = |value: Option<String>| value.unwrap_or_default();
        vec![
            self.metadata.name.to_string(),
            self.status.phase.to_string(),
            text(self.status.node.as_ref().map(ToString::to_string)),
            self.spec.size.to_string(),
            text(self.status.used.map(|used| used.to_string())),
            text(self.spec.vm.map(|vm| vm.to_string())),
            text(self.metadata.project.as_ref().map(ToString::to_string)),
            self.metadata.id.to_string(),
            age(self.metadata.created, now),
            text(self.status.reason.as_ref().map(|reason| reason.message.clone())),
        ]
    }

    fn fields(&self, now: Time) -> Fields {
        let mut fields = Fields::default();
        fields
            .field("Name", self.metadata.name.to_string())
            .field("Id", self.metadata.id.to_string())
            .maybe("Project", self.metadata.project.as_ref())
            .field("Created", moment_and_age(self.metadata.created, now))
            .maybe("Labels", label_text(&self.metadata.labels))
            .field("Phase", self.status.phase.to_string())
            .maybe(
                "Reason",
                self.status.reason.as_ref().map(|reason| format!("{} ({})", reason.message, reason.code)),
            )
            .field("Size", self.spec.size.to_string())
            .maybe("Used", self.status.used)
            .maybe("Node", self.status.node.as_ref())
            .maybe("Image", self.spec.image.as_ref().map(|image| image.image))
            .maybe("VM", self.spec.vm);
        fields
    }

    fn fault(&self) -> Option<&Fault> {
        self.status.reason.as_ref()
    }

    fn settled(&self) -> bool {
        match self.status.phase {
            VolumePhase::Ready | VolumePhase::Error => true,
            VolumePhase::Pending | VolumePhase::Creating | VolumePhase::Deleting => false,
        }
    }
}
