//! Operations: made by services, moved by controllers and reports, cancelled by people.

use std::sync::Arc;

use ostler_api::operation::{Operation, OperationPhase, OperationSpec, OperationStatus, Progress, Target};
use ostler_api::{ApiError, Fault, Kind, Metadata, Name, OperationId, Time};
use uuid::Uuid;

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::event::id_name;
use crate::permission::Verb;

/// A new operation on `target`.
pub(crate) fn begin(
    id: OperationId,
    project: Option<Name>,
    action: impl Into<String>,
    target: Target,
    phase: OperationPhase,
) -> Result<Operation, ApiError> {
    Ok(Operation {
        metadata: Metadata::new(id.into(), id_name(id.into())?, project),
        spec: OperationSpec { action: action.into(), target, cancel: false },
        status: OperationStatus {
            phase,
            progress: None,
            reason: None,
            finished: phase.is_final().then(Time::now),
        },
    })
}

/// How an operation moves.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Progress(Progress),
    Succeeded,
    Failed(Fault),
    Cancelled(Fault),
}

/// Plans a step of an operation. One that has ended stays as it ended; one that is gone is no fault.
pub(crate) fn advance(
    tables: &Tables,
    change: &mut Change,
    id: OperationId,
    step: Step,
) -> Result<(), ApiError> {
    let Some(old) = tables.operations.get(id.into()) else { return Ok(()) };
    if old.status.phase.is_final() {
        return Ok(());
    }
    let mut new = Operation::clone(old);
    let status = &mut new.status;
    match step {
        Step::Progress(progress) => {
            status.phase = OperationPhase::Running;
            status.progress = Some(progress);
        }
        Step::Succeeded => {
            status.phase = OperationPhase::Succeeded;
            status.reason = None;
            if let Some(progress) = &mut status.progress {
                progress.done = progress.total.unwrap_or(progress.done);
            }
        }
        Step::Failed(fault) => {
            status.phase = OperationPhase::Failed;
            status.reason = Some(fault);
        }
        Step::Cancelled(fault) => {
            status.phase = OperationPhase::Cancelled;
            status.reason = Some(fault);
        }
    }
    status.finished = status.phase.is_final().then(Time::now);
    change.update(old.as_ref(), &new)
}

impl Cloud {
    /// Asks an operation to stop. It ends as cancelled once what it did is undone; one that has ended stays so.
    pub async fn operation_cancel(
        &self,
        caller: &Caller,
        project: Option<&str>,
        id: &str,
    ) -> Result<Arc<Operation>, ApiError> {
        let id: Uuid = self
            .commit(|tables, change| {
                let old = self.find::<Operation>(tables, caller, Verb::Act, project, id)?;
                let id = old.metadata.id;
                if old.status.phase.is_final() || old.spec.cancel {
                    return Ok(id);
                }
                let fault = Fault::new("cancelled", "somebody asked to cancel it");
                match old.spec.target.kind {
                    Kind::Vm => crate::vm_act::cancel(tables, change, &old, fault)?,
                    Kind::Image => {
                        let mut new = Operation::clone(&old);
                        new.spec.cancel = true;
                        change.update(old.as_ref(), &new)?;
                    }
                    Kind::Volume => crate::volume_flatten::cancel(tables, change, &old, fault)?,
                    Kind::Snapshot
                    | Kind::Node
                    | Kind::Project
                    | Kind::Operation
                    | Kind::Event
                    | Kind::Token => {
                        return Err(ApiError::conflict("this operation cannot be cancelled"));
                    }
                }
                Ok(id)
            })
            .await?;
        self.image_cancel(id);
        self.get::<Operation>(caller, Some("*"), &id.to_string())
    }
}
