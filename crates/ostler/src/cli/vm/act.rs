//! Actions on VMs that exist.

use clap::Args;
use ostler_api::ByteSize;
use ostler_api::operation::Accepted;
use ostler_api::vm::Vm;
use ostler_client::ClientError;

use super::size;
use crate::cli::args::{WaitArgs, seconds};
use crate::cli::conclude::{Deed, Ends, each};
use crate::cli::error::Result;
use crate::cli::session::Session;

#[derive(Debug, Args)]
pub(crate) struct NamesArgs {
    /// Names or ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, Args)]
pub(crate) struct ShutdownArgs {
    #[command(flatten)]
    names: NamesArgs,
    /// Time for the guest to power off before it is forced; the server's default is 90s
    #[arg(long, value_parser = seconds, value_name = "TIME")]
    grace: Option<u32>,
    /// Do not force it: fail when the guest does not obey
    #[arg(long)]
    no_force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RebootArgs {
    #[command(flatten)]
    names: NamesArgs,
    /// Time for the guest to power off before it is forced; the server's default is 90s
    #[arg(long, value_parser = seconds, value_name = "TIME")]
    grace: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct RebuildArgs {
    /// Name or id
    vm: String,
    /// Image of the new root disk
    #[arg(long, value_name = "IMAGE")]
    image: String,
    /// Size of the new root disk, such as 20G; that of the old one when not given
    #[arg(long, value_parser = size, value_name = "SIZE")]
    disk: Option<ByteSize>,
    #[command(flatten)]
    wait: WaitArgs,
}

pub(super) async fn each_vm(
    session: &Session,
    verb: &str,
    args: &NamesArgs,
    begin: impl AsyncFn(&str) -> Result<Accepted<Vm>, ClientError>,
) -> Result<()> {
    let deed = |vm: &str| Deed::new(verb, "vm", vm, Ends::Settled);
    each(session, &args.vms, &args.wait, deed, async |vm| Ok(begin(vm).await?)).await
}

pub(super) async fn shutdown(session: &Session, args: &ShutdownArgs) -> Result<()> {
    let client = &session.client;
    each_vm(session, "shutdown", &args.names, async |vm| {
        client.vm_shutdown(vm, args.grace, !args.no_force, None).await
    })
    .await
}

pub(super) async fn reboot(session: &Session, args: &RebootArgs) -> Result<()> {
    let client = &session.client;
    each_vm(session, "reboot", &args.names, async |vm| client.vm_reboot(vm, args.grace, None).await).await
}

pub(super) async fn rebuild(session: &Session, args: RebuildArgs) -> Result<()> {
    let client = &session.client;
    let names = NamesArgs { vms: vec![args.vm], wait: args.wait };
    each_vm(session, "rebuild", &names, async |vm| client.vm_rebuild(vm, &args.image, args.disk, None).await)
        .await
}
