//! What the tests of the real driver share.
#![allow(dead_code)]

pub(crate) mod linux;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ostler_qemu::conformance::{Fixture, GuestAct, guest};
use ostler_qemu::*;
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A host with a run directory of its own.
pub(crate) struct QemuHost {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) config: QemuConfig,
    pub(crate) hypervisor: Arc<QemuHypervisor>,
}

impl QemuHost {
    pub(crate) fn new() -> Self {
        Self::with(|_| ())
    }

    pub(crate) fn with(change: impl FnOnce(&mut QemuConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = QemuConfig::new(dir.path().join("run"));
        // Test machines may be loaded.
        config.start_timeout = PATIENCE;
        change(&mut config);
        let hypervisor = Arc::new(QemuHypervisor::new(config.clone()));
        std::fs::create_dir(dir.path().join("scratch")).unwrap();
        Self { dir, config, hypervisor }
    }

    pub(crate) fn disk(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, guest::boot_disk()).unwrap();
        path
    }

    pub(crate) fn machine_dir(&self, id: Uuid) -> PathBuf {
        self.config.run_dir.join(id.to_string())
    }
}

impl Drop for QemuHost {
    /// A test that failed leaves no QEMU behind.
    fn drop(&mut self) {
        let hypervisor = QemuHypervisor::new(self.config.clone());
        let ids = std::fs::read_dir(&self.config.run_dir).into_iter().flatten().flatten();
        let ids: Vec<Uuid> = ids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        let end_all = async move {
            for id in ids {
                let _ = hypervisor.kill(id).await;
            }
        };
        let thread = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(end_all);
        });
        let _ = thread.join();
    }
}

pub(crate) fn spec(disk: &Path) -> MachineSpec {
    MachineSpec {
        id: Uuid::now_v7(),
        name: "test, with a comma".into(),
        machine: MachineType::Q35,
        machine_version: None,
        accelerator: Accelerator::Tcg,
        cpu_model: None,
        cpus: 1,
        memory_bytes: 32 << 20,
        firmware: Firmware::Bios,
        kernel: None,
        disks: vec![disk_of("root", disk, DiskBus::Virtio)],
        disk_places: None,
        nics: vec![nic("lan", Vec::new())],
        rng: true,
        balloon: true,
        vnc: false,
    }
}

pub(crate) fn disk_of(id: &str, path: &Path, bus: DiskBus) -> DiskSpec {
    DiskSpec {
        id: id.into(),
        layers: vec![DiskLayer::new(path, DiskFormat::Raw)],
        bus,
        serial: Some("serial-1".into()),
        boot_index: Some(1),
        ..DiskSpec::default()
    }
}

pub(crate) fn nic(id: &str, forwards: Vec<PortForward>) -> NicSpec {
    NicSpec {
        id: id.into(),
        mac: "52:54:00:12:34:56".parse().unwrap(),
        model: NicModel::Virtio,
        backend: NicBackend::User { forwards, hostname: Some("test".into()) },
        boot_index: None,
    }
}

/// Waits until a condition holds.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, wait).await.is_err() {
        panic!("never happened: {what}");
    }
}

pub(crate) fn console_text(machine: &Arc<dyn Machine>) -> String {
    String::from_utf8_lossy(&std::fs::read(machine.console_log()).unwrap_or_default()).into_owned()
}

pub(crate) async fn wait_for_boot(machine: &Arc<dyn Machine>) {
    eventually("the guest's banner", || console_text(machine).contains(guest::BANNER.trim_end())).await;
}

pub(crate) fn qemu_img(args: &[&str]) {
    let done = std::process::Command::new("qemu-img").args(args).output().unwrap();
    assert!(done.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Runs a command of qemu-io on a qcow2 file and the files its header names below. A pattern that is not there fails.
pub(crate) fn qemu_io(path: &Path, command: &str) {
    let args = ["-f", "qcow2", "-c", command];
    let done = std::process::Command::new("qemu-io").args(args).arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(
        done.status.success() && !said.contains("failed"),
        "qemu-io {command} on {}: {said}{}",
        path.display(),
        String::from_utf8_lossy(&done.stderr)
    );
}

pub(crate) struct QemuFixture {
    pub(crate) host: QemuHost,
    pub(crate) disk: PathBuf,
}

impl QemuFixture {
    pub(crate) fn new() -> Self {
        let host = QemuHost::new();
        let disk = host.disk("boot.raw");
        Self { host, disk }
    }
}

#[async_trait]
impl Fixture for QemuFixture {
    fn hypervisor(&self) -> Arc<dyn Hypervisor> {
        Arc::clone(&self.host.hypervisor) as Arc<dyn Hypervisor>
    }

    async fn restart_agent(&mut self) {
        self.host.hypervisor = Arc::new(QemuHypervisor::new(self.host.config.clone()));
    }

    fn spec(&self) -> MachineSpec {
        spec(&self.disk)
    }

    async fn guest_up(&self, machine: &Arc<dyn Machine>) {
        wait_for_boot(machine).await;
    }

    async fn guest_act(&self, machine: &Arc<dyn Machine>, act: GuestAct) {
        let key = match act {
            GuestAct::PowerOff => b"p",
            GuestAct::Panic => b"c",
            GuestAct::Reset => b"r",
        };
        machine.console().await.unwrap().write_all(key).await.unwrap();
    }

    async fn murder(&self, machine: &Arc<dyn Machine>) {
        let pid = rustix::process::Pid::from_raw(machine.facts().pid.cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }

    fn scratch(&self) -> PathBuf {
        self.host.dir.path().join("scratch")
    }

    async fn disk_file(&self, name: &str, bytes: u64) -> DiskLayer {
        let path = self.host.dir.path().join(format!("{name}.qcow2"));
        if !path.exists() {
            qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &bytes.to_string()]);
        }
        DiskLayer::new(path, DiskFormat::Qcow2).named(name)
    }

    async fn fill(&self, layer: &DiskLayer, bytes: u64) {
        qemu_io(&layer.path, &format!("write -P 0x5a 0 {bytes}"));
    }

    /// The boot sector does not know of unplugging.
    async fn guest_keeps_disks(&self, machine: &Arc<dyn Machine>) {
        wait_for_boot(machine).await;
    }

    async fn slow_streams(&self, _machine: &Arc<dyn Machine>, _slow: bool) {}
}
