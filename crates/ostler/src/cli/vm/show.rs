//! How VMs look to people.

use ostler_api::image::{Image, ImageUse};
use ostler_api::metadata::Labels;
use ostler_api::vm::{MachineFacts, Vm, VmObserved};
use ostler_api::volume::Volume;
use ostler_api::{Fault, Time};
use ostler_client::Client;

use crate::cli::age::{age, moment, moment_and_age};
use crate::cli::error::{Doing, Result};
use crate::cli::output::{Show, write};
use crate::cli::session::Session;
use crate::cli::table::{Column, Fields, col, wide};

impl Show for Vm {
    const COLUMNS: &'static [Column] = &[
        col("NAME"),
        col("PHASE"),
        col("NODE"),
        col("CPUS"),
        col("MEMORY"),
        wide("MACHINE"),
        wide("ACCEL"),
        wide("PORTS"),
        wide("PROJECT"),
        wide("ID"),
        col("AGE"),
        wide("REASON"),
    ];

    fn cells(&self, now: Time) -> Vec<String> {
        let ports: Vec<_> =
            self.spec.nics.iter().flat_map(|nic| &nic.publish).map(ToString::to_string).collect();
        vec![
            self.metadata.name.to_string(),
            self.status.phase.to_string(),
            self.status.node.as_ref().map(ToString::to_string).unwrap_or_default(),
            self.spec.cpus.to_string(),
            self.spec.memory.to_string(),
            self.spec.machine.to_string(),
            facts(self).map(|facts| facts.accelerator.to_string()).unwrap_or_default(),
            ports.join(" "),
            self.metadata.project.as_ref().map(ToString::to_string).unwrap_or_default(),
            self.metadata.id.to_string(),
            age(self.metadata.created, now),
            self.status.reason.as_ref().map(|reason| reason.message.clone()).unwrap_or_default(),
        ]
    }

    fn fields(&self, now: Time) -> Fields {
        let mut fields = Fields::default();
        head(&mut fields, self, now);
        status(&mut fields, self, now);
        wanted(&mut fields, self);
        for disk in &self.spec.disks {
            fields.field("Disk", format!("volume {}, {}", disk.volume, disk.bus));
        }
        fields
    }

    fn fault(&self) -> Option<&Fault> {
        self.status.reason.as_ref()
    }

    fn settled(&self) -> bool {
        self.status.phase.is_settled() && self.status.task.is_none()
    }
}

fn facts(vm: &Vm) -> Option<&MachineFacts> {
    vm.status.observed.as_ref()?.facts.as_ref()
}

/// The VM with what its disks and images are called, as far as that can be learned.
pub(super) async fn run(session: &Session, name: &str) -> Result<()> {
    let vm = session.client.vm_get(name).await.doing(|| format!("cannot show vm {name}"))?;
    if !session.out.is_human() {
        return session.out.one(&vm);
    }
    let now = Time::now();
    let mut fields = Fields::default();
    head(&mut fields, &vm, now);
    status(&mut fields, &vm, now);
    wanted(&mut fields, &vm);
    for disk in &vm.spec.disks {
        let volume = session.client.volume_get(&disk.volume.to_string()).await.ok();
        let image = match volume.as_ref().and_then(|volume| volume.spec.image.as_ref()) {
            Some(image) => Some(image_name(&session.client, image).await),
            None => None,
        };
        let text = match &volume {
            Some(volume) => disk_text(volume, disk.bus.as_str(), image.as_deref()),
            None => format!("volume {}, {}", disk.volume, disk.bus),
        };
        fields.field("Disk", text);
    }
    if let Some(cdrom) = &vm.spec.cdrom {
        fields.field("CD-ROM", image_name(&session.client, cdrom).await);
    }
    write(&fields.text())
}

fn disk_text(volume: &Volume, bus: &str, image: Option<&str>) -> String {
    let origin = image.map_or_else(String::new, |image| format!(", from image {image}"));
    format!("{} on {bus}, volume {}{origin}", volume.spec.size, volume.metadata.name)
}

async fn image_name(client: &Client, used: &ImageUse) -> String {
    let id = used.image.to_string();
    client.get::<Image>(&id).await.map_or(id, |image| image.metadata.name.to_string())
}

fn head(fields: &mut Fields, vm: &Vm, now: Time) {
    let metadata = &vm.metadata;
    fields
        .field("Name", metadata.name.to_string())
        .field("Id", metadata.id.to_string())
        .maybe("Project", metadata.project.as_ref())
        .field("Created", moment_and_age(metadata.created, now))
        .maybe("Labels", label_text(&metadata.labels));
    if let Some(deleted) = metadata.deleted {
        fields.field("Deletion", format!("asked for at {}", moment(deleted)));
    }
}

/// `a=b, c=d`; none when there are none.
pub(crate) fn label_text(labels: &Labels) -> Option<String> {
    (!labels.is_empty())
        .then(|| labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(", "))
}

fn status(fields: &mut Fields, vm: &Vm, now: Time) {
    let status = &vm.status;
    fields.section("Status").field("Phase", status.phase.to_string());
    if let Some(reason) = &status.reason {
        fields.field("Reason", format!("{} ({})", reason.message, reason.code));
    }
    fields.maybe("Node", status.node.as_ref());
    if status.node_silent {
        fields.field("Node says", "nothing: it does not report; what follows is what it saw last");
    }
    if let Some(task) = &status.task {
        let since = age(task.requested, now);
        fields.field("Task", format!("{} for {since} (operation {})", task.action.name(), task.operation));
    }
    if let Some(observed) = &status.observed {
        observation(fields, observed, now);
    }
}

fn observation(fields: &mut Fields, observed: &VmObserved, now: Time) {
    fields.field("Seen", format!("{}, {} ago", observed.state, age(observed.at, now)));
    fields.maybe("Ended by", observed.end);
    if let Some(fault) = &observed.fault {
        fields.field("Fault", format!("{} ({})", fault.message, fault.code));
    }
    if let Some(facts) = &observed.facts {
        fields
            .field("Started", moment_and_age(facts.started, now))
            .field("Process", facts.pid.to_string())
            .field(
                "Runs as",
                format!("{} with {}, CPU {}", facts.machine_version, facts.accelerator, facts.cpu_model),
            );
    }
}

fn wanted(fields: &mut Fields, vm: &Vm) {
    let spec = &vm.spec;
    fields
        .section("Machine")
        .field("CPUs", spec.cpus.to_string())
        .field("Memory", spec.memory.to_string())
        .field("Kind", format!("{}, {}, accelerator {}", spec.machine, spec.firmware, spec.accelerator));
    if let Some(kernel) = &spec.kernel {
        fields.field("Kernel", format!("image {}", kernel.kernel.image));
        fields.maybe("Initrd", kernel.initrd.as_ref().map(|initrd| format!("image {}", initrd.image)));
        if !kernel.cmdline.is_empty() {
            fields.field("Cmdline", kernel.cmdline.clone());
        }
    }
    for nic in &spec.nics {
        fields.field("NIC", format!("{} {}", nic.mac, nic.model));
        for publish in &nic.publish {
            fields.field("Port", publish.to_string());
        }
    }
    fields.maybe("Only node", spec.node.as_ref());
    fields.maybe("Only nodes", label_text(&spec.node_selector));
}
