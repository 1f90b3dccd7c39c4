//! The services and controllers together, over a store in memory. Nodes are played by the tests.

mod access;
mod disks;
mod image;
mod node;
mod vm;
mod watch;

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::testing::TestCloud;

/// Long enough for any machine; a test ends as soon as its condition holds.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds, looking again after every change of the cloud.
async fn until(test: &TestCloud, what: &str, mut condition: impl FnMut() -> bool) {
    let mut applied = test.cloud.cache.applied();
    let look = async {
        loop {
            applied.borrow_and_update();
            if condition() {
                return;
            }
            let _ = tokio::time::timeout(Duration::from_millis(200), applied.changed()).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, look).await.is_ok(), "waited in vain: {what}");
}

/// Runs the controllers until the guard is dropped.
fn controllers(test: &TestCloud) -> tokio_util::sync::DropGuard {
    let stop = CancellationToken::new();
    test.cloud.run_controllers(stop.clone());
    stop.drop_guard()
}
