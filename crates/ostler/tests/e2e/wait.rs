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
    poll(what, || look().ok_or_else(String::new))
}

/// Waits until `look` finds nothing; the panic says what it found last.
pub(crate) fn calm(what: &str, mut look: impl FnMut() -> Vec<String>) {
    poll(what, || {
        let found = look();
        if found.is_empty() { Ok(()) } else { Err(format!(": {found:?}")) }
    });
}

fn poll<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let begin = Instant::now();
    let mut pause = Duration::from_millis(10);
    loop {
        let why = match look() {
            Ok(found) => return found,
            Err(why) => why,
        };
        let patience = PATIENCE.as_secs();
        assert!(begin.elapsed() < PATIENCE, "waited for {patience} s and it never happened: {what}{why}");
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}
