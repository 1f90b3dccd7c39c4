//! `ostler token`: who may call the API from elsewhere.

use std::time::Duration;

use clap::Subcommand;
use ostler_api::token::{Role, Token, TokenCreate};
use ostler_api::{DEFAULT_PROJECT, Name, Time};
use ostler_client::Delete;

use super::age::{age, moment, moment_and_age};
use super::args::{duration, words};
use super::error::{CliError, Doing, Result};
use super::filter::{self, ListArgs};
use super::output::{Format, Show, note, write};
use super::session::Session;
use super::table::{Column, Fields, col, wide};

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token; its secret is shown this once
    Create(TokenCreateArgs),
    /// List tokens
    List(ListArgs),
    /// Revoke tokens: they are refused from then on
    Revoke {
        /// Names or ids
        #[arg(required = true, value_name = "TOKEN")]
        tokens: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct TokenCreateArgs {
    /// Name of the new token
    name: Name,
    /// What it may do; member and reader work in the project of --project, or in "default"
    #[arg(long, value_parser = words!(Role), default_value = "admin", value_name = "ROLE")]
    role: Role,
    /// The node, for role node
    #[arg(long, value_name = "NAME")]
    node: Option<Name>,
    /// How long it is good for, such as 12h or 90d; without, until it is revoked
    #[arg(long, value_parser = duration, value_name = "TIME")]
    ttl: Option<Duration>,
}

pub(crate) async fn run(session: &Session, command: TokenCommand) -> Result<()> {
    match command {
        TokenCommand::Create(args) => create(session, args).await,
        TokenCommand::List(args) => filter::list::<Token>(session, &args.params(), args.watch).await,
        TokenCommand::Revoke { tokens } => revoke(session, &tokens).await,
    }
}

async fn create(session: &Session, args: TokenCreateArgs) -> Result<()> {
    let project = match args.role {
        Role::Member | Role::Reader => {
            Name::new(session.project.as_deref().unwrap_or(DEFAULT_PROJECT)).map(Some)
        }
        Role::Admin | Role::Node => Ok(None),
    };
    let project = project.map_err(|e| CliError::usage("the project's name is wrong").why(e.to_string()))?;
    let create = TokenCreate {
        name: args.name,
        role: args.role,
        project,
        node: args.node,
        ttl: args.ttl.map(|ttl| ttl.as_secs()),
    };
    let made = session
        .client
        .token_create(&create)
        .await
        .doing(|| format!("cannot create token {}", create.name))?;
    match session.out.format {
        Format::Table | Format::Wide => {
            note(&format!(
                "token {} ({}); keep this secret, it is not shown again:",
                create.name, create.role
            ));
            write(&format!("{}\n", made.secret))
        }
        Format::Json | Format::Yaml => session.out.value(&made),
        Format::Name => write(&format!("{}\n", made.token.metadata.name)),
    }
}

async fn revoke(session: &Session, tokens: &[String]) -> Result<()> {
    let mut failed: Option<CliError> = None;
    for token in tokens {
        let done = session.client.token_delete(token, &Delete::default()).await;
        match done.doing(|| format!("cannot revoke token {token}")) {
            Ok(()) => session.out.say(&format!("token {token} revoked"))?,
            Err(error) => {
                error.report();
                failed.get_or_insert(CliError::quiet(error.exit()));
            }
        }
    }
    failed.map_or(Ok(()), Err)
}

impl Show for Token {
    const COLUMNS: &'static [Column] =
        &[col("NAME"), col("ROLE"), col("SCOPE"), col("EXPIRES"), wide("ID"), col("AGE")];

    fn cells(&self, now: Time) -> Vec<String> {
        let scope = self.spec.project.as_ref().or(self.spec.node.as_ref());
        vec![
            self.metadata.name.to_string(),
            self.spec.role.to_string(),
            scope.map(ToString::to_string).unwrap_or_default(),
            self.spec.expires.map_or_else(|| "never".to_owned(), moment),
            self.metadata.id.to_string(),
            age(self.metadata.created, now),
        ]
    }

    fn fields(&self, now: Time) -> Fields {
        let mut fields = Fields::default();
        fields
            .field("Name", self.metadata.name.to_string())
            .field("Id", self.metadata.id.to_string())
            .field("Created", moment_and_age(self.metadata.created, now))
            .field("Role", self.spec.role.to_string())
            .maybe("Project", self.spec.project.as_ref())
            .maybe("Node", self.spec.node.as_ref())
            .field("Expires", self.spec.expires.map_or_else(|| "never".to_owned(), moment));
        fields
    }
}
