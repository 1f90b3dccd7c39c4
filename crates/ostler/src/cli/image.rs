//! `ostler image`: what disks, kernels and CD-ROMs are made from.

use clap::Subcommand;
use ostler_api::image::{Image, ImagePhase};
use ostler_api::list::ListParams;
use ostler_api::{Fault, Time};
use ostler_client::Delete;

use super::age::{age, moment_and_age};
use super::args::{WaitArgs, words};
use super::conclude::{Deed, Ends, each};
use super::error::{Doing, Result};
use super::export::{self, ExportArgs};
use super::filter::{self, ListArgs, ScopeArgs};
use super::import::{self, ImportArgs};
use super::output::Show;
use super::session::Session;
use super::table::{Column, Fields, col, wide};
use super::vm::label_text;

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Bring in an image from a file, standard input or a URL
    #[command(after_help = import::EXAMPLES)]
    Import(ImportArgs),
    /// List images
    List(ImageListArgs),
    /// Show an image
    Show {
        /// Name or id
        image: String,
    },
    /// Delete images; disks made from them keep working
    Delete {
        /// Names or ids
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Write an image to a file or to standard output
    #[command(after_help = export::EXAMPLES)]
    Export(ExportArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct ImageListArgs {
    #[command(flatten)]
    list: ListArgs,
    /// Only those in these phases
    #[arg(long, value_delimiter = ',', value_parser = words!(ImagePhase), value_name = "PHASE")]
    phase: Vec<ImagePhase>,
    #[command(flatten)]
    scope: ScopeArgs,
}

pub(crate) async fn run(session: &Session, command: ImageCommand) -> Result<()> {
    match command {
        ImageCommand::Import(args) => import::run(session, args).await,
        ImageCommand::List(args) => {
            let params = ListParams {
                project: args.scope.project(),
                phase: filter::words(&args.phase),
                ..args.list.params()
            };
            filter::list::<Image>(session, &params, args.list.watch).await
        }
        ImageCommand::Show { image } => {
            let found =
                session.client.image_get(&image).await.doing(|| format!("cannot show image {image}"))?;
            session.out.one(&found)
        }
        ImageCommand::Delete { images, wait } => {
            let deed = |image: &str| Deed::new("delete", "image", image, Ends::Gone);
            each(session, &images, &wait, deed, async |image| {
                Ok(session.client.image_delete(image, &Delete::default()).await?)
            })
            .await
        }
        ImageCommand::Export(args) => export::run(session, &args).await,
    }
}

impl Show for Image {
    const COLUMNS: &'static [Column] = &[
        col("NAME"),
        col("PHASE"),
        col("CONTENT"),
        col("FORMAT"),
        col("SIZE"),
        col("VIRTUAL SIZE"),
        wide("SHA256"),
        wide("PROJECT"),
        wide("ID"),
        col("AGE"),
        wide("REASON"),
    ];

    fn cells(&self, now: Time) -> Vec<String> {
        let data = self.status.data.as_ref();
        let of = |value: Option<String>| value.unwrap_or_default();
        vec![
            self.metadata.name.to_string(),
            self.status.phase.to_string(),
            of(data.map(|data| data.content.to_string())),
            of(data.map(|data| data.format.to_string())),
            of(data.map(|data| data.size.to_string())),
            of(data.map(|data| data.virtual_size.to_string())),
            of(data.map(|data| data.sha256.clone())),
            of(self.metadata.project.as_ref().map(ToString::to_string)),
            self.metadata.id.to_string(),
            age(self.metadata.created, now),
            of(self.status.reason.as_ref().map(|reason| reason.message.clone())),
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
            .maybe("From", self.spec.url.as_ref())
            .field("Phase", self.status.phase.to_string())
            .maybe(
                "Reason",
                self.status.reason.as_ref().map(|reason| format!("{} ({})", reason.message, reason.code)),
            );
        if let Some(data) = &self.status.data {
            fields
                .section("Data")
                .field("Content", data.content.to_string())
                .field("Format", format!("{} (given as {})", data.format, data.source_format))
                .field("Size", data.size.to_string())
                .field("Virtual size", data.virtual_size.to_string())
                .field("SHA-256", data.sha256.clone())
                .field("SHA-256 given", data.source_sha256.clone());
        }
        fields
    }

    fn fault(&self) -> Option<&Fault> {
        self.status.reason.as_ref()
    }

    fn settled(&self) -> bool {
        match self.status.phase {
            ImagePhase::Active | ImagePhase::Error => true,
            ImagePhase::Queued | ImagePhase::Uploading | ImagePhase::Importing | ImagePhase::Deleting => {
                false
            }
        }
    }
}
