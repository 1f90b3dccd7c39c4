//! The cloud: its store, its cache, and what all services share.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use ostler_api::project::Project;
use ostler_api::token::Role;
use ostler_api::{
    ApiError, DEFAULT_PROJECT, ErrorCode, Kind, Metadata, Name, ProjectId, SCHEMA_VERSION, TokenId,
};
use ostler_storage::ImageStore;
use ostler_store::{KeyValue, ListQuery, Revision, Store, StoreError, Txn, TxnOutcome};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cache::{Cache, Tables};
use crate::caller::Caller;
use crate::config::CloudConfig;
use crate::controllers;
use crate::image_import::Imports;
use crate::keys;
use crate::metrics::Metrics;
use crate::permission::{Identity, Owner, Verb};
use crate::stream::Streams;

/// Keys read at once while loading.
const LOAD_PAGE: usize = 5_000;

/// Why a cloud cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the store cannot be read: {0}")]
    Store(#[from] StoreError),
    #[error("the stored resource {key} cannot be read ({detail}): restore the store from a backup")]
    Resource { key: String, detail: String },
}

/// One cloud, as one control plane serves it.
#[derive(Debug)]
pub struct Cloud {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) cache: Cache,
    pub(crate) images: Arc<ImageStore>,
    pub(crate) config: CloudConfig,
    pub(crate) streams: Streams,
    pub(crate) imports: Imports,
    pub(crate) metrics: Metrics,
    pub(crate) leases: crate::node::Leases,
    id: Uuid,
}

impl Cloud {
    /// Opens what `store` holds: checks its schema, makes what a new cloud needs, loads the cache.
    pub async fn open(
        store: Arc<dyn Store>,
        images: Arc<ImageStore>,
        config: CloudConfig,
    ) -> Result<Arc<Self>, OpenError> {
        schema(store.as_ref()).await?;
        if config.sole_server {
            // A server that was killed could not give up its lead, and its lease would keep us from acting.
            let (TxnOutcome::Committed { .. } | TxnOutcome::Conflict { .. }) =
                store.txn(Txn::new().delete(keys::LEADER)).await?;
        }
        let id = cloud_id(store.as_ref()).await?;
        default_project(store.as_ref()).await?;
        let (items, revision) = load(store.as_ref()).await?;
        let cache = Cache::load(&items, revision).map_err(|(key, error)| OpenError::Resource {
            key: key.to_string(),
            detail: error.to_string(),
        })?;
        drop(items);
        let cloud = Arc::new(Self {
            store,
            cache,
            images,
            config,
            streams: Streams::default(),
            imports: Imports::default(),
            metrics: Metrics::default(),
            leases: crate::node::Leases::default(),
            id,
        });
        cloud.follow(revision).await?;
        Ok(cloud)
    }

    /// Keeps the cache up with the store for as long as the cloud is in use.
    async fn follow(self: &Arc<Self>, loaded: Revision) -> Result<(), OpenError> {
        // All keys, so that every revision arrives: `Cache::reached` waits for revisions of any key.
        let mut watch = self.store.watch("", loaded.next()).await?;
        let cloud = Arc::downgrade(self);
        tokio::spawn(async move {
            while let Some(batch) = watch.next().await {
                let Some(cloud) = cloud.upgrade() else { return };
                match batch {
                    Ok(batch) => cloud.cache.apply(&batch),
                    Err(error) => {
                        // The watch is within this process: its end is the end of the store.
                        tracing::error!(%error, "the store's watch ended; this server serves no longer");
                        cloud.metrics.broken();
                        return;
                    }
                }
            }
        });
        Ok(())
    }

    /// Starts everything that acts by itself. Ends with `shutdown`.
    pub fn run_controllers(self: &Arc<Self>, shutdown: CancellationToken) -> JoinHandle<()> {
        tokio::spawn(controllers::run(Arc::clone(self), shutdown))
    }

    /// Whether requests can be served, or why not.
    pub fn ready(&self) -> Result<(), String> {
        if self.metrics.is_broken() {
            return Err("the store's watch has ended; see the log and start the server again".to_owned());
        }
        Ok(())
    }

    pub fn cloud_id(&self) -> Uuid {
        self.id
    }

    /// The newest revision that reads show.
    pub fn revision(&self) -> u64 {
        self.cache.read().revision.0
    }

    /// The local user that owns this server; the listener has looked at its credentials.
    pub fn caller_local(&self) -> Caller {
        Caller::new(Identity::Local)
    }

    /// Whoever brings this bearer token.
    pub async fn caller_bearer(&self, secret: &str) -> Result<Caller, ApiError> {
        let refuse = || {
            ApiError::new(ErrorCode::Unauthenticated, "the token is not valid, has expired or was revoked")
                .hint("make one on the server's host: ostler token create NAME")
        };
        let (id, secret) =
            secret.strip_prefix("ostler_").and_then(|rest| rest.split_once('_')).ok_or_else(refuse)?;
        let id = Uuid::parse_str(id).map_err(|_| refuse())?;
        let tables = self.cache.read();
        let hash = tables.token_hashes.get(&id);
        // The work is the same whether or not the token exists.
        let given = token_hash(secret);
        let good = given.as_bytes().ct_eq(hash.map_or("", String::as_str).as_bytes());
        let token = tables.tokens.get(id).ok_or_else(refuse)?;
        let expired = token.spec.expires.is_some_and(|at| at <= ostler_api::Time::now());
        if !bool::from(good) || expired {
            return Err(refuse());
        }
        let TokenIdentity { role, project, node } = TokenIdentity::of(token);
        Ok(Caller::new(Identity::Token { id: TokenId(id), role, project, node }))
    }

    /// The project a request is about; it has to exist and the caller has to have a right there.
    pub(crate) fn project(
        &self,
        tables: &Tables,
        caller: &Caller,
        named: Option<&str>,
        verb: Verb,
        kind: Kind,
    ) -> Result<Name, ApiError> {
        let project = caller.project(named)?;
        caller.may(verb, kind, Owner::Project(&project), project.as_str()).map_err(|error| {
            // A project that one may not see is a project that is not there.
            if error.code == ErrorCode::NotFound {
                ApiError::not_found(Kind::Project, project.as_str())
            } else {
                error
            }
        })?;
        match tables.projects.named(None, &project) {
            Some(_) => Ok(project),
            None => Err(ApiError::not_found(Kind::Project, project.as_str())),
        }
    }
}

struct TokenIdentity {
    role: Role,
    project: Option<Name>,
    node: Option<Name>,
}

impl TokenIdentity {
    fn of(token: &ostler_api::token::Token) -> Self {
        Self { role: token.spec.role, project: token.spec.project.clone(), node: token.spec.node.clone() }
    }
}

/// What is stored of a token's secret. The secret is 256 random bits, so one round is enough.
pub(crate) fn token_hash(secret: &str) -> String {
    use std::fmt::Write;
    Sha256::digest(secret.as_bytes()).iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Upgrades an older store, refuses a newer one, marks a new one.
async fn schema(store: &dyn Store) -> Result<(), OpenError> {
    let found = ostler_store::check_schema(store, SCHEMA_VERSION).await?;
    if found < SCHEMA_VERSION {
        // Version 1 is the first: there is nothing to rewrite on the way to it.
        store.schema_upgrade(found, SCHEMA_VERSION, Box::new(|_, _| Ok(ostler_store::Rewrite::Keep))).await?;
    }
    Ok(())
}

async fn cloud_id(store: &dyn Store) -> Result<Uuid, OpenError> {
    let damaged = |detail: String| OpenError::Resource { key: keys::CLOUD.to_owned(), detail };
    loop {
        if let Some(kv) = store.get(keys::CLOUD, None).await? {
            let text = std::str::from_utf8(&kv.value).map_err(|error| damaged(error.to_string()))?;
            return Uuid::parse_str(text).map_err(|error| damaged(error.to_string()));
        }
        let id = Uuid::now_v7();
        let txn = Txn::new().absent(keys::CLOUD).put(keys::CLOUD, Bytes::from(id.to_string()));
        // Either ours or somebody else's: the next look tells.
        let (TxnOutcome::Committed { .. } | TxnOutcome::Conflict { .. }) = store.txn(txn).await?;
    }
}

async fn default_project(store: &dyn Store) -> Result<(), OpenError> {
    let name = Name::new(DEFAULT_PROJECT).map_err(|error| OpenError::Resource {
        key: DEFAULT_PROJECT.to_owned(),
        detail: error.to_string(),
    })?;
    let project = Project { metadata: Metadata::new(ProjectId::new().into(), name, None) };
    let mut change = crate::commit::Change::default();
    change.create(&project).map_err(|error| OpenError::Resource {
        key: DEFAULT_PROJECT.to_owned(),
        detail: error.to_string(),
    })?;
    let (TxnOutcome::Committed { .. } | TxnOutcome::Conflict { .. }) = store.txn(change.into_txn()).await?;
    Ok(())
}

/// Everything under the resources' prefix as of one revision.
async fn load(store: &dyn Store) -> Result<(Vec<KeyValue>, Revision), OpenError> {
    let mut query = ListQuery { limit: Some(LOAD_PAGE), ..ListQuery::prefix(keys::RESOURCES) };
    let mut items = Vec::new();
    loop {
        let page = store.list(query.clone()).await?;
        query.at = Some(page.revision);
        query.after = page.items.last().map(|kv| kv.key.to_string());
        items.extend(page.items);
        if !page.more {
            return Ok((items, page.revision));
        }
    }
}
