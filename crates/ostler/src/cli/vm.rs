//! `ostler vm`: the life of a VM.

mod act;
mod clone;
mod create;
pub(crate) mod show;
pub(crate) use show::label_text;

use clap::Subcommand;
use ostler_api::ByteSize;
use ostler_api::Name;
use ostler_api::list::ListParams;
use ostler_api::vm::{Vm, VmPatch};
use ostler_api::vm_phase::VmPhase;
use ostler_client::Delete;

use super::args::{WaitArgs, words};
use super::conclude::{Deed, Ends, each};
use super::console::{self, ConsoleArgs, LogArgs};
use super::error::{Doing, Result};
use super::filter::{self, ListArgs, ScopeArgs};
use super::session::Session;

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Create a VM and start it
    #[command(after_help = create::EXAMPLES)]
    Create(Box<create::CreateArgs>),
    /// List VMs
    List(VmListArgs),
    /// Show a VM
    Show {
        /// Name or id
        vm: String,
    },
    /// Start VMs; suspended ones go on where they were
    Start(act::NamesArgs),
    /// Ask guests to power off; what does not obey in time is forced off
    Shutdown(act::ShutdownArgs),
    /// Pull the plug
    Stop(act::NamesArgs),
    /// Press the reset button
    Reset(act::NamesArgs),
    /// Shut down, then start again
    Reboot(act::RebootArgs),
    /// Freeze VMs where they are, in memory
    Pause(act::NamesArgs),
    /// Let paused or suspended VMs go on
    Resume(act::NamesArgs),
    /// Save VMs' memory to disk and stop them
    Suspend(act::NamesArgs),
    /// Give a VM a new root disk from an image; its identity stays, its old root disk is deleted
    Rebuild(act::RebuildArgs),
    /// Make another VM out of a VM, also while it runs
    #[command(after_help = clone::EXAMPLES)]
    Clone(clone::CloneArgs),
    /// Give a VM another name
    Rename {
        /// Name or id
        vm: String,
        /// The new name
        new_name: Name,
    },
    /// Delete VMs with their disks
    Delete(DeleteArgs),
    /// Use a VM's serial console; ctrl-] leaves
    #[command(after_help = console::CONSOLE_EXAMPLES)]
    Console(ConsoleArgs),
    /// Print what a VM's serial console has shown
    Log(LogArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct VmListArgs {
    #[command(flatten)]
    list: ListArgs,
    /// Only those in these phases
    #[arg(long, value_delimiter = ',', value_parser = words!(VmPhase), value_name = "PHASE")]
    phase: Vec<VmPhase>,
    /// Only those on this node
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    #[command(flatten)]
    scope: ScopeArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DeleteArgs {
    /// Names or ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
    /// Also when the node does not answer
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

pub(crate) async fn run(session: &Session, command: VmCommand) -> Result<()> {
    let client = &session.client;
    match command {
        VmCommand::Create(args) => create::run(session, *args).await,
        VmCommand::List(args) => {
            let params = ListParams {
                project: args.scope.project(),
                phase: filter::words(&args.phase),
                node: args.node,
                ..args.list.params()
            };
            filter::list::<Vm>(session, &params, args.list.watch).await
        }
        VmCommand::Show { vm } => show::run(session, &vm).await,
        VmCommand::Start(args) => {
            act::each_vm(session, "start", &args, async |vm| client.vm_start(vm, None).await).await
        }
        VmCommand::Shutdown(args) => act::shutdown(session, &args).await,
        VmCommand::Stop(args) => {
            act::each_vm(session, "stop", &args, async |vm| client.vm_stop(vm, None).await).await
        }
        VmCommand::Reset(args) => {
            act::each_vm(session, "reset", &args, async |vm| client.vm_reset(vm, None).await).await
        }
        VmCommand::Reboot(args) => act::reboot(session, &args).await,
        VmCommand::Pause(args) => {
            act::each_vm(session, "pause", &args, async |vm| client.vm_pause(vm, None).await).await
        }
        VmCommand::Resume(args) => {
            act::each_vm(session, "resume", &args, async |vm| client.vm_resume(vm, None).await).await
        }
        VmCommand::Suspend(args) => {
            act::each_vm(session, "suspend", &args, async |vm| client.vm_suspend(vm, None).await).await
        }
        VmCommand::Rebuild(args) => act::rebuild(session, args).await,
        VmCommand::Clone(args) => clone::run(session, args).await,
        VmCommand::Rename { vm, new_name } => rename(session, &vm, new_name).await,
        VmCommand::Delete(args) => {
            let how = Delete { force: args.force, ..Delete::default() };
            let deed = |vm: &str| Deed::new("delete", "vm", vm, Ends::Gone);
            each(session, &args.vms, &args.wait, deed, async |vm| Ok(client.vm_delete(vm, &how).await?)).await
        }
        VmCommand::Console(args) => console::console(session, &args).await,
        VmCommand::Log(args) => console::log(session, &args).await,
    }
}

async fn rename(session: &Session, vm: &str, new_name: Name) -> Result<()> {
    let patch = VmPatch { name: Some(new_name), ..VmPatch::default() };
    let renamed =
        session.client.vm_patch(vm, &patch, None).await.doing(|| format!("cannot rename vm {vm}"))?;
    session.out.say(&format!("vm {vm} is now {}", renamed.metadata.name))?;
    session.out.changed(&[renamed], true)
}

/// A size as people and the API write it.
pub(crate) fn size(text: &str) -> Result<ByteSize, String> {
    text.parse().map_err(|e: ostler_api::size::SizeError| e.to_string())
}
