//! What every kind of resource has in common: get, list, watch.

use ostler_api::Resource;
use ostler_api::list::{List, ListParams, PAGE_MAX, WatchLine};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::call::Call;
use crate::query::Query;
use crate::{Client, Lines, Result, Wait};

/// How something is deleted.
#[derive(Debug, Clone, Default)]
pub struct Delete {
    /// Also when its node does not answer.
    pub force: bool,
    /// Only this revision.
    pub if_match: Option<u64>,
    pub wait: Option<Wait>,
}

impl Client {
    /// # Errors
    /// The server's refusal, or no server.
    pub async fn get<T: Resource>(&self, name: &str) -> Result<T> {
        self.json(self.scoped::<T>(Call::get(&[T::KIND.plural(), name]))).await
    }

    /// Answers when it is in one of the phases of `wait`.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn get_when<T: Resource>(&self, name: &str, wait: &Wait) -> Result<T> {
        self.json(self.scoped::<T>(Call::get(&[T::KIND.plural(), name])).wait(Some(wait))).await
    }

    /// One page.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn list<T: Resource>(&self, params: &ListParams) -> Result<List<T>> {
        let query = Query::of(&self.params::<T>(params))?;
        self.json(Call::get(&[T::KIND.plural()]).query(query)).await
    }

    /// All pages, and the revision of the first: a watch from the next one misses nothing.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn list_all<T: Resource>(&self, params: &ListParams) -> Result<(Vec<T>, u64)> {
        let mut params = params.clone();
        params.limit.get_or_insert(PAGE_MAX);
        let first: List<T> = self.list(&params).await?;
        let (mut items, revision, mut next) = (first.items, first.revision, first.next);
        while let Some(after) = next {
            params.after = Some(after);
            let page: List<T> = self.list(&params).await?;
            items.extend(page.items);
            next = page.next;
        }
        Ok((items, revision))
    }

    /// # Errors
    /// As [`Client::get`].
    pub async fn watch<T: Resource>(&self, params: &ListParams) -> Result<Lines<WatchLine<T>>> {
        let params = ListParams { watch: Some(true), ..self.params::<T>(params) };
        let call = Call::get(&[T::KIND.plural()]).query(Query::of(&params)?);
        self.lines(call, T::KIND.plural()).await
    }

    pub(crate) async fn lines<T: DeserializeOwned>(
        &self,
        call: Call,
        what: &'static str,
    ) -> Result<Lines<T>> {
        let answer = self.stream(call).await?;
        Ok(Lines::new(self.shared.clone(), answer.into_body(), what))
    }

    pub(crate) async fn patch<T: Resource>(
        &self,
        name: &str,
        patch: &impl Serialize,
        if_match: Option<u64>,
    ) -> Result<T> {
        let call = Call::patch(&[T::KIND.plural(), name], patch, if_match)?;
        self.json(self.scoped::<T>(call)).await
    }

    pub(crate) fn deletion<T: Resource>(&self, name: &str, how: &Delete) -> Call {
        let call = Call::delete(&[T::KIND.plural(), name]).if_match(how.if_match).wait(how.wait.as_ref());
        let call = if how.force { call.with("force", "true") } else { call };
        self.scoped::<T>(call)
    }

    pub(crate) fn scoped<T: Resource>(&self, call: Call) -> Call {
        if T::IN_PROJECT { call.in_project_of(self) } else { call }
    }

    fn params<T: Resource>(&self, params: &ListParams) -> ListParams {
        let mut params = params.clone();
        if T::IN_PROJECT && params.project.is_none() {
            params.project = self.project().map(str::to_owned);
        }
        params
    }
}
