//! A child process that can do little: the files it needs and the system's programs and libraries (Landlock), no network
//! (its own empty network namespace, no TCP), no privileges to gain or to use, limits on memory, processor time, file
//! size and descriptors, a low priority, and death with its parent.
//!
//! What a kernel does not offer is left out, except the limits, which every kernel has.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// Folders of programs and libraries that a child may read and execute.
const SYSTEM: [&str; 8] =
    ["/usr", "/lib", "/lib64", "/bin", "/opt", "/nix/store", "/gnu/store", "/etc/ld.so.cache"];
/// Devices that libraries open at start.
const DEVICES: [&str; 3] = ["/dev/null", "/dev/urandom", "/dev/zero"];

/// Descriptors that a child may have, and those more for each file that it is given.
const FILES: u64 = 64;
const FILES_EACH: u64 = 4;

/// What a child may use.
#[derive(Debug, Clone)]
pub(super) struct Confinement {
    pub(super) read: Vec<PathBuf>,
    pub(super) write: Vec<PathBuf>,
    /// Largest file that it may write, in bytes.
    pub(super) file_size: u64,
    /// Address space in bytes.
    pub(super) address_space: u64,
    pub(super) cpu_seconds: u64,
}

/// Starts `program` confined, in a process group of its own, with pipes for its output. Must be called on a thread that
/// outlives the child, which dies with that thread.
pub(super) fn spawn(program: &Path, args: &[OsString], confinement: &Confinement) -> io::Result<Child> {
    let landlock = landlock::ruleset(program, confinement)?;
    let ruleset: Option<RawFd> = landlock.as_ref().map(AsRawFd::as_raw_fd);
    let limits = [
        (libc::RLIMIT_AS, confinement.address_space),
        (libc::RLIMIT_CPU, confinement.cpu_seconds),
        (libc::RLIMIT_FSIZE, confinement.file_size),
        (libc::RLIMIT_NOFILE, FILES + FILES_EACH * (confinement.read.len() + confinement.write.len()) as u64),
        (libc::RLIMIT_CORE, 0),
    ];
    let parent = std::process::id();
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    // SAFETY: the closure runs between fork and exec and makes only system calls on values prepared before; it
    // allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(move || confine(parent, &limits, ruleset));
    }
    command.spawn()
}

type Limit = (libc::__rlimit_resource_t, u64);

/// Runs in the child.
fn confine(parent: u32, limits: &[Limit], ruleset: Option<RawFd>) -> io::Result<()> {
    // SAFETY: plain system calls with integer arguments and pointers to live values on this stack.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        if libc::getppid() as u32 != parent {
            // The parent died before the signal was armed.
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        // As root directly, else inside a user namespace; where neither is allowed, Landlock still refuses TCP.
        if libc::unshare(libc::CLONE_NEWNET) != 0 {
            let _ = libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET);
        }
        for (resource, value) in limits {
            let limit = libc::rlimit { rlim_cur: *value, rlim_max: *value };
            check(libc::setrlimit(*resource, &limit))?;
        }
        let _ = libc::setpriority(libc::PRIO_PROCESS, 0, 10);
        // With an empty bounding set, root is an ordinary owner of its files after exec.
        for capability in 0..64 {
            let _ = libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
        }
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        if let Some(ruleset) = ruleset {
            check(libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0) as libc::c_int)?;
        }
    }
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

mod landlock {
    //! The three Landlock calls, for which the C library has no wrappers.

    use super::{
        AsRawFd, Confinement, DEVICES, File, FromRawFd, OpenOptionsExt, OsStrExt, OwnedFd, Path, SYSTEM, io,
    };

    const EXECUTE: u64 = 1 << 0;
    const WRITE_FILE: u64 = 1 << 1;
    const READ_FILE: u64 = 1 << 2;
    const READ_DIR: u64 = 1 << 3;
    const TRUNCATE: u64 = 1 << 14;
    /// Rights of the first version: bits 0 to 12.
    const FS_V1: u64 = (1 << 13) - 1;
    const FS_REFER_V2: u64 = 1 << 13;
    const FS_IOCTL_DEV_V5: u64 = 1 << 15;
    const NET_BIND_CONNECT_TCP_V4: u64 = 0b11;
    const CREATE_RULESET_VERSION: u32 = 1;
    const RULE_PATH_BENEATH: u32 = 1;

    #[repr(C)]
    struct RulesetAttr {
        handled_access_fs: u64,
        handled_access_net: u64,
    }

    #[repr(C, packed)]
    struct PathBeneathAttr {
        allowed_access: u64,
        parent_fd: i32,
    }

    /// Builds the rules; `None` where the kernel has no Landlock.
    pub(super) fn ruleset(program: &Path, confinement: &Confinement) -> io::Result<Option<OwnedFd>> {
        // SAFETY: asks for the version only; the null pointer goes with the length 0.
        let version = unsafe {
            libc::syscall(
                libc::SYS_landlock_create_ruleset,
                std::ptr::null::<RulesetAttr>(),
                0usize,
                CREATE_RULESET_VERSION,
            )
        };
        if version < 1 {
            return Ok(None);
        }
        let mut fs = FS_V1;
        for (since, right) in [(2, FS_REFER_V2), (3, TRUNCATE), (5, FS_IOCTL_DEV_V5)] {
            if version >= since {
                fs |= right;
            }
        }
        let net = if version >= 4 { NET_BIND_CONNECT_TCP_V4 } else { 0 };
        let attr = RulesetAttr { handled_access_fs: fs, handled_access_net: net };
        let size = if version >= 4 { size_of::<RulesetAttr>() } else { size_of::<u64>() };
        // SAFETY: `attr` lives through the call and `size` is at most its size.
        let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size, 0u32) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above returned a new descriptor that nobody else owns.
        let ruleset = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        for path in SYSTEM {
            allow(&ruleset, Path::new(path), EXECUTE | READ_FILE | READ_DIR, true)?;
        }
        for path in DEVICES {
            allow(&ruleset, Path::new(path), READ_FILE | WRITE_FILE, true)?;
        }
        allow(&ruleset, program, EXECUTE | READ_FILE, false)?;
        for path in &confinement.read {
            allow(&ruleset, path, READ_FILE, false)?;
        }
        for path in &confinement.write {
            allow(&ruleset, path, READ_FILE | WRITE_FILE | (fs & TRUNCATE), false)?;
        }
        Ok(Some(ruleset))
    }

    fn allow(ruleset: &OwnedFd, path: &Path, access: u64, optional: bool) -> io::Result<()> {
        let opened =
            std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path);
        let file: File = match opened {
            Ok(file) => file,
            Err(error) if optional && error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                let text = format!("{}: {error}", String::from_utf8_lossy(path.as_os_str().as_bytes()));
                return Err(io::Error::new(error.kind(), text));
            }
        };
        // Directories take every right, files only those that make sense for them.
        let allowed = if file.metadata()?.is_dir() { access } else { access & !READ_DIR };
        let attr = PathBeneathAttr { allowed_access: allowed, parent_fd: file.as_raw_fd() };
        // SAFETY: `attr` and both descriptors live through the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_landlock_add_rule,
                ruleset.as_raw_fd(),
                RULE_PATH_BENEATH,
                &raw const attr,
                0u32,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
