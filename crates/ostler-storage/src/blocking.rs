//! Blocking file work on threads of its own.
//!
//! A hung disk or network file system must cost one task and never a shared thread pool, so each piece of work gets its
//! own short-lived thread. The thread also outlives any child process that it starts, which a parent-death signal needs.

use std::thread;

use tokio::sync::oneshot;

/// Runs `work` on a new thread and waits for it. Dropping the future does not stop the work: pass it a cancellation
/// token when it is long.
pub(crate) async fn run<T, F>(name: &str, work: F) -> T
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let (sender, receiver) = oneshot::channel();
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            // The receiver is gone when the caller was cancelled; the result has no reader then.
            let _ = sender.send(work());
        })
        .expect("the system can start a thread");
    receiver.await.expect("the blocking work does not panic")
}
