//! From a machine's description to a QEMU process: opens its files, binds its sockets, writes its record, spawns.
//!
//! Runs on a thread of its own, since opening a file on a dead file server can take for ever.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::probe::Capabilities;
use super::users::Users;
use crate::args::{FdUse, HostFacts, Limits, made_places, plan};
use crate::config::QemuConfig;
use crate::error::{Error, StartError};
use crate::firmware;
use crate::process::pidfd::Pidfd;
use crate::process::spawn::{ChildSetup, Identity, SpawnError, Step, spawn};
use crate::rundir::{CONSOLE_LOG, CONSOLE_SOCKET, QEMU_LOG, QMP_SOCKET, Record, RunDir};
use crate::spec::{Accelerator, DiskSpec, Firmware, MachineSpec, NicBackend, StartOptions};

/// What a launch needs beside the machine itself.
#[derive(Debug)]
pub(super) struct LaunchContext {
    pub(super) config: QemuConfig,
    pub(super) users: Users,
}

/// A process that executes QEMU and holds the machine's lock.
#[derive(Debug)]
pub(super) struct Launched {
    pub(super) dir: RunDir,
    pub(super) record: Record,
    pub(super) pidfd: Pidfd,
    /// Connected; QEMU accepts it when it gets there.
    pub(super) qmp: UnixStream,
    pub(super) limits: Vec<Limits>,
    pub(super) restore_from: Option<Arc<OwnedFd>>,
}

/// Whether a launch may still begin. The caller takes the permission back when it runs out of patience.
#[derive(Debug, Default)]
pub(super) struct Permission(Mutex<PermissionState>);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum PermissionState {
    #[default]
    Open,
    Used,
    Withdrawn,
}

impl Permission {
    /// False when the process has been spawned already.
    pub(super) fn withdraw(&self) -> bool {
        let mut state = self.0.lock();
        if *state == PermissionState::Open {
            *state = PermissionState::Withdrawn;
        }
        *state == PermissionState::Withdrawn
    }

    fn take(&self) -> bool {
        let mut state = self.0.lock();
        if *state == PermissionState::Open {
            *state = PermissionState::Used;
        }
        *state == PermissionState::Used
    }
}

/// Launches. Refused when the machine lives; blocks while another launch of it is under way.
pub(super) fn launch(
    context: &LaunchContext,
    host: &Capabilities,
    spec: &MachineSpec,
    opts: &StartOptions,
    permission: &Permission,
) -> Result<Launched, StartError> {
    let run_dir = &context.config.run_dir;
    let dir = RunDir::create_locked(run_dir, spec.id).map_err(start_io)?;
    let result = launch_locked(context, host, spec, opts, permission, &dir);
    dir.unlock();
    result
}

fn launch_locked(
    context: &LaunchContext,
    host: &Capabilities,
    spec: &MachineSpec,
    opts: &StartOptions,
    permission: &Permission,
    dir: &RunDir,
) -> Result<Launched, StartError> {
    if let Some(living) = dir.holder().map_err(start_io)? {
        return Err(StartError::AlreadyRunning { id: spec.id, pid: living.pid() });
    }
    let facts = HostFacts {
        machine_version: host.resolve(spec.machine, spec.machine_version.as_deref())?,
        cpu_model: spec.cpu_model.clone().unwrap_or_else(|| default_cpu(spec.accelerator).to_owned()),
        tcg_tb_size_mib: context.config.tcg_tb_size_mib,
        restore: opts.restore_from.is_some(),
    };
    let plan = plan(spec, &facts);
    let uid = context.users.assign(&context.config.run_dir, spec.id)?;

    dir.unmark_ready().map_err(start_io)?;
    dir.set_aside(QEMU_LOG).map_err(start_io)?;
    let output = dir.append(QEMU_LOG).map_err(start_io)?;
    let stdin = File::open("/dev/null").map_err(StartError::io("opening /dev/null"))?;
    let opener = Opener { context, spec, dir, uid };
    let inherit = plan.inherit.iter().map(|source| opener.open(*source)).collect::<Result<Vec<_>, _>>()?;
    let restore_from =
        opts.restore_from.as_deref().map(|path| open_for("the saved state", path, false)).transpose()?;
    let qmp = dir.connect(QMP_SOCKET).map_err(StartError::io("connecting to the monitor's socket"))?;

    let argv: Vec<OsString> =
        std::iter::once(host.binary.clone().into_os_string()).chain(plan.args).collect();
    let record = record(spec, &facts, &argv);
    dir.write_record(&record).map_err(start_io)?;

    let argv = argv
        .into_iter()
        .map(|arg| CString::new(arg.into_vec()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| StartError::invalid("spec", "a value contains a zero byte"))?;
    let inherited: Vec<_> = inherit.iter().map(AsFd::as_fd).collect();
    let setup = ChildSetup {
        program: &argv[0],
        argv: &argv,
        stdin: stdin.as_fd(),
        output: output.as_fd(),
        inherit: &inherited,
        lock_index: plan.inherit.iter().position(|source| *source == FdUse::Lock),
        dir: dir.fd().as_fd(),
        user: uid.map(|uid| Identity { uid, group: kvm_group(spec.accelerator) }),
        dies_with_us: false,
    };
    if !permission.take() {
        let after = context.config.start_timeout;
        return Err(StartError::Timeout {
            after,
            last_words: "opening the machine's files took too long".into(),
        });
    }
    let pidfd = spawn(&setup).map_err(|error| spawn_failed(error, spec, host, dir))?;
    Ok(Launched {
        dir: dir.clone(),
        record,
        pidfd,
        qmp,
        limits: plan.limits,
        restore_from: restore_from.map(Arc::new),
    })
}

fn default_cpu(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "host",
        Accelerator::Tcg => "max",
    }
}

/// QEMU opens `/dev/kvm` itself, which belongs to a group on most systems.
fn kvm_group(accelerator: Accelerator) -> Option<u32> {
    match accelerator {
        Accelerator::Kvm => std::fs::metadata("/dev/kvm").ok().map(|data| data.gid()),
        Accelerator::Tcg => None,
    }
}

fn record(spec: &MachineSpec, facts: &HostFacts, argv: &[OsString]) -> Record {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Record {
        id: spec.id,
        name: spec.name.clone(),
        machine: spec.machine,
        machine_version: facts.machine_version.clone(),
        accelerator: spec.accelerator,
        cpu_model: facts.cpu_model.clone(),
        vnc: spec.vnc,
        disk_places: made_places(spec),
        started_at_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        argv: argv.iter().map(|arg| arg.to_string_lossy().into_owned()).collect(),
    }
}

fn spawn_failed(error: SpawnError, spec: &MachineSpec, host: &Capabilities, dir: &RunDir) -> StartError {
    let SpawnError { step, source } = error;
    let missing = source.kind() == io::ErrorKind::NotFound;
    match step {
        // Another process was quicker, one that did not use the directory's lock.
        Step::Lock => match dir.holder() {
            Ok(Some(living)) => StartError::AlreadyRunning { id: spec.id, pid: living.pid() },
            Ok(None) | Err(_) => StartError::Io { what: step.describe().into(), source },
        },
        Step::Exec if missing => StartError::BinaryMissing { binary: host.binary.display().to_string() },
        Step::Fork if source.kind() == io::ErrorKind::OutOfMemory => StartError::OutOfMemory {
            memory_bytes: spec.memory_bytes,
            last_words: "no process could be made".into(),
        },
        Step::Fork
        | Step::Session
        | Step::Descriptors
        | Step::Limits
        | Step::Directory
        | Step::User
        | Step::Capabilities
        | Step::NoNewPrivileges
        | Step::Exec => StartError::Io { what: step.describe().into(), source },
    }
}

fn start_io(error: Error) -> StartError {
    match error {
        Error::Io { what, path, source } => {
            StartError::Io { what: format!("{what} '{}'", path.display()), source }
        }
        other => {
            StartError::Io { what: "preparing the run directory".into(), source: io::Error::other(other) }
        }
    }
}

struct Opener<'a> {
    context: &'a LaunchContext,
    spec: &'a MachineSpec,
    dir: &'a RunDir,
    uid: Option<u32>,
}

impl Opener<'_> {
    fn open(&self, source: FdUse) -> Result<OwnedFd, StartError> {
        match source {
            FdUse::Lock => self.lock(),
            FdUse::Qmp => self.dir.listen(QMP_SOCKET).map(OwnedFd::from).map_err(start_io),
            FdUse::Console => self.dir.listen(CONSOLE_SOCKET).map(OwnedFd::from).map_err(start_io),
            FdUse::ConsoleLog => self.dir.append(CONSOLE_LOG).map(OwnedFd::from).map_err(start_io),
            FdUse::Kernel => self.boot_file("kernel", self.spec.kernel.as_ref().map(|kernel| &kernel.kernel)),
            FdUse::Initrd => {
                self.boot_file("initrd", self.spec.kernel.as_ref().and_then(|kernel| kernel.initrd.as_ref()))
            }
            FdUse::FirmwareCode | FdUse::FirmwareVars => self.firmware(source),
            FdUse::DiskLayer { disk, layer } => open_disk(&self.spec.disks[disk], layer),
            FdUse::Tap { nic } => match &self.spec.nics[nic].backend {
                NicBackend::Tap { fd } => {
                    fd.try_clone().map_err(StartError::io("copying a tap's descriptor"))
                }
                NicBackend::User { .. } => unreachable!("the plan names taps only for tap NICs"),
            },
        }
    }

    fn lock(&self) -> Result<OwnedFd, StartError> {
        let lock = self.dir.lock_file().map_err(start_io)?;
        if let Some(uid) = self.uid {
            let owner = rustix::fs::Uid::from_raw(uid);
            rustix::fs::fchown(&lock, Some(owner), None)
                .map_err(io::Error::from)
                .map_err(StartError::io("giving the machine's lock to its user"))?;
        }
        Ok(lock)
    }

    /// QEMU opens these again through its own descriptor, so as another user it must be allowed to.
    fn boot_file(&self, what: &str, path: Option<&PathBuf>) -> Result<OwnedFd, StartError> {
        let path = path.expect("the plan names it only when it is there");
        let fd = open_for(what, path, false)?;
        let stat = rustix::fs::fstat(&fd)
            .map_err(io::Error::from)
            .map_err(StartError::io(format!("reading {what}")))?;
        if self.uid.is_some() && stat.st_mode & 0o004 == 0 {
            let reason = format!("'{}' must be readable by every user (mode 0444)", path.display());
            return Err(StartError::invalid(what, reason));
        }
        Ok(fd)
    }

    fn firmware(&self, source: FdUse) -> Result<OwnedFd, StartError> {
        let Firmware::Uefi { vars } = &self.spec.firmware else {
            unreachable!("the plan names firmware only for UEFI");
        };
        let uefi = firmware::find(&self.context.config.firmware_dirs, vars)?;
        if source == FdUse::FirmwareCode {
            return open_for("the UEFI firmware", &uefi.code, false);
        }
        firmware::open_vars(&uefi, vars).map(OwnedFd::from).map_err(|source| StartError::File {
            what: "the machine's UEFI variables".into(),
            path: vars.clone(),
            source,
        })
    }
}

fn open_disk(disk: &DiskSpec, layer: usize) -> Result<OwnedFd, StartError> {
    let path = &disk.layers[layer].path;
    open_for(&format!("disk {}", disk.id), path, layer == 0 && !disk.read_only && !disk.cdrom)
}

/// Opens a plain file, and never waits for the other end of a pipe that lies in its place.
pub(super) fn open_for(what: &str, path: &Path, write: bool) -> Result<OwnedFd, StartError> {
    let failed = |source| StartError::File { what: what.to_owned(), path: path.to_owned(), source };
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).write(write).custom_flags(flags).open(path).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if !kind.is_file() {
        let is = if kind.is_block_device() { "a block device" } else { "no plain file" };
        return Err(failed(io::Error::other(format!("it is {is}"))));
    }
    Ok(file.into())
}
