//! The traffic log of one machine: `qmp.log` in its run directory, capped, with one older file kept.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags, openat, renameat};

const MAX_FILE: u64 = 1 << 20;
/// Of one message; the longest that are of interest (a device, a status) are far shorter.
const MAX_LINE: usize = 2048;

#[derive(Debug, Clone, Copy)]
pub enum Direction {
    Sent,
    Received,
}

/// Writing the log is best effort: a full disk must not keep a machine from being managed.
#[derive(Debug)]
pub struct TrafficLog {
    dir: Option<Arc<OwnedFd>>,
    file: Option<File>,
    size: u64,
}

impl TrafficLog {
    pub fn open(dir: Arc<OwnedFd>) -> Self {
        let mut log = Self { dir: Some(dir), file: None, size: 0 };
        log.reopen();
        log
    }

    /// A log that keeps nothing.
    pub fn off() -> Self {
        Self { dir: None, file: None, size: 0 }
    }

    fn reopen(&mut self) {
        let Some(dir) = &self.dir else { return };
        let flags = OFlags::CREATE | OFlags::APPEND | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        self.file = openat(dir, "qmp.log", flags, Mode::RUSR | Mode::WUSR).ok().map(File::from);
        self.size = self.file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |data| data.len());
    }

    pub fn record(&mut self, direction: Direction, message: &[u8]) {
        let Some(file) = &mut self.file else { return };
        let line = line(SystemTime::now(), direction, message);
        if file.write_all(line.as_bytes()).is_err() {
            return;
        }
        self.size += line.len() as u64;
        let Some(dir) = &self.dir else { return };
        if self.size > MAX_FILE && renameat(dir, "qmp.log", dir, "qmp.log.1").is_ok() {
            self.reopen();
        }
    }
}

fn line(now: SystemTime, direction: Direction, message: &[u8]) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let arrow = match direction {
        Direction::Sent => '>',
        Direction::Received => '<',
    };
    let shown = String::from_utf8_lossy(&message[..message.len().min(MAX_LINE)]);
    let more = match message.len().saturating_sub(MAX_LINE) {
        0 => String::new(),
        left_out => format!("… {left_out} more bytes"),
    };
    format!("{}.{:03} {arrow} {}{more}\n", since.as_secs(), since.subsec_millis(), shown.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_are_shortened() {
        let text = line(UNIX_EPOCH, Direction::Sent, &vec![b'x'; MAX_LINE + 5]);
        assert!(text.starts_with("0.000 > xxx") && text.ends_with("x… 5 more bytes\n"), "{text}");
    }

    #[test]
    fn the_file_is_rotated_before_it_grows_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let fd = Arc::new(OwnedFd::from(File::open(dir.path()).unwrap()));
        let mut log = TrafficLog::open(fd);
        for _ in 0..1200 {
            log.record(Direction::Received, &[b'y'; 1000]);
        }
        let size = |name| std::fs::metadata(dir.path().join(name)).unwrap().len();
        assert!(size("qmp.log") < MAX_FILE && size("qmp.log.1") <= MAX_FILE + 4096);
    }
}
