//! Small file chores that several modules share.

use std::fs::File;
use std::io;
use std::path::Path;

/// Makes a rename or creation in the directory of `path` durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// Runs blocking work on a thread of its own, so that a disk that hangs takes no place in a shared pool.
pub(crate) async fn on_own_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // The caller may have given up.
        let _ = done.send(work());
    })?;
    result.await.map_err(|_| io::Error::other("the thread that did the work panicked"))
}
