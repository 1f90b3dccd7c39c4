//! Old operations, events, idempotency keys and tokens go.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::event::Event;
use ostler_api::operation::Operation;
use ostler_api::token::Token;
use ostler_api::{ApiError, Time};
use ostler_store::ListQuery;
use tokio_util::sync::CancellationToken;

use super::{Term, pause};
use crate::cache::{Cached, Tables};
use crate::cloud::Cloud;
use crate::commit::{Change, store_error};
use crate::idempotency::Made;
use crate::keys;

/// How long an idempotency key makes a retry safe.
const IDEMPOTENCY_KEPT: Duration = Duration::from_secs(86_400);
/// Things deleted in one transaction.
const CHUNK: usize = 64;
const PAGE: usize = 1000;

pub(super) async fn run(cloud: Arc<Cloud>, term: Term, stop: CancellationToken) {
    while !stop.is_cancelled() {
        if let Err(error) = sweep(&cloud, term, &stop).await {
            tracing::warn!(%error, internal = error.internal, "old things could not be swept; trying again later");
        }
        pause(&stop, cloud.config.janitor_every).await;
    }
}

async fn sweep(cloud: &Cloud, term: Term, stop: &CancellationToken) -> Result<(), ApiError> {
    let now = Time::now();
    let old_operation = |operation: &Operation, surplus: bool| {
        operation
            .status
            .finished
            .is_some_and(|finished| surplus || now.since(finished) > cloud.config.operations_kept)
    };
    sweep_kind::<Operation>(cloud, term, stop, cloud.config.operations_max, old_operation).await?;
    let old_event = |event: &Event, surplus: bool| {
        surplus || now.since(event.metadata.created) > cloud.config.events_kept
    };
    sweep_kind::<Event>(cloud, term, stop, cloud.config.events_max, old_event).await?;
    let old_token = |token: &Token, _: bool| {
        token.spec.expires.is_some_and(|expires| now.since(expires) > IDEMPOTENCY_KEPT)
    };
    sweep_kind::<Token>(cloud, term, stop, usize::MAX, old_token).await?;
    sweep_idempotency(cloud, term, now).await
}

/// Deletes what `old` says is old; the oldest beyond `max` are surplus.
async fn sweep_kind<T: Cached>(
    cloud: &Cloud,
    term: Term,
    stop: &CancellationToken,
    max: usize,
    old: impl Fn(&T, bool) -> bool,
) -> Result<(), ApiError> {
    let ids: Vec<uuid::Uuid> = {
        let tables = cloud.cache.read();
        let table = T::table(&tables);
        let surplus = table.len().saturating_sub(max);
        let all = table.iter().enumerate();
        all.filter(|(index, object)| old(object, *index < surplus)).map(|(_, o)| o.metadata().id).collect()
    };
    for chunk in ids.chunks(CHUNK) {
        if stop.is_cancelled() {
            return Ok(());
        }
        let plan = |tables: &Tables, change: &mut Change| {
            term.fence(change);
            for object in chunk.iter().filter_map(|id| T::table(tables).get(*id)) {
                change.delete(object.as_ref());
            }
            Ok(())
        };
        cloud.commit(plan).await?;
    }
    Ok(())
}

async fn sweep_idempotency(cloud: &Cloud, term: Term, now: Time) -> Result<(), ApiError> {
    let mut query = ListQuery { limit: Some(PAGE), ..ListQuery::prefix(keys::IDEMPOTENCY) };
    loop {
        let page = cloud.store.list(query.clone()).await.map_err(store_error)?;
        let old: Vec<&str> = page
            .items
            .iter()
            .filter(|kv| {
                serde_json::from_slice::<Made>(&kv.value)
                    .map_or(true, |made| now.since(made.at) > IDEMPOTENCY_KEPT)
            })
            .map(|kv| &*kv.key)
            .collect();
        for chunk in old.chunks(CHUNK) {
            cloud
                .commit(|_, change| {
                    term.fence(change);
                    chunk.iter().for_each(|key| change.delete_key((*key).to_owned()));
                    Ok(())
                })
                .await?;
        }
        query.after = page.items.last().map(|kv| kv.key.to_string());
        if !page.more {
            return Ok(());
        }
    }
}
