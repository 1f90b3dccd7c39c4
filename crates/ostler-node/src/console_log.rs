//! Reads the log of a serial console: its end, and what is added, across rotation and restarts of the VM.

use std::io::SeekFrom;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

/// Most that is read at once.
const READ_MAX: u64 = 256 << 10;
/// Longest tail.
pub(crate) const TAIL_MAX: u64 = 8 << 20;

/// The last bytes of a log and, when it began anew a short while ago, of the one before.
pub(crate) async fn tail(path: &Path, bytes: u64) -> Vec<u8> {
    Follow::from_end(path, bytes).await.1
}

/// Where a log goes when it begins anew.
pub(crate) fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// The end of a file as it is now, with the file and its length.
async fn end_of(path: &Path, bytes: u64) -> std::io::Result<(Vec<u8>, File, u64)> {
    let mut file = File::open(path).await?;
    let length = file.metadata().await?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes))).await?;
    let mut end = Vec::new();
    // Not to the end of the file, which may grow as fast as it is read.
    (&mut file).take(bytes.min(length)).read_to_end(&mut end).await?;
    Ok((end, file, length))
}

/// Follows a log. The path may change between calls, since a log moves when its VM stops.
#[derive(Debug, Default)]
pub(crate) struct Follow {
    open: Option<(File, u64)>,
    /// Bytes of the open file that were read.
    read: u64,
}

impl Follow {
    /// Starts behind what the log has now, and returns the last `bytes` of that.
    pub(crate) async fn from_end(path: &Path, bytes: u64) -> (Self, Vec<u8>) {
        let bytes = bytes.min(TAIL_MAX);
        let mut follow = Self::default();
        let Ok((end, file, length)) = end_of(path, bytes).await else { return (follow, Vec::new()) };
        if let Ok(metadata) = file.metadata().await {
            follow = Self { open: Some((file, metadata.ino())), read: length };
        }
        let missing = bytes - end.len() as u64;
        let mut shown = match end_of(&older(path), missing).await {
            Ok((before, ..)) if missing > 0 => before,
            _ => return (follow, end),
        };
        shown.extend(end);
        (follow, shown)
    }

    /// What was added since the last call; empty when nothing was.
    pub(crate) async fn more(&mut self, path: &Path) -> std::io::Result<Vec<u8>> {
        let present = tokio::fs::metadata(path).await.ok().map(|metadata| metadata.ino());
        let mut added = Vec::new();
        if let Some((file, inode)) = &mut self.open {
            let length = file.metadata().await?.len();
            if length < self.read {
                self.read = 0;
            }
            file.seek(SeekFrom::Start(self.read)).await?;
            file.take(READ_MAX).read_to_end(&mut added).await?;
            self.read += added.len() as u64;
            // Switch only once the old one is read to its end.
            if !added.is_empty() || present.is_none_or(|present| present == *inode) {
                return Ok(added);
            }
        }
        if let Ok(file) = File::open(path).await {
            let inode = file.metadata().await?.ino();
            self.open = Some((file, inode));
            self.read = 0;
        }
        Ok(added)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn append(path: &Path, text: &str) {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    async fn next(follow: &mut Follow, path: &Path) -> String {
        for _ in 0..3 {
            let more = follow.more(path).await.unwrap();
            if !more.is_empty() {
                return String::from_utf8(more).unwrap();
            }
        }
        String::new()
    }

    #[tokio::test]
    async fn follows_through_rotation_and_a_move() {
        let dir = tempfile::tempdir().unwrap();
        let (live, kept) = (dir.path().join("live"), dir.path().join("kept"));
        append(&live, "one two three");
        let (mut follow, shown) = Follow::from_end(&live, 5).await;
        assert_eq!(shown, b"three");
        assert_eq!(next(&mut follow, &live).await, "");
        append(&live, " four");
        assert_eq!(next(&mut follow, &live).await, " four");

        // Rotated with something still unread in the old one.
        append(&live, " five");
        std::fs::rename(&live, older(&live)).unwrap();
        append(&live, "six");
        assert_eq!(next(&mut follow, &live).await, " five");
        assert_eq!(next(&mut follow, &live).await, "six");
        assert_eq!(tail(&live, 8).await, b" fivesix");

        // The VM stops: the same file under another path. It starts again: another file.
        std::fs::rename(&live, &kept).unwrap();
        assert_eq!(next(&mut follow, &kept).await, "");
        append(&live, "boot");
        assert_eq!(next(&mut follow, &live).await, "boot");
    }

    #[tokio::test]
    async fn a_log_that_is_not_there_yet_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (mut follow, shown) = Follow::from_end(&path, 100).await;
        assert!(shown.is_empty());
        assert_eq!(next(&mut follow, &path).await, "");
        append(&path, "boot");
        assert_eq!(next(&mut follow, &path).await, "boot");
    }
}
