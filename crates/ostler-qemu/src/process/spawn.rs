//! Starting QEMU so that it is alone: its own session, only the descriptors it was given, no rights, no way to get any.
//!
//! Everything between fork and exec is plain system calls: the child is a copy of one thread of a threaded process, so
//! it may neither allocate nor take a lock.

use std::ffi::{CStr, CString};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::pipe::{PipeFlags, pipe_with};

use super::lock::whole_file;
use super::pidfd::Pidfd;
use crate::args::FIRST_FD;

/// What a child gets.
#[derive(Debug)]
pub(crate) struct ChildSetup<'a> {
    pub(crate) program: &'a CStr,
    pub(crate) argv: &'a [CString],
    pub(crate) stdin: BorrowedFd<'a>,
    /// Standard output and error.
    pub(crate) output: BorrowedFd<'a>,
    /// The nth becomes `FIRST_FD + n`.
    pub(crate) inherit: &'a [BorrowedFd<'a>],
    /// Which of `inherit` is the file whose lock the child takes.
    pub(crate) lock_index: Option<usize>,
    /// The working directory; its lock is held on until exec.
    pub(crate) dir: BorrowedFd<'a>,
    pub(crate) user: Option<Identity>,
    /// For helpers, never for machines: killed when the thread that spawned it ends.
    pub(crate) dies_with_us: bool,
}

/// Whom the child becomes: a user and a group of the same number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    /// The one further group, for a device that QEMU opens itself (`/dev/kvm`).
    pub(crate) group: Option<u32>,
}

/// What the child was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    Fork = 0,
    Session,
    Descriptors,
    Lock,
    Limits,
    Directory,
    User,
    Capabilities,
    NoNewPrivileges,
    Exec,
}

impl Step {
    const ALL: [Self; 10] = [
        Self::Fork,
        Self::Session,
        Self::Descriptors,
        Self::Lock,
        Self::Limits,
        Self::Directory,
        Self::User,
        Self::Capabilities,
        Self::NoNewPrivileges,
        Self::Exec,
    ];

    pub(crate) fn describe(self) -> &'static str {
        match self {
            Self::Fork => "starting a process",
            Self::Session => "making a session of its own for QEMU",
            Self::Descriptors => "handing QEMU its descriptors",
            Self::Lock => "taking the machine's lock",
            Self::Limits => "setting QEMU's limits",
            Self::Directory => "entering the run directory",
            Self::User => "changing to QEMU's user",
            Self::Capabilities => "giving up capabilities",
            Self::NoNewPrivileges => "forbidding new privileges",
            Self::Exec => "executing QEMU",
        }
    }
}

#[derive(Debug)]
pub(crate) struct SpawnError {
    pub(crate) step: Step,
    pub(crate) source: io::Error,
}

const MAX_OPEN_FILES: libc::rlim_t = 8192;

/// Forks and executes. Returns when the program runs (and so holds its lock), or says which step failed. Blocks for as
/// long as the fork and the exec take.
pub(crate) fn spawn(setup: &ChildSetup<'_>) -> Result<Pidfd, SpawnError> {
    let failed = |step| move |source| SpawnError { step, source };
    let (reader, writer) =
        pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from).map_err(failed(Step::Fork))?;
    let mut argv: Vec<*const libc::c_char> = setup.argv.iter().map(|arg| arg.as_ptr()).collect();
    argv.push(std::ptr::null());
    let environment =
        [c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".as_ptr(), c"LC_ALL=C".as_ptr(), std::ptr::null()];
    let inherit: Vec<RawFd> = setup.inherit.iter().map(AsRawFd::as_raw_fd).collect();
    // Room for the child to move descriptors through, so that it need not allocate.
    let mut moved = vec![-1; inherit.len() + 5];
    // SAFETY: a system call without arguments.
    let our_pid = unsafe { libc::getpid() };

    // SAFETY: the child runs only `child`, which makes system calls and then executes or exits.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(failed(Step::Fork)(io::Error::last_os_error())),
        0 => {
            let fds = Inherited {
                stdin: setup.stdin.as_raw_fd(),
                output: setup.output.as_raw_fd(),
                inherit: &inherit,
                dir: setup.dir.as_raw_fd(),
                report: writer.as_raw_fd(),
                parent: our_pid,
            };
            // SAFETY: this is the child, a single thread; all pointers were made before the fork and end with null.
            unsafe { child(setup, &fds, &mut moved, argv.as_ptr(), environment.as_ptr()) }
        }
        pid => {
            drop(writer);
            adopt_child(u32::try_from(pid).expect("pids are positive"), reader)
        }
    }
}

fn adopt_child(pid: u32, report: OwnedFd) -> Result<Pidfd, SpawnError> {
    // Nobody else reaps this child, so the pid is still its own.
    let pidfd = Pidfd::open(pid);
    let mut bytes = Vec::with_capacity(5);
    let read = std::fs::File::from(report).take(5).read_to_end(&mut bytes);
    let outcome = match (pidfd, read, bytes.as_slice()) {
        (Ok(pidfd), Ok(_), []) => return Ok(pidfd),
        (Err(error), ..) | (_, Err(error), _) => SpawnError { step: Step::Fork, source: error },
        (Ok(_), Ok(_), [step, errno @ ..]) => {
            let step = Step::ALL.into_iter().find(|known| *known as u8 == *step).unwrap_or(Step::Fork);
            let errno = errno.try_into().map_or(0, i32::from_ne_bytes);
            SpawnError { step, source: io::Error::from_raw_os_error(errno) }
        }
    };
    // SAFETY: the child is ours and not reaped yet; killing one that already exits changes nothing.
    unsafe {
        libc::kill(pid as libc::pid_t, libc::SIGKILL);
        libc::waitpid(pid as libc::pid_t, std::ptr::null_mut(), 0);
    }
    Err(outcome)
}

struct Inherited<'a> {
    stdin: RawFd,
    output: RawFd,
    inherit: &'a [RawFd],
    dir: RawFd,
    report: RawFd,
    parent: libc::pid_t,
}

/// # Safety
/// Only in a freshly forked child; the pointer arrays must end with null.
unsafe fn child(
    setup: &ChildSetup<'_>,
    fds: &Inherited<'_>,
    moved: &mut [RawFd],
    argv: *const *const libc::c_char,
    environment: *const *const libc::c_char,
) -> ! {
    // Until it has moved, failures go to where the pipe was.
    let mut report = fds.report;
    // SAFETY: system calls on values that outlive the call; see the function's contract.
    let step = unsafe {
        'failed: {
            reset_signals();
            if setup.dies_with_us {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                // It may have died before it could be arranged.
                if libc::getppid() != fds.parent {
                    libc::_exit(127);
                }
            }
            if libc::setsid() == -1 {
                break 'failed Step::Session;
            }
            match place_descriptors(fds, moved) {
                Some((new_dir, new_report)) => {
                    report = new_report;
                    if libc::fchdir(new_dir) == -1 {
                        break 'failed Step::Directory;
                    }
                }
                None => break 'failed Step::Descriptors,
            }
            // Only now: closing any other descriptor of the file would drop the lock again.
            let lock = whole_file();
            if let Some(index) = setup.lock_index
                && libc::fcntl(FIRST_FD + index as RawFd, libc::F_SETLK, &raw const lock) == -1
            {
                break 'failed Step::Lock;
            }
            libc::umask(0o077);
            if !limit(libc::RLIMIT_CORE, 0) || !limit(libc::RLIMIT_NOFILE, MAX_OPEN_FILES) {
                break 'failed Step::Limits;
            }
            if !drop_bounding_set() {
                break 'failed Step::Capabilities;
            }
            if let Some(user) = setup.user
                && !become_user(user)
            {
                break 'failed Step::User;
            }
            if !drop_capabilities() {
                break 'failed Step::Capabilities;
            }
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == -1 {
                break 'failed Step::NoNewPrivileges;
            }
            libc::execve(setup.program.as_ptr(), argv, environment);
            Step::Exec
        }
    };
    // SAFETY: `errno` is this thread's; the buffer is on the stack.
    unsafe {
        let errno = (*libc::__errno_location()).to_ne_bytes();
        let message = [step as u8, errno[0], errno[1], errno[2], errno[3]];
        libc::write(report, message.as_ptr().cast(), message.len());
        libc::_exit(127)
    }
}

/// # Safety
/// Only in a freshly forked child.
unsafe fn reset_signals() {
    // SAFETY: plain system calls on zeroed structs of the right types.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
        }
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Moves every descriptor to its number and closes all others. Returns where the run directory and the report pipe are;
/// both close at exec.
///
/// # Safety
/// Only in a freshly forked child. `moved` has room for five more than `fds.inherit`.
unsafe fn place_descriptors(fds: &Inherited<'_>, moved: &mut [RawFd]) -> Option<(RawFd, RawFd)> {
    let first_free = FIRST_FD + fds.inherit.len() as RawFd;
    let (dir_at, report_at) = (first_free, first_free + 1);
    // SAFETY: system calls on descriptor numbers only.
    unsafe {
        // First out of the way, then into place: the numbers overlap.
        let sources = [fds.stdin, fds.output, fds.output].into_iter().chain(fds.inherit.iter().copied());
        let sources = sources.chain([fds.dir, fds.report]);
        for (place, source) in moved.iter_mut().zip(sources) {
            *place = libc::fcntl(source, libc::F_DUPFD_CLOEXEC, report_at + 1);
            if *place == -1 {
                return None;
            }
        }
        for (target, source) in moved.iter().enumerate() {
            let target = target as RawFd;
            let flags = if target >= dir_at { libc::O_CLOEXEC } else { 0 };
            if libc::dup3(*source, target, flags) == -1 {
                return None;
            }
        }
        if libc::syscall(libc::SYS_close_range, report_at + 1, u32::MAX, 0) == -1 {
            return None;
        }
    }
    Some((dir_at, report_at))
}

/// # Safety
/// Only in a freshly forked child.
unsafe fn limit(resource: libc::__rlimit_resource_t, most: libc::rlim_t) -> bool {
    // SAFETY: system calls on a struct on the stack.
    unsafe {
        let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        if libc::getrlimit(resource, &raw mut now) == -1 {
            return false;
        }
        let most = most.min(now.rlim_max);
        libc::setrlimit(resource, &libc::rlimit { rlim_cur: most, rlim_max: most }) == 0
    }
}

/// Empties the set of capabilities that exec could ever give. An agent without the right to do so has none to give.
///
/// # Safety
/// Only in a freshly forked child.
unsafe fn drop_bounding_set() -> bool {
    // SAFETY: prctl with integers.
    unsafe {
        for capability in 0..64 {
            if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) == -1 {
                return matches!(*libc::__errno_location(), libc::EINVAL | libc::EPERM);
            }
        }
    }
    true
}

/// # Safety
/// Only in a freshly forked child: the raw calls change this thread alone, which is then all of the process.
unsafe fn become_user(user: Identity) -> bool {
    // SAFETY: system calls with integers and a list of at most one.
    unsafe {
        libc::syscall(libc::SYS_setgroups, user.group.as_slice().len(), user.group.as_slice().as_ptr()) == 0
            && libc::syscall(libc::SYS_setresgid, user.uid, user.uid, user.uid) == 0
            && libc::syscall(libc::SYS_setresuid, user.uid, user.uid, user.uid) == 0
    }
}

/// # Safety
/// Only in a freshly forked child.
unsafe fn drop_capabilities() -> bool {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: VERSION_3, pid: 0 };
    let none = [const { Data { effective: 0, permitted: 0, inheritable: 0 } }; 2];
    // SAFETY: the structs are laid out as the kernel's, version 3 takes two of the second.
    unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) == 0
    }
}
