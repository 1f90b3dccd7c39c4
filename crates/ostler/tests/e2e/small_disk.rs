//! A small file system of its own, to fill; needs root.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one over this directory. None where that is not permitted.
    pub(crate) fn over(dir: &Path, size: &str) -> Option<Self> {
        fs::create_dir_all(dir).unwrap();
        let options = format!("size={size}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir).output();
        mount.is_ok_and(|output| output.status.success()).then(|| Self(dir.to_owned()))
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Takes all of the room but `left` bytes.
    pub(crate) fn fill(&self, left: u64) {
        let stat = rustix::fs::statvfs(&self.0).unwrap();
        let free = stat.f_bavail * stat.f_frsize;
        fs::write(self.filler(), vec![1; free.saturating_sub(left) as usize]).unwrap();
    }

    pub(crate) fn make_room(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: what of a failed test still has a file open there ends on its own.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
