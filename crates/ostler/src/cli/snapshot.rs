//! `ostler snapshot`: what disks held at one instant, and the way back to it.

use clap::Subcommand;
use ostler_api::list::ListParams;
use ostler_api::snapshot::{Snapshot, SnapshotCreate, SnapshotPatch, SnapshotPhase};
use ostler_api::{Fault, Name, Time};
use ostler_client::Delete;

use super::age::{age, moment_and_age};
use super::args::{WaitArgs, labels, pair, words};
use super::conclude::{Deed, Ends, conclude, each};
use super::error::{Doing, Result};
use super::filter::{self, ListArgs, ScopeArgs};
use super::output::Show;
use super::session::Session;
use super::table::{Column, Fields, col, wide};
use super::vm::label_text;

const EXAMPLES: &str = "\
Examples:
  ostler snapshot create before-upgrade --vm web --wait
  ostler snapshot revert before-upgrade --wait        the VM has to be stopped
  ostler vm create copy --snapshot before-upgrade     a linked copy of all its disks";

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Take a snapshot of a VM's disks, or of a volume
    #[command(after_help = EXAMPLES)]
    Create(CreateArgs),
    /// List snapshots
    List(SnapshotListArgs),
    /// Show a snapshot
    Show {
        /// Name or id
        snapshot: String,
    },
    /// Change a snapshot's name, labels or description
    Set(SetArgs),
    /// Put disks back to what they held when the snapshot was taken
    Revert {
        /// Name or id
        snapshot: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Delete snapshots, anywhere in the tree
    Delete {
        /// Names or ids
        #[arg(required = true, value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
        /// Also those that have linked copies, which stay whole
        #[arg(short, long)]
        force: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

#[derive(Debug, clap::Args)]
#[group(id = "what", required = true, multiple = false, args = ["vm", "volume"])]
pub(crate) struct CreateArgs {
    /// Name of the new snapshot: a-z, 0-9 and '-'
    name: Name,
    /// All disks of this VM, at one instant
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
    /// This volume
    #[arg(long, value_name = "VOLUME")]
    volume: Option<String>,
    /// What it is for
    #[arg(short, long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    description: String,
    /// Label of the snapshot
    #[arg(short, long, value_parser = pair, value_name = "KEY=VALUE")]
    label: Vec<(String, String)>,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, clap::Args)]
#[group(id = "changes", required = true, multiple = true, args = ["new_name", "description", "label", "no_labels"])]
pub(crate) struct SetArgs {
    /// Name or id
    snapshot: String,
    /// The new name
    #[arg(long = "name", value_name = "NAME")]
    new_name: Option<Name>,
    /// What it is for
    #[arg(short, long, value_name = "TEXT")]
    description: Option<String>,
    /// Label; those given take the place of all there are
    #[arg(short, long, value_parser = pair, value_name = "KEY=VALUE")]
    label: Vec<(String, String)>,
    /// Take all labels away
    #[arg(long, conflicts_with = "label")]
    no_labels: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SnapshotListArgs {
    #[command(flatten)]
    list: ListArgs,
    /// Only those in these phases
    #[arg(long, value_delimiter = ',', value_parser = words!(SnapshotPhase), value_name = "PHASE")]
    phase: Vec<SnapshotPhase>,
    /// Only those on this node
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    #[command(flatten)]
    scope: ScopeArgs,
}

pub(crate) async fn run(session: &Session, command: SnapshotCommand) -> Result<()> {
    let client = &session.client;
    match command {
        SnapshotCommand::Create(args) => {
            let create = SnapshotCreate {
                name: args.name,
                labels: labels(args.label),
                vm: args.vm,
                volume: args.volume,
                description: args.description,
            };
            take(session, &create, &args.wait).await.map(drop)
        }
        SnapshotCommand::List(args) => {
            let params = ListParams {
                project: args.scope.project(),
                phase: filter::words(&args.phase),
                node: args.node,
                ..args.list.params()
            };
            filter::list::<Snapshot>(session, &params, args.list.watch).await
        }
        SnapshotCommand::Show { snapshot } => {
            let found =
                client.snapshot_get(&snapshot).await.doing(|| format!("cannot show snapshot {snapshot}"))?;
            session.out.one(&found)
        }
        SnapshotCommand::Set(args) => set(session, args).await,
        SnapshotCommand::Revert { snapshot, wait } => {
            let deed = Deed::new("revert to", "snapshot", &snapshot, Ends::Settled);
            let begun = client.snapshot_revert(&snapshot).await.doing(|| deed.failure.clone())?;
            let end = conclude(session, &deed, begun, &wait).await?;
            session.out.changed(&[end], true)
        }
        SnapshotCommand::Delete { snapshots, force, wait } => {
            let how = Delete { force, ..Delete::default() };
            let deed = |snapshot: &str| Deed::new("delete", "snapshot", snapshot, Ends::Gone);
            each(session, &snapshots, &wait, deed, async |snapshot| {
                Ok(client.snapshot_delete(snapshot, &how).await?)
            })
            .await
        }
    }
}

/// Takes a snapshot and says so.
async fn take(session: &Session, create: &SnapshotCreate, wait: &WaitArgs) -> Result<Snapshot> {
    let deed = Deed::new("create", "snapshot", create.name.as_str(), Ends::Settled);
    let begun = session.client.snapshot_create(create, None).await.doing(|| deed.failure.clone())?;
    let snapshot = conclude(session, &deed, begun, wait).await?;
    session.out.changed(std::slice::from_ref(&snapshot), true)?;
    Ok(snapshot)
}

async fn set(session: &Session, args: SetArgs) -> Result<()> {
    let new_labels = (args.no_labels || !args.label.is_empty()).then(|| labels(args.label));
    let patch = SnapshotPatch { name: args.new_name, labels: new_labels, description: args.description };
    let name = &args.snapshot;
    let changed = session
        .client
        .snapshot_patch(name, &patch, None)
        .await
        .doing(|| format!("cannot change snapshot {name}"))?;
    session.out.say(&format!("snapshot {} is changed", changed.metadata.name))?;
    session.out.changed(&[changed], true)
}

impl Show for Snapshot {
    const COLUMNS: &'static [Column] = &[
        col("NAME"),
        col("PHASE"),
        col("DISKS"),
        col("NODE"),
        col("TAKEN"),
        wide("PARENT"),
        wide("VM"),
        wide("PROJECT"),
        wide("ID"),
        col("DESCRIPTION"),
        wide("REASON"),
    ];

    fn cells(&self, now: Time) -> Vec<String> {
        let text = |value: Option<String>| value.unwrap_or_default();
        let disks: Vec<&str> = self.spec.disks.iter().map(|disk| disk.name.as_str()).collect();
        vec![
            self.metadata.name.to_string(),
            self.status.phase.to_string(),
            disks.join(","),
            text(self.status.node.as_ref().map(ToString::to_string)),
            text(self.status.taken.map(|taken| age(taken, now))),
            text(self.status.parent.map(|parent| parent.to_string())),
            text(self.spec.vm.map(|vm| vm.to_string())),
            text(self.metadata.project.as_ref().map(ToString::to_string)),
            self.metadata.id.to_string(),
            self.spec.description.lines().next().unwrap_or_default().to_owned(),
            text(self.status.reason.as_ref().map(|reason| reason.message.clone())),
        ]
    }

    fn fields(&self, now: Time) -> Fields {
        let mut fields = Fields::default();
        fields
            .field("Name", self.metadata.name.to_string())
            .field("Id", self.metadata.id.to_string())
            .maybe("Project", self.metadata.project.as_ref())
            .maybe("Description", (!self.spec.description.is_empty()).then_some(&self.spec.description))
            .maybe("Labels", label_text(&self.metadata.labels))
            .field("Phase", self.status.phase.to_string())
            .maybe(
                "Reason",
                self.status.reason.as_ref().map(|reason| format!("{} ({})", reason.message, reason.code)),
            )
            .maybe("Taken", self.status.taken.map(|taken| moment_and_age(taken, now)))
            .maybe("Parent", self.status.parent)
            .maybe("VM", self.spec.vm)
            .maybe("Node", self.status.node.as_ref());
        for disk in &self.spec.disks {
            fields.field("Disk", format!("{}, volume {}", disk.size, disk.name));
        }
        fields
    }

    fn fault(&self) -> Option<&Fault> {
        self.status.reason.as_ref()
    }

    fn settled(&self) -> bool {
        match self.status.phase {
            SnapshotPhase::Ready | SnapshotPhase::Error => true,
            SnapshotPhase::Creating | SnapshotPhase::Reverting | SnapshotPhase::Deleting => false,
        }
    }
}
