//! One run of a confined program: its output bounded, its progress heard, its time limited, and nothing of it left
//! behind.

use std::{
    ffi::OsString,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd},
    process::{Child, ExitStatus},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::OFlags,
    process::{Pid, PidfdFlags, Signal},
};
use tokio_util::sync::CancellationToken;

use super::{QemuImg, ToolError, sandbox::Confinement};

/// How often a cancelled token is looked at.
const TICK: Duration = Duration::from_millis(50);

/// What to run.
#[derive(Debug)]
pub(super) struct Job {
    /// For messages: "convert", "check".
    pub(super) action: &'static str,
    pub(super) args: Vec<OsString>,
    pub(super) read: Vec<std::path::PathBuf>,
    pub(super) write: Vec<std::path::PathBuf>,
    pub(super) file_size: u64,
}

/// What came out, each stream cut at the limit.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) status: ExitStatus,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: Vec<u8>,
}

/// Runs a job to its end on the calling thread. `heard` gets each piece of standard output as it comes.
pub(super) fn run(
    tool: &QemuImg,
    job: &Job,
    cancel: &CancellationToken,
    heard: &mut dyn FnMut(&[u8]),
) -> Result<Output, ToolError> {
    let failed = |source| ToolError::Io { action: job.action, source };
    if !tool.program.exists() {
        return Err(ToolError::Missing { program: tool.program.clone() });
    }
    let confinement = Confinement {
        read: job.read.clone(),
        write: job.write.clone(),
        file_size: job.file_size,
        address_space: tool.limits.address_space,
        cpu_seconds: tool.limits.cpu.as_secs().max(1),
    };
    let child = super::sandbox::spawn(&tool.program, &job.args, &confinement).map_err(failed)?;
    let mut group = Group { child };
    let deadline = Instant::now() + tool.limits.deadline;
    let mut stdout = Pipe::new(group.child.stdout.take().expect("stdout is a pipe"), tool.limits.output)
        .map_err(failed)?;
    let mut stderr = Pipe::new(group.child.stderr.take().expect("stderr is a pipe"), tool.limits.output)
        .map_err(failed)?;
    let pid = Pid::from_child(&group.child);
    let pidfd =
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| failed(errno.into()))?;
    loop {
        if cancel.is_cancelled() {
            return Err(ToolError::Cancelled);
        }
        if Instant::now() >= deadline {
            return Err(ToolError::TimedOut { action: job.action, seconds: tool.limits.deadline.as_secs() });
        }
        let ended = wait(&stdout, &stderr, pidfd.as_fd()).map_err(failed)?;
        stdout.drain(heard).map_err(failed)?;
        stderr.drain(&mut |_| {}).map_err(failed)?;
        if ended {
            break;
        }
    }
    let status = group.child.wait().map_err(failed)?;
    Ok(Output { status, stdout: stdout.kept, stderr: stderr.kept })
}

/// Waits for output, the end of the process or the next tick. True when the process has ended.
fn wait(stdout: &Pipe<impl AsFd>, stderr: &Pipe<impl AsFd>, pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut fds = vec![PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    for (open, fd) in [(stdout.open, stdout.stream.as_fd()), (stderr.open, stderr.stream.as_fd())] {
        if open {
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
    }
    let tick = Timespec::try_from(TICK).expect("a tick fits");
    match rustix::event::poll(&mut fds, Some(&tick)) {
        Ok(_) => Ok(!fds[0].revents().is_empty()),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// One output stream: read to its end, kept up to a limit.
struct Pipe<R> {
    stream: R,
    kept: Vec<u8>,
    limit: usize,
    open: bool,
}

impl<R: Read + AsFd> Pipe<R> {
    fn new(stream: R, limit: usize) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&stream)?;
        rustix::fs::fcntl_setfl(&stream, flags | OFlags::NONBLOCK)?;
        Ok(Self { stream, kept: Vec::new(), limit, open: true })
    }

    fn drain(&mut self, heard: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let mut buf = [0u8; 8192];
        while self.open {
            match self.stream.read(&mut buf) {
                Ok(0) => self.open = false,
                Ok(read) => {
                    heard(&buf[..read]);
                    let room = (self.limit - self.kept.len()).min(read);
                    self.kept.extend_from_slice(&buf[..room]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The child and whatever it started, killed and reaped when dropped.
struct Group {
    child: Child,
}

impl Drop for Group {
    fn drop(&mut self) {
        // Reaped already when the run ended well: then the id may be someone else's, so it is not signalled.
        if let Ok(None) = self.child.try_wait() {
            let _ = rustix::process::kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}
