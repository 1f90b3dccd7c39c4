//! What waits to be told to the control plane: the newest word on each VM and volume, sent at once and until it is
//! taken.
//!
//! VM and volume tasks put reports in; the agent's session takes them out in batches. An answer is never lost: a newer
//! observation of the same VM carries it along.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use ostler_api::work::{Report, Reports, TaskOutcome};
use parking_lot::Mutex;
use tokio::sync::Notify;
use uuid::Uuid;

/// Most reports in one request.
pub(crate) const BATCH_MAX: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Outbox {
    waiting: Mutex<BTreeMap<Uuid, Report>>,
    filled: Notify,
}

fn subject(report: &Report) -> Uuid {
    match report {
        Report::Vm(report) => report.vm.0,
        Report::Volume(report) => report.volume.0,
        Report::Snapshot(report) => report.snapshot.0,
    }
}

/// The newer of two reports on the same thing, with what the older one must not take to its grave.
fn merge(older: Report, newer: Report) -> Report {
    match (older, newer) {
        (Report::Vm(older), Report::Vm(mut newer)) => {
            if newer.observed.generation < older.observed.generation {
                newer.observed = older.observed;
            }
            newer.answer = match (older.answer, newer.answer) {
                (Some(old), None) => Some(old),
                // Progress that was overtaken by the end of the same task.
                (Some(old), Some(new))
                    if old.operation == new.operation
                        && old.action == new.action
                        && !matches!(old.outcome, TaskOutcome::Progress { .. })
                        && matches!(new.outcome, TaskOutcome::Progress { .. }) =>
                {
                    Some(old)
                }
                (_, new) => new,
            };
            Report::Vm(newer)
        }
        (Report::Volume(_) | Report::Vm(_) | Report::Snapshot(_), newer) => newer,
    }
}

impl Outbox {
    pub(crate) fn put(&self, report: Report) {
        let mut waiting = self.waiting.lock();
        match waiting.entry(subject(&report)) {
            Entry::Vacant(slot) => drop(slot.insert(report)),
            Entry::Occupied(mut slot) => {
                let merged = merge(slot.get().clone(), report);
                slot.insert(merged);
            }
        }
        drop(waiting);
        self.filled.notify_one();
    }

    /// Puts back what could not be sent, behind anything newer.
    pub(crate) fn put_back(&self, batch: Reports) {
        let mut waiting = self.waiting.lock();
        for report in batch.reports {
            match waiting.entry(subject(&report)) {
                Entry::Vacant(slot) => drop(slot.insert(report)),
                Entry::Occupied(mut slot) => {
                    let merged = merge(report, slot.get().clone());
                    slot.insert(merged);
                }
            }
        }
    }

    /// The next batch; none while nothing waits.
    pub(crate) fn take(&self) -> Option<Reports> {
        let mut waiting = self.waiting.lock();
        let mut reports = Vec::with_capacity(waiting.len().min(BATCH_MAX));
        while reports.len() < BATCH_MAX {
            match waiting.pop_first() {
                Some((_, report)) => reports.push(report),
                None => break,
            }
        }
        (!reports.is_empty()).then_some(Reports { reports })
    }

    /// Resolves once something may have been put in. Wakes one waiter.
    pub(crate) async fn filled(&self) {
        self.filled.notified().await;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.lock().is_empty()
    }
}

/// What went wrong is said with the ids that it is about.
pub(crate) fn describe(report: &Report) -> String {
    match report {
        Report::Vm(report) => format!("vm {}: {}", report.vm, report.observed.state),
        Report::Volume(report) => format!("volume {}", report.volume),
        Report::Snapshot(report) => format!("snapshot {}", report.snapshot),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ostler_api::vm::{MachineState, VmObserved};
    use ostler_api::work::{TaskAnswer, VmReport, VolumeReport, VolumeState};
    use ostler_api::{OperationId, Time, VmId, VolumeId};

    fn report(vm: VmId, generation: u64, answer: Option<(OperationId, TaskOutcome)>) -> Report {
        Report::Vm(Box::new(VmReport {
            vm,
            observed: VmObserved {
                generation,
                state: MachineState::Running,
                at: Time::now(),
                end: None,
                fault: None,
                facts: None,
            },
            answer: answer.map(|(operation, outcome)| TaskAnswer {
                operation,
                action: "start".to_owned(),
                outcome,
            }),
        }))
    }

    fn only(outbox: &Outbox) -> (u64, Option<TaskOutcome>) {
        let batch = outbox.take().unwrap();
        let [Report::Vm(report)] = &batch.reports[..] else { panic!("one VM report: {batch:?}") };
        (report.observed.generation, report.answer.clone().map(|answer| answer.outcome))
    }

    fn progress() -> TaskOutcome {
        TaskOutcome::Progress { stage: "saving".to_owned(), done: 1, total: None }
    }

    #[test]
    fn a_newer_observation_carries_the_unsent_answer() {
        let (outbox, vm, operation) = (Outbox::default(), VmId::new(), OperationId::new());
        outbox.put(report(vm, 1, Some((operation, progress()))));
        outbox.put(report(vm, 2, Some((operation, TaskOutcome::Done))));
        outbox.put(report(vm, 3, Some((operation, progress()))));
        outbox.put(report(vm, 4, None));
        assert_eq!(only(&outbox), (4, Some(TaskOutcome::Done)));
        assert!(outbox.is_empty());
    }

    #[test]
    fn what_is_put_back_comes_behind_what_came_meanwhile() {
        let (outbox, vm, first, second) =
            (Outbox::default(), VmId::new(), OperationId::new(), OperationId::new());
        outbox.put(report(vm, 1, Some((first, TaskOutcome::Done))));
        let lost = outbox.take().unwrap();
        outbox.put(report(vm, 2, None));
        outbox.put_back(lost);
        assert_eq!(only(&outbox), (2, Some(TaskOutcome::Done)));

        outbox.put(report(vm, 3, Some((first, TaskOutcome::Done))));
        let lost = outbox.take().unwrap();
        outbox.put(report(vm, 4, Some((second, progress()))));
        outbox.put_back(lost);
        assert_eq!(only(&outbox), (4, Some(progress())));
    }

    #[tokio::test]
    async fn batches_are_bounded_and_the_waiter_is_woken() {
        let outbox = Outbox::default();
        for _ in 0..BATCH_MAX + 1 {
            let volume = VolumeId::new();
            outbox.put(Report::Volume(VolumeReport { volume, state: VolumeState::Gone }));
        }
        outbox.filled().await;
        assert_eq!(outbox.take().unwrap().reports.len(), BATCH_MAX);
        assert_eq!(outbox.take().unwrap().reports.len(), 1);
        assert_eq!(outbox.take(), None);
    }
}
