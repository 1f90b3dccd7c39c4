//! What the tests share: running the real `qemu-img`, small disks, a file system that is quickly full.

use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use ostler_storage::{ProbeLimits, ProbedImage, Refusal, probe};
use sha2::{Digest, Sha256};

pub(crate) const MIB: usize = 1 << 20;

/// Runs `qemu-img` as a test's own tool and returns what it wrote.
pub(crate) fn qemu_img(args: &[&str]) -> Vec<u8> {
    let output = Command::new("qemu-img").args(args).output().expect("the package qemu-utils is installed");
    assert!(output.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Runs commands on a volume's layer as a guest would.
pub(crate) fn qemu_io(layer: &Path, commands: &[&str]) {
    let output = qemu_io_run(layer, commands.iter().copied());
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && !text.contains("failed"), "qemu-io {commands:?}: {text}");
}

/// Waits until no process that was killed holds QEMU's lock on a layer in this folder. The locks go with the files of a
/// process, and those go after its arguments, by which `nothing_runs_on` looks for it.
pub(crate) fn nothing_is_locked_in(folder: &Path) {
    let deadline = Instant::now() + Duration::from_secs(20);
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        while path.extension().is_some_and(|extension| extension == "qcow2")
            && String::from_utf8_lossy(&qemu_io_run(&path, ["quit"].into_iter()).stderr).contains("lock")
        {
            assert!(Instant::now() < deadline, "{} stays locked", path.display());
        }
    }
}

/// Whether all these `read -P` commands find their pattern.
pub(crate) fn qemu_io_reads(layer: &Path, reads: &[String]) -> bool {
    let output = qemu_io_run(layer, std::iter::once("-r").chain(reads.iter().map(String::as_str)));
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success() && !text.contains("failed") && text.matches("read ").count() == reads.len()
}

fn qemu_io_run<'a>(layer: &Path, commands: impl Iterator<Item = &'a str>) -> std::process::Output {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "qcow2"]);
    for text in commands {
        match text {
            "-r" => command.arg("-r"),
            text => command.args(["-c", text]),
        };
    }
    command.arg(layer).output().expect("the package qemu-utils is installed")
}

/// Waits until no process has this folder among its arguments.
pub(crate) fn nothing_runs_on(dir: &Path) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let needle = dir.to_str().unwrap().as_bytes();
    loop {
        let running = fs::read_dir("/proc").unwrap().any(|entry| {
            let command = fs::read(entry.unwrap().path().join("cmdline")).unwrap_or_default();
            command.windows(needle.len()).any(|window| window == needle)
        });
        if !running {
            return;
        }
        assert!(Instant::now() < deadline, "a process of the killed one is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn sha256(path: &Path) -> String {
    hex(&Sha256::digest(fs::read(path).unwrap()))
}

/// A disk with something at both ends and in the middle, and a lot of zeroes.
pub(crate) fn disk(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for (seed, at) in [(1u8, 0), (2, size / 2), (3, size - 4096)] {
        for (index, byte) in bytes[at..at + 4096].iter_mut().enumerate() {
            *byte = (index as u8).wrapping_mul(31).wrapping_add(seed);
        }
    }
    bytes
}

/// Makes an image of `content` with `qemu-img convert`.
pub(crate) fn image(dir: &Path, content: &[u8], format: &str, options: &[&str]) -> PathBuf {
    let raw = dir.join("content.raw");
    fs::write(&raw, content).unwrap();
    let path = dir.join(format!("image-{}.{format}", uuid::Uuid::new_v4().simple()));
    let mut args = vec!["convert", "-f", "raw", "-O", format];
    for option in options {
        args.extend(["-o", option]);
    }
    args.extend([raw.to_str().unwrap(), path.to_str().unwrap()]);
    qemu_img(&args);
    path
}

pub(crate) fn probe_bytes(bytes: &[u8]) -> Result<ProbedImage, Refusal> {
    probe(&mut Cursor::new(bytes), &ProbeLimits::default())
}

pub(crate) fn probe_file(path: &Path) -> Result<ProbedImage, Refusal> {
    probe(&mut fs::File::open(path).unwrap(), &ProbeLimits::default())
}

/// A small file system in memory, for root only; unmounted when dropped.
pub(crate) struct Tmpfs {
    dir: tempfile::TempDir,
}

impl Tmpfs {
    /// `None` when this user may not mount: the test then has nothing to say.
    pub(crate) fn mount(size: usize) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let option = format!("size={size},mode=700");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(dir.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self { dir }),
            Ok(output) => {
                eprintln!("no tmpfs here: {}", String::from_utf8_lossy(&output.stderr));
                None
            }
            Err(error) => {
                eprintln!("no tmpfs here: {error}");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Waits until this many bytes are free.
    pub(crate) fn wait_until_free(&self, bytes: usize) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let stat = rustix::fs::statvfs(self.dir.path()).unwrap();
            if stat.f_bavail * stat.f_frsize >= bytes as u64 {
                return;
            }
            assert!(Instant::now() < deadline, "the room does not come back");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.dir.path()).status();
    }
}

/// Bytes that do not compress, the same each time.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
