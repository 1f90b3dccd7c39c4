//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

/// A deadline that a loaded machine keeps too. Nothing is measured by it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(100);

/// Waits until `holds`; the panic says what never happened.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    wait_for(what, || holds().then_some(()));
}

/// Waits until there is a value.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    let mut pause = Duration::from_millis(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            begin.elapsed() < PATIENCE,
            "waited for {} s and it never happened: {what}",
            PATIENCE.as_secs()
        );
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}
