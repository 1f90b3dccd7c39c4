//! `ostler vm clone`: a snapshot, and a VM whose disks are linked copies of it.

use clap::Args;
use ostler_api::Name;
use ostler_api::snapshot::{Snapshot, SnapshotCreate};
use ostler_api::vm::{Vm, VmCreate, VmDisk};
use ostler_client::Wait;

use crate::cli::args::WaitArgs;
use crate::cli::conclude::{Deed, Ends, conclude, follow, succeeded};
use crate::cli::error::{CliError, Doing, Result};
use crate::cli::session::Session;

pub(super) const EXAMPLES: &str = "\
Examples:
  ostler vm clone web web-test --wait                    as it is now, also while it runs
  ostler vm clone web old-web --snapshot before-upgrade  as it was then

The copy has an identity of its own: another UUID, another MAC address. Its disks are linked: they stand on the snapshot,
which is kept for as long as they do.";

#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// Name or id of the VM to copy
    vm: String,
    /// Name of the new VM
    name: Name,
    /// Copy what this snapshot of it holds, and not what it holds now
    #[arg(long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Create it without starting it
    #[arg(long)]
    no_start: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

pub(super) async fn run(session: &Session, args: CloneArgs) -> Result<()> {
    let client = &session.client;
    let deed = Deed {
        failure: format!("cannot clone vm {}", args.vm),
        title: format!("clone vm {}", args.vm),
        ends: Ends::Settled,
    };
    let source = client.vm_get(&args.vm).await.doing(|| deed.failure.clone())?;
    let snapshot = match &args.snapshot {
        Some(name) => {
            let snapshot = client.snapshot_get(name).await.doing(|| deed.failure.clone())?;
            if snapshot.spec.vm.is_none_or(|of| of.0 != source.metadata.id) {
                return Err(CliError::failed(deed.failure.clone())
                    .why(format!("snapshot {name} is not of vm {}", source.metadata.name))
                    .hint("make a VM of any snapshot with: ostler vm create NAME --snapshot SNAPSHOT"));
            }
            snapshot
        }
        None => taken(session, &deed, &source, &args).await?,
    };
    let create = copy(&source, &snapshot, &args)?;
    let begun = client.vm_create(&create, None).await.doing(|| deed.failure.clone())?;
    let vm = conclude(session, &deed, begun, &args.wait).await?;
    session.out.changed(&[vm], true)
}

/// What the source holds now.
async fn taken(session: &Session, deed: &Deed, source: &Vm, args: &CloneArgs) -> Result<Snapshot> {
    let short: String = args.name.as_str().chars().take(58).collect();
    let name = Name::new(&format!("{}-base", short.trim_end_matches('-')))
        .map_err(|error| CliError::failed(deed.failure.clone()).why(error.to_string()))?;
    let create = SnapshotCreate {
        name,
        labels: Default::default(),
        vm: Some(source.metadata.id.to_string()),
        volume: None,
        description: format!("what vm {} was cloned from", args.name),
    };
    let begun = session.client.snapshot_create(&create, None).await.doing(|| deed.failure.clone())?;
    if let Some(operation) = &begun.operation {
        let id = operation.metadata.id.to_string();
        let end =
            follow(session, &deed.title, &id, args.wait.timeout).await.doing(|| deed.failure.clone())?;
        succeeded(&end).doing(|| deed.failure.clone())?;
    }
    let wait = Wait::phases(["ready", "error"], args.wait.timeout);
    let id = begun.resource.metadata.id.to_string();
    session.client.get_when::<Snapshot>(&id, &wait).await.doing(|| deed.failure.clone())
}

fn copy(source: &Vm, snapshot: &Snapshot, args: &CloneArgs) -> Result<VmCreate> {
    let spec = &source.spec;
    if spec.kernel.is_some() || spec.cdrom.is_some() {
        return Err(CliError::failed(format!("cannot clone vm {}", args.vm))
            .why("it boots a kernel image or has a CD-ROM, which a clone does not take along")
            .hint("make it by hand: ostler vm create NAME --snapshot SNAPSHOT --kernel IMAGE …"));
    }
    let mut create = VmCreate {
        labels: source.metadata.labels.clone(),
        cpus: spec.cpus,
        memory: spec.memory,
        snapshot: Some(snapshot.metadata.id.to_string()),
        machine: spec.machine,
        firmware: spec.firmware,
        accelerator: spec.accelerator,
        node_selector: spec.node_selector.clone(),
        start: !args.no_start,
        ..VmCreate::named(args.name.clone())
    };
    if let Some(VmDisk { bus, .. }) = spec.disks.first() {
        create.disk_bus = *bus;
    }
    if let Some(nic) = spec.nics.first() {
        // Not its published ports: the source has them.
        create.nic_model = nic.model;
    }
    Ok(create)
}
