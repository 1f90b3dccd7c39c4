//! Flattening: a volume is made to stand on nothing but itself, in the background, while it is used.

use std::sync::Arc;

use ostler_api::operation::{Accepted, Operation, OperationPhase, Progress};
use ostler_api::volume::{Volume, VolumePhase};
use ostler_api::{ApiError, ByteSize, Fault, OperationId};

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::event::target;
use crate::idempotency::{Idempotency, remember};
use crate::operation::{Step, advance, begin};
use crate::permission::Verb;
use crate::snapshot::{check_quiet, of_volume};

impl Cloud {
    /// Copies into a volume what it has from an image or a snapshot, so that it needs neither any more.
    pub async fn volume_flatten(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted<Arc<Volume>>, ApiError> {
        if let Some(made) = self.made_before(caller, idempotency.as_ref()).await? {
            return self.accepted(caller, made.id, made.operation);
        }
        let fresh = OperationId::new();
        let (id, operation) = self
            .commit(|tables, change| {
                let volume = self.find::<Volume>(tables, caller, Verb::Act, project, name)?;
                let id = volume.metadata.id;
                if let Some(under_way) = volume.status.flatten {
                    return Ok((id, Some(under_way)));
                }
                if volume.spec.image.is_none() && volume.spec.snapshot.is_none() {
                    return Ok((id, None));
                }
                if volume.status.phase != VolumePhase::Ready {
                    return Err(ApiError::conflict(format!("the volume is {}", volume.status.phase))
                        .hint("wait until it is ready: ostler volume show"));
                }
                check_quiet(tables, &volume)?;
                // What a snapshot holds would go on standing on the source.
                if let Some(snapshot) = of_volume(tables, id.into()).next() {
                    return Err(ApiError::conflict(format!(
                        "volume {} has snapshots, such as {}, which stand on what it came from",
                        volume.metadata.name, snapshot.metadata.name
                    ))
                    .hint("delete them first: ostler snapshot delete"));
                }
                let mut new = Volume::clone(&volume);
                new.status.flatten = Some(fresh);
                change.update(volume.as_ref(), &new)?;
                let project = volume.metadata.project.clone();
                let about = target(volume.as_ref());
                change.create(&begin(fresh, project, "volume.flatten", about, OperationPhase::Pending)?)?;
                remember(change, caller, idempotency.as_ref(), id, Some(fresh))?;
                Ok((id, Some(fresh)))
            })
            .await?;
        self.accepted(caller, id, operation)
    }
}

/// Takes back a flatten; what was copied already stays and does no harm.
pub(crate) fn cancel(
    tables: &Tables,
    change: &mut Change,
    operation: &Operation,
    fault: Fault,
) -> Result<(), ApiError> {
    let id = OperationId::from(operation.metadata.id);
    if let Some(volume) = tables.volumes.get(operation.spec.target.id) {
        if volume.status.flatten != Some(id) {
            return Err(ApiError::conflict(format!("a {} cannot be cancelled", operation.spec.action)));
        }
        let mut new = Volume::clone(volume);
        new.status.flatten = None;
        change.update(volume.as_ref(), &new)?;
    }
    advance(tables, change, id, Step::Cancelled(fault))
}

/// How a flatten went on, by its node.
pub(crate) enum Word<'a> {
    Progress(u64),
    Done(ByteSize),
    Failed(&'a Fault),
}

/// Writes down what the node said; nothing when it is not what is wanted any more.
pub(crate) fn heard(
    tables: &Tables,
    change: &mut Change,
    new: &mut Volume,
    operation: OperationId,
    word: &Word<'_>,
) -> Result<(), ApiError> {
    if new.status.flatten != Some(operation) {
        return Ok(());
    }
    let step = match word {
        Word::Progress(done) => {
            Step::Progress(Progress { stage: "copying".to_owned(), done: *done, total: Some(10_000) })
        }
        Word::Done(used) => {
            new.status.flatten = None;
            new.status.used = Some(*used);
            new.spec.image = None;
            new.spec.snapshot = None;
            Step::Succeeded
        }
        Word::Failed(fault) => {
            new.status.flatten = None;
            Step::Failed((*fault).clone())
        }
    };
    advance(tables, change, operation, step)
}
