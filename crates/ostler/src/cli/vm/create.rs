//! `ostler vm create`.

use clap::Args;
use ostler_api::vm::{DiskBus, Firmware, MachineType, NicModel, Publish, VmCreate};
use ostler_api::{AcceleratorWish, ByteSize, Name};

use super::size;
use crate::cli::args::{WaitArgs, labels, pair, words};
use crate::cli::conclude::{Deed, Ends, conclude};
use crate::cli::error::{Doing, Result};
use crate::cli::session::Session;

pub(super) const EXAMPLES: &str = "\
Examples:
  ostler vm create web --image debian --cpus 2 --memory 1G --disk 20G --publish 2222:22 --wait
  ostler vm create tiny --kernel vmlinuz --initrd initrd --cmdline console=ttyS0 --machine microvm
  ostler vm create setup --disk 20G --cdrom installer --firmware uefi";

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Name of the new VM: a-z, 0-9 and '-'
    name: Name,

    /// Image of the root disk
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,

    /// Snapshot whose disks the VM gets, as linked copies
    #[arg(long, value_name = "SNAPSHOT", conflicts_with_all = ["image", "disk"])]
    snapshot: Option<String>,

    /// Virtual CPUs
    #[arg(long, default_value_t = 1, value_name = "N")]
    cpus: u32,

    /// Memory, such as 512M or 4G
    #[arg(long, value_parser = size, default_value = "512M", value_name = "SIZE")]
    memory: ByteSize,

    /// Size of the root disk, such as 20G; at least the image's, which is the default. Blank without an image
    #[arg(long, value_parser = size, value_name = "SIZE")]
    disk: Option<ByteSize>,

    /// Image of a kernel to boot directly
    #[arg(long, value_name = "IMAGE", help_heading = "Boot")]
    kernel: Option<String>,

    /// Image of the initial RAM disk for that kernel
    #[arg(long, value_name = "IMAGE", requires = "kernel", help_heading = "Boot")]
    initrd: Option<String>,

    /// Command line for that kernel
    #[arg(long, value_name = "TEXT", requires = "kernel", allow_hyphen_values = true, help_heading = "Boot")]
    cmdline: Option<String>,

    /// Image in the CD-ROM drive
    #[arg(long, value_name = "IMAGE", help_heading = "Boot")]
    cdrom: Option<String>,

    /// What starts first in the guest
    #[arg(long, value_parser = words!(Firmware), default_value = "bios", value_name = "KIND", help_heading = "Boot")]
    firmware: Firmware,

    /// Create it without starting it
    #[arg(long, help_heading = "Boot")]
    no_start: bool,

    /// Port of the node that leads to one of the guest: [ADDR:]HOST:GUEST[/udp]; ADDR is 127.0.0.1 when not given
    #[arg(short, long, value_name = "PORTS", help_heading = "Network")]
    publish: Vec<Publish>,

    /// Network card; e1000 for guests without virtio drivers
    #[arg(long, value_parser = words!(NicModel), default_value = "virtio", value_name = "MODEL", help_heading = "Network")]
    nic_model: NicModel,

    /// Kind of machine; microvm boots kernels directly and nothing else
    #[arg(long, value_parser = words!(MachineType), default_value = "q35", value_name = "KIND", help_heading = "Hardware")]
    machine: MachineType,

    /// What runs the guest; auto takes KVM where it works, else TCG, which runs everywhere and is slower
    #[arg(long, value_parser = words!(AcceleratorWish), default_value = "auto", value_name = "KIND", help_heading = "Hardware")]
    accelerator: AcceleratorWish,

    /// How disks are attached; sata and ide for guests without virtio drivers
    #[arg(long, value_parser = words!(DiskBus), default_value = "virtio", value_name = "BUS", help_heading = "Hardware")]
    disk_bus: DiskBus,

    /// Only this node
    #[arg(long, value_name = "NAME", help_heading = "Placement")]
    node: Option<Name>,

    /// Only nodes with this label
    #[arg(long, value_parser = pair, value_name = "KEY=VALUE", help_heading = "Placement")]
    node_selector: Vec<(String, String)>,

    /// Label of the VM
    #[arg(short, long, value_parser = pair, value_name = "KEY=VALUE")]
    label: Vec<(String, String)>,

    #[command(flatten)]
    wait: WaitArgs,
}

impl CreateArgs {
    fn split(self) -> (VmCreate, WaitArgs) {
        let create = VmCreate {
            name: self.name,
            labels: labels(self.label),
            cpus: self.cpus,
            memory: self.memory,
            image: self.image,
            snapshot: self.snapshot,
            disk: self.disk,
            disk_bus: self.disk_bus,
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            cdrom: self.cdrom,
            machine: self.machine,
            firmware: self.firmware,
            accelerator: self.accelerator,
            nic_model: self.nic_model,
            publish: self.publish,
            node: self.node,
            node_selector: labels(self.node_selector),
            start: !self.no_start,
        };
        (create, self.wait)
    }
}

pub(super) async fn run(session: &Session, args: CreateArgs) -> Result<()> {
    let (create, wait) = args.split();
    let deed = Deed::new("create", "vm", create.name.as_str(), Ends::Settled);
    let accepted = session.client.vm_create(&create, None).await.doing(|| deed.failure.clone())?;
    let vm = conclude(session, &deed, accepted, &wait).await?;
    session.out.changed(&[vm], true)
}
