//! `ostler node`: the machines that run VMs. `run` is the agent itself.

use clap::Subcommand;
use ostler_api::list::ListParams;
use ostler_api::node::{Node as Host, NodePhase};
use ostler_api::{Fault, Time};

use super::age::{age, moment_and_age};
use super::args::words;
use super::error::{Doing, Result};
use super::filter::{self, ListArgs};
use super::output::Show;
use super::session::Session;
use super::table::{Column, Fields, col, wide};
use super::vm::label_text;

#[derive(Debug, Subcommand)]
pub(crate) enum Node {
    /// List nodes
    List(NodeListArgs),
    /// Show a node
    Show {
        /// Name
        node: String,
    },
    /// Run the agent that makes this machine a node
    Run(crate::node_run::NodeRunArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct NodeListArgs {
    #[command(flatten)]
    list: ListArgs,
    /// Only those in these phases
    #[arg(long, value_delimiter = ',', value_parser = words!(NodePhase), value_name = "PHASE")]
    phase: Vec<NodePhase>,
}

pub(crate) async fn list(session: &Session, args: &NodeListArgs) -> Result<()> {
    let params = ListParams { phase: filter::words(&args.phase), ..args.list.params() };
    filter::list::<Host>(session, &params, args.list.watch).await
}

pub(crate) async fn show(session: &Session, node: &str) -> Result<()> {
    let found = session.client.node_get(node).await.doing(|| format!("cannot show node {node}"))?;
    session.out.one(&found)
}

impl Show for Host {
    const COLUMNS: &'static [Column] = &[
        col("NAME"),
        col("PHASE"),
        col("VMS"),
        col("CPUS"),
        col("MEMORY"),
        col("DISK FREE"),
        col("ACCEL"),
        wide("QEMU"),
        wide("VERSION"),
        wide("SCHEDULABLE"),
        wide("ID"),
        col("AGE"),
        wide("WARNINGS"),
    ];

    fn cells(&self, now: Time) -> Vec<String> {
        let facts = self.status.facts.as_ref();
        let of = |value: Option<String>| value.unwrap_or_default();
        let used = &self.status.allocated;
        vec![
            self.metadata.name.to_string(),
            self.status.phase.to_string(),
            used.vms.to_string(),
            of(facts.map(|facts| format!("{}/{}", used.cpus, facts.cpus))),
            of(facts.map(|facts| format!("{}/{}", used.memory, facts.memory))),
            of(facts.map(|facts| facts.disk_free.to_string())),
            of(facts.and_then(|facts| facts.accelerators.first()).map(ToString::to_string)),
            of(facts.and_then(|facts| facts.hypervisor.clone())),
            of(facts.map(|facts| facts.version.clone())),
            if self.spec.schedulable { "yes" } else { "no" }.to_owned(),
            self.metadata.id.to_string(),
            age(self.metadata.created, now),
            of(facts.map(|facts| facts.warnings.join("; "))),
        ]
    }

    fn fields(&self, now: Time) -> Fields {
        let mut fields = Fields::default();
        let used = &self.status.allocated;
        fields
            .field("Name", self.metadata.name.to_string())
            .field("Id", self.metadata.id.to_string())
            .field("Joined", moment_and_age(self.metadata.created, now))
            .maybe("Labels", label_text(&self.metadata.labels))
            .field(
                "New VMs",
                if self.spec.schedulable { "may be placed here" } else { "are not placed here" },
            )
            .section("Status")
            .field("Phase", format!("{} for {}", self.status.phase, age(self.status.since, now)))
            .maybe(
                "Reason",
                self.status.reason.as_ref().map(|reason| format!("{} ({})", reason.message, reason.code)),
            )
            .field("VMs", used.vms.to_string())
            .field("Promised", format!("{} CPUs, {} memory, {} disk", used.cpus, used.memory, used.disk));
        if let Some(facts) = &self.status.facts {
            let accelerators: Vec<_> = facts.accelerators.iter().map(ToString::to_string).collect();
            fields
                .section("Machine")
                .field("CPUs", format!("{}, {}", facts.cpus, facts.cpu_model))
                .field("Memory", facts.memory.to_string())
                .field("Disk", format!("{} free of {}", facts.disk_free, facts.disk))
                .field("Ostler", facts.version.clone())
                .field("QEMU", facts.hypervisor.clone().unwrap_or_else(|| "not installed".to_owned()))
                .field("Accelerators", accelerators.join(", "));
            for warning in &facts.warnings {
                fields.field("Warning", warning.clone());
            }
        }
        fields
    }

    fn fault(&self) -> Option<&Fault> {
        self.status.reason.as_ref()
    }
}
