//! Reading: get, list and watch, the same for every kind.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use ostler_api::list::{LabelSelector, List, ListParams, PAGE_DEFAULT, PAGE_MAX, WatchLine};
use ostler_api::{ApiError, ErrorCode, Kind, Name};
use ostler_store::{KeyValue, Revision, WatchBatch, WatchEvent};
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use crate::cache::{Cached, Change, Tables};
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::store_error;
use crate::keys;
use crate::permission::{Owner, Verb};

/// Which resources a list or watch shows.
#[derive(Debug, Clone)]
struct Filter {
    /// None: all projects.
    project: Option<Name>,
    name: Option<String>,
    labels: LabelSelector,
    phases: Vec<String>,
    node: Option<String>,
}

impl Filter {
    fn matches<T: Cached>(&self, object: &T) -> bool {
        let metadata = object.metadata();
        (!T::IN_PROJECT || self.project.is_none() || metadata.project == self.project)
            && self.name.as_ref().is_none_or(|name| metadata.name == **name)
            && (self.phases.is_empty() || self.phases.iter().any(|phase| phase == object.phase()))
            && self.node.as_ref().is_none_or(|node| object.node() == Some(node))
            && self.labels.matches(&metadata.labels)
    }
}

/// The owner by which permission is decided for one object.
pub(crate) fn owner<T: Cached>(object: &T) -> Owner<'_> {
    match (&object.metadata().project, T::KIND) {
        (Some(project), _) => Owner::Project(project),
        (None, Kind::Node) => Owner::Node(object.metadata().name.as_str()),
        (None, _) => Owner::Cloud,
    }
}

impl Cloud {
    /// One resource, by name or id.
    pub fn get<T: Cached>(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name_or_id: &str,
    ) -> Result<Arc<T>, ApiError> {
        let tables = self.cache.read();
        let found = self.find::<T>(&tables, caller, Verb::Read, project, name_or_id)?;
        Ok(T::present(&tables, &found))
    }

    /// Finds what a request names, for somebody who may `verb` it. What one may not see is not there.
    pub(crate) fn find<T: Cached>(
        &self,
        tables: &Tables,
        caller: &Caller,
        verb: Verb,
        project: Option<&str>,
        name_or_id: &str,
    ) -> Result<Arc<T>, ApiError> {
        let missing = || ApiError::not_found(T::KIND, name_or_id);
        let scope = if T::IN_PROJECT {
            match project {
                // An id is found wherever it is; permission is decided by where that is.
                Some("*") => None,
                named => Some(self.project(tables, caller, named, Verb::Read, T::KIND)?),
            }
        } else {
            None
        };
        let table = T::table(tables);
        let by_id = Uuid::parse_str(name_or_id).ok().and_then(|id| table.get(id)).filter(|found| {
            project.is_none() || !T::IN_PROJECT || scope.is_none() || found.metadata().project == scope
        });
        let found = by_id
            .or_else(|| Name::new(name_or_id).ok().and_then(|name| table.named(scope.as_ref(), &name)))
            .ok_or_else(missing);
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                // One who has no rights over the kind at all learns that, and not what exists.
                if !T::IN_PROJECT {
                    let owner = if T::KIND == Kind::Node { Owner::Node(name_or_id) } else { Owner::Cloud };
                    caller.may(verb, T::KIND, owner, name_or_id)?;
                }
                return Err(error);
            }
        };
        caller.may(Verb::Read, T::KIND, owner(found.as_ref()), name_or_id)?;
        caller.may(verb, T::KIND, owner(found.as_ref()), name_or_id)?;
        Ok(Arc::clone(found))
    }

    fn filter<T: Cached>(
        &self,
        tables: &Tables,
        caller: &Caller,
        params: &ListParams,
    ) -> Result<Filter, ApiError> {
        let project = if !T::IN_PROJECT {
            match T::KIND {
                // A node's agent sees its own node.
                Kind::Node => {
                    caller.may(
                        Verb::Read,
                        T::KIND,
                        Owner::Node(params.node.as_deref().unwrap_or("*")),
                        "*",
                    )?;
                }
                _ => caller.may(Verb::Read, T::KIND, Owner::Cloud, "*")?,
            }
            None
        } else if params.project.as_deref() == Some("*") {
            match caller.may(Verb::Read, T::KIND, Owner::Cloud, "*") {
                Ok(()) => None,
                // All that a tenant may see is its own project.
                Err(_) => Some(self.project(tables, caller, None, Verb::Read, T::KIND)?),
            }
        } else {
            Some(self.project(tables, caller, params.project.as_deref(), Verb::Read, T::KIND)?)
        };
        let labels = params
            .label
            .as_deref()
            .unwrap_or("")
            .parse()
            .map_err(|error: String| ApiError::invalid("label", error))?;
        let phases = params
            .phase
            .as_deref()
            .unwrap_or("")
            .split(',')
            .map(str::trim)
            .filter(|phase| !phase.is_empty())
            .map(str::to_owned)
            .collect();
        Ok(Filter { project, name: params.name.clone(), labels, phases, node: params.node.clone() })
    }

    /// A page of resources, in the order of their making.
    pub fn list<T: Cached>(&self, caller: &Caller, params: &ListParams) -> Result<List<Arc<T>>, ApiError> {
        let limit = params.limit.unwrap_or(PAGE_DEFAULT);
        if !(1..=PAGE_MAX).contains(&limit) {
            return Err(ApiError::invalid("limit", format!("a page has 1 to {PAGE_MAX} items, not {limit}")));
        }
        let after = match &params.after {
            None => Uuid::nil(),
            Some(after) => {
                Uuid::parse_str(after).map_err(|_| ApiError::invalid("after", "not the `next` of a page"))?
            }
        };
        let tables = self.cache.read();
        let filter = self.filter::<T>(&tables, caller, params)?;
        let mut hits = T::table(&tables).after(after).filter(|object| filter.matches(object.as_ref()));
        let mut items: Vec<Arc<T>> =
            hits.by_ref().take(limit).map(|object| T::present(&tables, object)).collect();
        let next = match hits.next() {
            Some(_) => items.last().map(|last| last.metadata().id.to_string()),
            None => None,
        };
        items.shrink_to_fit();
        Ok(List { items, revision: tables.revision.0, next })
    }

    /// Changes as they come. Without `from`, the present state first.
    pub async fn watch<T: Cached>(
        &self,
        caller: &Caller,
        params: &ListParams,
    ) -> Result<BoxStream<'static, WatchLine<Arc<T>>>, ApiError> {
        match params.from {
            Some(from) => self.watch_from(caller, params, from).await,
            None => self.watch_now(caller, params),
        }
    }

    fn watch_now<T: Cached>(
        &self,
        caller: &Caller,
        params: &ListParams,
    ) -> Result<BoxStream<'static, WatchLine<Arc<T>>>, ApiError> {
        let tables = self.cache.read();
        let filter = self.filter::<T>(&tables, caller, params)?;
        let table = T::table(&tables);
        let mut first: Vec<WatchLine<Arc<T>>> = table
            .iter()
            .filter(|object| filter.matches(object.as_ref()))
            .map(|object| WatchLine::Added { object: T::present(&tables, object) })
            .collect();
        first.push(WatchLine::Synced { revision: tables.revision.0 });
        let changes = table.subscribe();
        drop(tables);
        let later = stream::unfold(Some(changes), move |changes| {
            let filter = filter.clone();
            async move {
                let mut changes = changes?;
                loop {
                    match changes.recv().await {
                        Ok(Change { old, new }) => {
                            let old = old.filter(|old| filter.matches(old.as_ref()));
                            let new = new.filter(|new| filter.matches(new.as_ref()));
                            let line = match (old, new) {
                                (None, None) => continue,
                                (None, Some(object)) => WatchLine::Added { object },
                                (Some(_), Some(object)) => WatchLine::Modified { object },
                                (Some(object), None) => WatchLine::Deleted { object },
                            };
                            return Some((line, Some(changes)));
                        }
                        Err(RecvError::Lagged(missed)) => return Some((lagged(missed), None)),
                        Err(RecvError::Closed) => return None,
                    }
                }
            }
        });
        Ok(stream::iter(first).chain(later).boxed())
    }

    async fn watch_from<T: Cached>(
        &self,
        caller: &Caller,
        params: &ListParams,
        from: u64,
    ) -> Result<BoxStream<'static, WatchLine<Arc<T>>>, ApiError> {
        let filter = self.filter::<T>(&self.cache.read(), caller, params)?;
        let store = Arc::clone(&self.store);
        let watch = self.store.watch(&keys::kind(T::KIND), Revision(from)).await.map_err(store_error)?;
        Ok(watch
            .then(move |batch| {
                let (store, filter) = (Arc::clone(&store), filter.clone());
                async move {
                    let lines: Vec<WatchLine<Arc<T>>> = match batch {
                        Ok(batch) => past_lines(store.as_ref(), &filter, batch).await,
                        Err(error) => vec![WatchLine::Error { problem: store_error(error).problem(None) }],
                    };
                    stream::iter(lines)
                }
            })
            .flatten()
            .boxed())
    }
}

fn lagged<T>(missed: u64) -> WatchLine<T> {
    let error = ApiError::new(
        ErrorCode::RevisionTooOld,
        format!("this watch was read too slowly and {missed} changes were missed"),
    )
    .hint("list again and watch from the list's revision");
    WatchLine::Error { problem: error.problem(None) }
}

fn decode<T: Cached>(kv: &KeyValue) -> Option<Arc<T>> {
    let mut object: T = serde_json::from_slice(&kv.value).ok()?;
    object.metadata_mut().revision = kv.modified.0;
    Some(Arc::new(object))
}

/// The lines of one revision out of the store's history, which has no old states beside the new ones.
async fn past_lines<T: Cached>(
    store: &dyn ostler_store::Store,
    filter: &Filter,
    batch: WatchBatch,
) -> Vec<WatchLine<Arc<T>>> {
    let mut lines = Vec::new();
    let before = Revision(batch.revision.0 - 1);
    for event in batch.events {
        let (key, new) = match event {
            WatchEvent::Put { kv, .. } => (Arc::clone(&kv.key), decode::<T>(&kv)),
            WatchEvent::Delete { key, .. } => (key, None),
        };
        let old = match store.get(&key, Some(before)).await {
            Ok(kv) => kv.as_ref().and_then(decode::<T>),
            Err(error) => {
                lines.push(WatchLine::Error { problem: store_error(error).problem(None) });
                continue;
            }
        };
        let old = old.filter(|old| filter.matches(old.as_ref()));
        let new = new.filter(|new| filter.matches(new.as_ref()));
        match (old, new) {
            (None, None) => {}
            (None, Some(object)) => lines.push(WatchLine::Added { object }),
            (Some(_), Some(object)) => lines.push(WatchLine::Modified { object }),
            (Some(object), None) => lines.push(WatchLine::Deleted { object }),
        }
    }
    lines
}
