//! What a test makes go wrong.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use uuid::Uuid;

/// The operations that can be delayed, failed or hung.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SimOperation {
    Probe,
    Start,
    Survey,
    Forget,
    Kill,
    State,
    Pause,
    Resume,
    Reset,
    Powerdown,
    Save,
    Quit,
    Console,
    Vnc,
    RotateLog,
    Balloon,
    Disks,
    DiskAttach,
    DiskDetach,
    DiskResize,
    DiskLimits,
    DiskSnapshot,
    DiskStream,
    DiskCommit,
}

#[derive(Debug, Default)]
pub(super) struct Faults {
    rules: Mutex<Rules>,
}

#[derive(Debug, Default)]
struct Rules {
    delays: HashMap<SimOperation, Duration>,
    failures: HashMap<(SimOperation, Option<Uuid>), Failure>,
    hanging: HashMap<(SimOperation, Option<Uuid>), ()>,
}

#[derive(Debug)]
struct Failure {
    left: u32,
    message: String,
}

impl Faults {
    pub(super) fn set_delay(&self, operation: SimOperation, delay: Duration) {
        self.rules.lock().delays.insert(operation, delay);
    }

    pub(super) fn fail(&self, operation: SimOperation, id: Option<Uuid>, times: u32, message: String) {
        self.rules.lock().failures.insert((operation, id), Failure { left: times, message });
    }

    pub(super) fn set_hanging(&self, operation: SimOperation, id: Option<Uuid>, hanging: bool) {
        let mut rules = self.rules.lock();
        if hanging {
            rules.hanging.insert((operation, id), ());
        } else {
            rules.hanging.remove(&(operation, id));
        }
    }

    pub(super) fn clear(&self) {
        *self.rules.lock() = Rules::default();
    }

    /// Called as each operation begins: waits as long as the test wants, then says whether the operation fails.
    pub(super) async fn meet(&self, operation: SimOperation, id: Option<Uuid>) -> Result<(), String> {
        let (hangs, delay, failure) = self.rules.lock().apply(operation, id);
        if hangs {
            std::future::pending::<()>().await;
        }
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        failure.map_or(Ok(()), Err)
    }
}

impl Rules {
    fn apply(
        &mut self,
        operation: SimOperation,
        id: Option<Uuid>,
    ) -> (bool, Option<Duration>, Option<String>) {
        if self.delays.is_empty() && self.failures.is_empty() && self.hanging.is_empty() {
            return (false, None, None);
        }
        let targets = [(operation, None), (operation, id)];
        let hangs = targets.iter().any(|target| self.hanging.contains_key(target));
        let failure = targets.iter().find_map(|target| {
            let failure = self.failures.get_mut(target).filter(|failure| failure.left > 0)?;
            failure.left -= 1;
            Some(failure.message.clone())
        });
        (hangs, self.delays.get(&operation).copied(), failure)
    }
}
