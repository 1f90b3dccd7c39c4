//! `ostler volume`: the disks of VMs, and disks on their own.

pub(crate) mod behaviour;

use clap::Subcommand;
use ostler_api::disk::{DiskCache, DiskDiscard, DiskLimits};
use ostler_api::list::ListParams;
use ostler_api::vm::DiskBus;
use ostler_api::volume::{Volume, VolumeCreate, VolumePatch, VolumePhase};
use ostler_api::{ByteSize, Fault, Name, Time};
use ostler_client::Delete;

use super::age::{age, moment_and_age};
use super::args::{WaitArgs, labels, pair, words};
use super::conclude::{Deed, Ends, conclude, each};
use super::error::{CliError, Doing, Result};
use super::filter::{self, ListArgs, ScopeArgs};
use super::output::Show;
use super::session::Session;
use super::table::{Column, Fields, col, wide};
use super::vm::{label_text, size};
use behaviour::{LIMIT_ARGS, LimitArgs, OpenArgs, limits_text};

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume
    #[command(after_help = EXAMPLES)]
    Create(CreateArgs),
    /// List volumes
    List(VolumeListArgs),
    /// Show a volume
    Show {
        /// Name or id
        volume: String,
    },
    /// Change a volume's name, labels, protection, limits, cache
    Set(SetArgs),
    /// Make a volume larger, also while it is in use
    Resize {
        /// Name or id
        volume: String,
        /// The new size, such as 20G; with a '+' that much more
        #[arg(value_name = "[+]SIZE", allow_hyphen_values = true)]
        size: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Copy into volumes what they have from an image or a snapshot, so that they stand on their own; also while in use
    Flatten {
        /// Names or ids
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Attach a volume to a VM, also while it runs
    Attach {
        /// Name or id
        volume: String,
        /// Name or id of the VM
        vm: String,
        /// How it is attached; only virtio while the VM runs
        #[arg(long, value_parser = words!(DiskBus), default_value = "virtio", value_name = "BUS")]
        bus: DiskBus,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Detach a volume from its VM; unmount it in the guest first
    Detach {
        /// Name or id
        volume: String,
        #[command(flatten)]
        wait: WaitArgs,
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

const EXAMPLES: &str = "\
Examples:
  ostler volume create data --size 20G --wait
  ostler volume create copy --snapshot before-upgrade
  ostler volume attach data web --wait";

#[derive(Debug, clap::Args)]
pub(crate) struct CreateArgs {
    /// Name of the new volume: a-z, 0-9 and '-'
    name: Name,
    /// Size, such as 20G; that of the image or the snapshot when not given
    #[arg(long, value_parser = size, value_name = "SIZE")]
    size: Option<ByteSize>,
    /// Begin as a linked copy of this image
    #[arg(long, value_name = "IMAGE", conflicts_with = "snapshot")]
    image: Option<String>,
    /// Begin as a linked copy of this snapshot
    #[arg(long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,
    /// Which disk of the snapshot, by the name its volume had
    #[arg(long, value_name = "VOLUME", requires = "snapshot")]
    disk: Option<String>,
    /// Only this node
    #[arg(long, value_name = "NAME")]
    node: Option<Name>,
    /// Refuse to delete it until this is taken back
    #[arg(long)]
    protect: bool,
    #[command(flatten)]
    open: OpenArgs,
    /// Label of the volume
    #[arg(short, long, value_parser = pair, value_name = "KEY=VALUE")]
    label: Vec<(String, String)>,
    #[command(flatten)]
    wait: WaitArgs,
    #[command(flatten)]
    limits: LimitArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct SetArgs {
    /// Name or id
    volume: String,
    /// The new name
    #[arg(long = "name", value_name = "NAME")]
    new_name: Option<Name>,
    /// Label; those given take the place of all there are
    #[arg(short, long, value_parser = pair, value_name = "KEY=VALUE")]
    label: Vec<(String, String)>,
    /// Take all labels away
    #[arg(long, conflicts_with = "label")]
    no_labels: bool,
    /// Refuse to delete it
    #[arg(long)]
    protect: bool,
    /// Take that back
    #[arg(long, conflicts_with = "protect")]
    unprotect: bool,
    #[command(flatten)]
    open: OpenArgs,
    /// Take all limits away
    #[arg(long, conflicts_with_all = LIMIT_ARGS)]
    no_limits: bool,
    #[command(flatten)]
    limits: LimitArgs,
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
    let client = &session.client;
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
        VolumeCommand::Create(args) => create(session, args).await,
        VolumeCommand::Set(args) => set(session, args).await,
        VolumeCommand::Resize { volume, size, wait } => resize(session, &volume, &size, &wait).await,
        VolumeCommand::Flatten { volumes, wait } => {
            let deed = |volume: &str| Deed::new("flatten", "volume", volume, Ends::Settled);
            each(session, &volumes, &wait, deed, async |volume| Ok(client.volume_flatten(volume).await?))
                .await
        }
        VolumeCommand::Attach { volume, vm, bus, wait } => {
            let deed = Deed {
                failure: format!("cannot attach volume {volume} to vm {vm}"),
                title: format!("attach volume {volume} to vm {vm}"),
                ends: Ends::Settled,
            };
            let begun = client.vm_attach(&vm, &volume, bus, None).await.doing(|| deed.failure.clone())?;
            let vm = conclude(session, &deed, begun, &wait).await?;
            session.out.changed(&[vm], true)
        }
        VolumeCommand::Detach { volume, wait } => detach(session, &volume, &wait).await,
        VolumeCommand::Delete { volumes, wait } => {
            let deed = |volume: &str| Deed::new("delete", "volume", volume, Ends::Gone);
            each(session, &volumes, &wait, deed, async |volume| {
                Ok(session.client.volume_delete(volume, &Delete::default()).await?)
            })
            .await
        }
    }
}

async fn create(session: &Session, args: CreateArgs) -> Result<()> {
    let create = VolumeCreate {
        name: args.name,
        labels: labels(args.label),
        size: args.size,
        image: args.image,
        snapshot: args.snapshot,
        disk: args.disk,
        node: args.node,
        protected: args.protect,
        limits: args.limits.over(DiskLimits::default()),
        cache: args.open.cache.unwrap_or(DiskCache::Writeback),
        discard: args.open.discard.unwrap_or(DiskDiscard::Unmap),
    };
    let deed = Deed::new("create", "volume", create.name.as_str(), Ends::Settled);
    let begun = session.client.volume_create(&create, None).await.doing(|| deed.failure.clone())?;
    let volume = conclude(session, &deed, begun, &args.wait).await?;
    session.out.changed(&[volume], true)
}

async fn set(session: &Session, args: SetArgs) -> Result<()> {
    let new_labels = (args.no_labels || !args.label.is_empty()).then(|| labels(args.label));
    let protected = match (args.protect, args.unprotect) {
        (true, _) => Some(true),
        (false, true) => Some(false),
        (false, false) => None,
    };
    let limits = if args.no_limits {
        Some(DiskLimits::default())
    } else if args.limits.any() {
        let now = session.client.volume_get(&args.volume).await;
        let now = now.doing(|| format!("cannot change volume {}", args.volume))?;
        Some(args.limits.over(now.spec.limits))
    } else {
        None
    };
    let patch = VolumePatch {
        name: args.new_name,
        labels: new_labels,
        protected,
        limits,
        cache: args.open.cache,
        discard: args.open.discard,
    };
    if patch == VolumePatch::default() {
        return Err(
            CliError::usage("there is nothing to change").hint("say what: see ostler volume set --help")
        );
    }
    let name = &args.volume;
    let changed = session
        .client
        .volume_patch(name, &patch, None)
        .await
        .doing(|| format!("cannot change volume {name}"))?;
    session.out.say(&format!("volume {} is changed", changed.metadata.name))?;
    session.out.changed(&[changed], true)
}

async fn resize(session: &Session, name: &str, wanted: &str, wait: &WaitArgs) -> Result<()> {
    let deed = Deed::new("resize", "volume", name, Ends::Settled);
    let bad = |error: String| CliError::usage(format!("{wanted:?} is not a size: {error}"));
    let size = match wanted.strip_prefix('+') {
        None => size(wanted).map_err(bad)?,
        Some(more) => {
            let more = size(more).map_err(bad)?;
            let now = session.client.volume_get(name).await.doing(|| deed.failure.clone())?.spec.size;
            ByteSize(now.0.checked_add(more.0).ok_or_else(|| bad("it is too large".to_owned()))?)
        }
    };
    let begun = session.client.volume_resize(name, size).await.doing(|| deed.failure.clone())?;
    let volume = conclude(session, &deed, begun, wait).await?;
    session.out.changed(&[volume], true)
}

async fn detach(session: &Session, name: &str, wait: &WaitArgs) -> Result<()> {
    let deed = Deed::new("detach", "volume", name, Ends::Settled);
    let volume = session.client.volume_get(name).await.doing(|| deed.failure.clone())?;
    let Some(vm) = volume.spec.vm else {
        session.out.say(&format!("volume {} is attached to no vm", volume.metadata.name))?;
        return session.out.changed(&[volume], true);
    };
    let begun = session.client.vm_detach(&vm.to_string(), name, None).await.doing(|| deed.failure.clone())?;
    let vm = conclude(session, &deed, begun, wait).await?;
    session.out.changed(&[vm], true)
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
            .maybe("Copy of", self.spec.snapshot.as_ref().map(|from| format!("snapshot {}", from.snapshot)))
            .maybe("VM", self.spec.vm)
            .maybe("Stands on", self.status.snapshot.map(|snapshot| format!("snapshot {snapshot}")))
            .maybe("Protected", self.spec.protected.then_some("yes"))
            .maybe("Limits", limits_text(&self.spec.limits))
            .field("Cache", format!("{}, discarded blocks: {}", self.spec.cache, self.spec.discard))
            .maybe(
                "Flatten",
                self.status.flatten.map(|operation| format!("under way (operation {operation})")),
            );
        if let Some(now) = self.status.size.filter(|now| *now < self.spec.size) {
            fields.field("Size now", now.to_string());
        }
        fields
    }

    fn fault(&self) -> Option<&Fault> {
        self.status.reason.as_ref()
    }

    fn settled(&self) -> bool {
        match self.status.phase {
            // While it grows it is not what was asked for.
            VolumePhase::Ready => {
                self.status.size.is_none_or(|now| now >= self.spec.size) && self.status.flatten.is_none()
            }
            VolumePhase::Error => true,
            VolumePhase::Pending | VolumePhase::Creating | VolumePhase::Deleting => false,
        }
    }
}
