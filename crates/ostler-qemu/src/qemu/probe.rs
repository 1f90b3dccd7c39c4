//! What this host and its QEMU can do. Asking QEMU costs a process, so its answer is kept, also across restarts of the
//! agent, for as long as the binary stays the same.

use std::cmp::Reverse;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use crate::accel;
use crate::config::QemuConfig;
use crate::error::{QmpError, StartError};
use crate::host::HostProbe;
use crate::machine::ExitReason;
use crate::process::pidfd::Patience;
use crate::process::spawn::{ChildSetup, Step, spawn};
use crate::qmp::Connection;
use crate::qmp::commands::{MachineInfo, QueryMachines, QueryVersion, Quit};
use crate::qmp::log::TrafficLog;
use crate::spec::MachineType;
use crate::text::last_words;

const BINARY: &str = "qemu-system-x86_64";
const CACHE: &str = "qemu-capabilities.json";
const DEADLINE: Duration = Duration::from_secs(20);

/// What one QEMU binary can do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Capabilities {
    pub(super) binary: PathBuf,
    /// Modification time in nanoseconds and size: the binary these are of.
    stamp: (i64, i64, u64),
    pub(super) version: String,
    machines: Vec<MachineInfo>,
}

impl Capabilities {
    /// The versioned machine type: the wanted one if this QEMU has it, else the newest.
    pub(super) fn resolve(&self, machine: MachineType, wanted: Option<&str>) -> Result<String, StartError> {
        let (alias, prefix) = match machine {
            MachineType::Q35 => ("q35", "pc-q35-"),
            MachineType::I440fx => ("pc", "pc-i440fx-"),
            MachineType::Microvm => return Ok("microvm".into()),
        };
        if let Some(wanted) = wanted {
            if self.machines.iter().any(|known| known.name == wanted) {
                return Ok(wanted.to_owned());
            }
            let reason =
                format!("QEMU {} on this host has no '{wanted}': run it where QEMU has it", self.version);
            return Err(StartError::invalid("machine_version", reason));
        }
        let by_alias = self
            .machines
            .iter()
            .find(|known| known.alias.as_deref() == Some(alias) && known.name.starts_with(prefix));
        let newest = || {
            self.machines
                .iter()
                .filter(|known| known.name.starts_with(prefix))
                .max_by_key(|known| version_of(&known.name))
        };
        by_alias.or_else(newest).map(|known| known.name.clone()).ok_or_else(|| {
            StartError::invalid("machine", format!("QEMU {} on this host has no {machine}", self.version))
        })
    }

    fn machine_types(&self) -> Vec<String> {
        let mut names: Vec<&str> = self
            .machines
            .iter()
            .filter(|known| !known.deprecated)
            .map(|known| known.name.as_str())
            .filter(|name| {
                name.starts_with("pc-q35-") || name.starts_with("pc-i440fx-") || *name == "microvm"
            })
            .collect();
        names.sort_by_key(|name| {
            (Reverse(name.starts_with("pc-q35-")), *name == "microvm", Reverse(version_of(name)))
        });
        names.into_iter().map(str::to_owned).collect()
    }
}

/// The numbers in `pc-q35-7.2`.
fn version_of(name: &str) -> Vec<u32> {
    name.rsplit('-').next().unwrap_or_default().split('.').filter_map(|part| part.parse().ok()).collect()
}

/// Where QEMU is, or that it is missing.
pub(super) fn find_binary(config: &QemuConfig) -> Result<PathBuf, StartError> {
    if let Some(binary) = &config.qemu_binary {
        return if binary.is_file() { Ok(binary.clone()) } else { Err(missing(binary)) };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/bin"), PathBuf::from("/usr/local/bin")])
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(BINARY))
        .find(|binary| binary.is_file())
        .ok_or_else(|| missing(Path::new(BINARY)))
}

fn missing(binary: &Path) -> StartError {
    StartError::BinaryMissing { binary: binary.display().to_string() }
}

fn stamp(binary: &Path) -> io::Result<(i64, i64, u64)> {
    let data = fs::metadata(binary)?;
    Ok((data.mtime(), data.mtime_nsec(), data.len()))
}

/// The capabilities from memory, from the cache file, or from QEMU itself.
pub(super) async fn capabilities(
    config: &QemuConfig,
    known: Option<Arc<Capabilities>>,
) -> Result<Arc<Capabilities>, StartError> {
    let binary = find_binary(config)?;
    let stamp = stamp(&binary).map_err(StartError::io(format!("reading '{}'", binary.display())))?;
    let current = |found: &Capabilities| found.binary == binary && found.stamp == stamp;
    if let Some(found) = known.filter(|found| current(found)) {
        return Ok(found);
    }
    let cache = config.run_dir.join(CACHE);
    let cached = fs::read(&cache).ok().and_then(|text| serde_json::from_slice::<Capabilities>(&text).ok());
    if let Some(found) = cached.filter(|found| current(found)) {
        return Ok(Arc::new(found));
    }
    let (version, machines) = ask(config, &binary).await?;
    let found = Capabilities { binary, stamp, version, machines };
    // A cache that cannot be kept costs the next agent one more question.
    if let Ok(text) = serde_json::to_vec(&found) {
        let unfinished = cache.with_extension("partial");
        if fs::write(&unfinished, text).and_then(|()| fs::rename(&unfinished, &cache)).is_err() {
            tracing::warn!(cache = %cache.display(), "what QEMU can do could not be kept");
        }
    }
    Ok(Arc::new(found))
}

async fn ask(config: &QemuConfig, binary: &Path) -> Result<(String, Vec<MachineInfo>), StartError> {
    fs::create_dir_all(&config.run_dir)
        .map_err(StartError::io(format!("making the run directory '{}'", config.run_dir.display())))?;
    let setup = "asking QEMU what it can do";
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(StartError::io(setup))?;
    ours.set_nonblocking(true).map_err(StartError::io(setup))?;
    let output = rustix::fs::memfd_create("qemu-words", rustix::fs::MemfdFlags::CLOEXEC);
    let output = output.map(File::from).map_err(io::Error::from).map_err(StartError::io(setup))?;
    let words = output.try_clone().map_err(StartError::io(setup))?;
    let pidfd = {
        let stdin = File::open("/dev/null").map_err(StartError::io("opening /dev/null"))?;
        let dir = File::open(&config.run_dir).map_err(StartError::io("opening the run directory"))?;
        let program = CString::new(binary.as_os_str().as_bytes()).map_err(|_| missing(binary))?;
        let flags = "-nodefaults -no-user-config -S -display none -machine none -chardev socket,id=qmp,fd=3 -mon chardev=qmp,mode=control";
        let rest = flags.split(' ').map(|flag| CString::new(flag).expect("written here without zero bytes"));
        let argv: Vec<CString> = std::iter::once(program.clone()).chain(rest).collect();
        spawn(&ChildSetup {
            program: &program,
            argv: &argv,
            stdin: stdin.as_fd(),
            output: output.as_fd(),
            inherit: &[theirs.as_fd()],
            lock_index: None,
            dir: dir.as_fd(),
            user: None,
            dies_with_us: true,
        })
        .map_err(|error| match error.step {
            Step::Exec => {
                StartError::Io { what: format!("executing '{}'", binary.display()), source: error.source }
            }
            step => StartError::Io { what: step.describe().into(), source: error.source },
        })?
    };
    drop(theirs);
    let mut ended = pidfd.watch(Patience::UntilItEnds, || ());
    let answer = tokio::time::timeout(DEADLINE, questions(ours)).await;
    if !matches!(answer, Ok(Ok(_))) {
        pidfd.kill().map_err(StartError::io("ending QEMU"))?;
    }
    let reason = tokio::time::timeout(DEADLINE, ended.wait_for(Option::is_some)).await;
    let reason =
        reason.ok().and_then(|ended| ended.ok().and_then(|reason| *reason)).unwrap_or(ExitReason::Unknown);
    let last_words = || last_words(&read_back(&words).unwrap_or_default());
    match answer {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(QmpError::Closed)) => {
            Err(StartError::Died { how: super::faults::describe(reason), last_words: last_words() })
        }
        Ok(Err(source)) => Err(StartError::Qmp { source, last_words: last_words() }),
        Err(_) => Err(StartError::Timeout { after: DEADLINE, last_words: last_words() }),
    }
}

async fn questions(socket: std::os::unix::net::UnixStream) -> Result<(String, Vec<MachineInfo>), QmpError> {
    let stream = UnixStream::from_std(socket).map_err(QmpError::Connect)?;
    let (connection, ready) = Connection::open(stream, Box::new(|_, _| {}), TrafficLog::off(), DEADLINE);
    let (version, machines) = (connection.submit(&QueryVersion {}), connection.submit(&QueryMachines {}));
    ready.answer().await?;
    let version = version.answer().await?.qemu;
    let machines = machines.answer().await?;
    // The end is seen by its pidfd; the answer may be lost with the process.
    let _ = connection.execute(&Quit {}).await;
    Ok((format!("{}.{}.{}", version.major, version.minor, version.micro), machines))
}

fn read_back(file: &File) -> io::Result<Vec<u8>> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = file;
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(64 << 10).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The whole picture of the host.
pub(super) fn host_probe(qemu: Result<&Capabilities, &StartError>) -> HostProbe {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let kvm = File::options().read(true).write(true).open("/dev/kvm").map(drop);
    let accelerators = accel::accelerators(kvm.as_ref().copied(), &cpuinfo);
    let problems = qemu.err().map(|error| error.to_string()).into_iter().collect();
    HostProbe {
        qemu_version: qemu.ok().map(|found| found.version.clone()),
        qemu_binary: qemu.ok().map(|found| found.binary.clone()),
        machine_types: qemu.map(Capabilities::machine_types).unwrap_or_default(),
        accelerators,
        cpu_model: accel::cpu_model_name(&cpuinfo),
        cpu_flags: accel::cpu_flags(&cpuinfo),
        cpus: accel::cpu_count(&cpuinfo),
        memory_bytes: memory_total(&fs::read_to_string("/proc/meminfo").unwrap_or_default()),
        problems,
    }
}

fn memory_total(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0)
        * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(machines: &[(&str, Option<&str>)]) -> Capabilities {
        let machines = machines
            .iter()
            .map(|(name, alias)| MachineInfo {
                name: (*name).into(),
                alias: alias.map(str::to_owned),
                deprecated: false,
            })
            .collect();
        Capabilities { binary: "/qemu".into(), stamp: (0, 0, 0), version: "9.1.0".into(), machines }
    }

    #[test]
    fn the_newest_version_is_the_alias_or_the_highest_number() {
        let with_alias = of(&[("pc-q35-10.0", None), ("pc-q35-9.1", Some("q35"))]);
        assert_eq!(with_alias.resolve(MachineType::Q35, None).unwrap(), "pc-q35-9.1");
        let without = of(&[("pc-q35-9.1", None), ("pc-q35-10.0", None), ("pc-q35-2.12", None)]);
        assert_eq!(without.resolve(MachineType::Q35, None).unwrap(), "pc-q35-10.0");
        assert_eq!(without.resolve(MachineType::Q35, Some("pc-q35-2.12")).unwrap(), "pc-q35-2.12");
        assert_eq!(without.resolve(MachineType::Microvm, None).unwrap(), "microvm");
        assert!(without.resolve(MachineType::I440fx, None).is_err());
        let error = without.resolve(MachineType::Q35, Some("pc-q35-11.0")).unwrap_err();
        assert!(error.to_string().contains("has no 'pc-q35-11.0'"), "{error}");
    }

    #[test]
    fn machine_types_are_listed_newest_first() {
        let host = of(&[
            ("microvm", None),
            ("pc-i440fx-7.2", None),
            ("pc-q35-9.1", None),
            ("pc-q35-10.0", None),
            ("isapc", None),
        ]);
        assert_eq!(host.machine_types(), ["pc-q35-10.0", "pc-q35-9.1", "pc-i440fx-7.2", "microvm"]);
    }

    #[test]
    fn meminfo_is_read() {
        assert_eq!(memory_total("MemTotal:       2048 kB\nMemFree: 1 kB\n"), 2 << 20);
        assert_eq!(memory_total(""), 0);
    }
}
