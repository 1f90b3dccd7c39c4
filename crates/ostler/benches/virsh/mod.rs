//! libvirt as a peer: the distribution's libvirtd with one domain of type qemu, in a directory of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::ms;

/// A name that no domain of a person has.
pub(crate) const DOMAIN: &str = "ostler-bench";
const LIBVIRTD: &str = "/usr/sbin/libvirtd";

pub(crate) struct Libvirt {
    daemon: Child,
    uri: String,
    _dir: PathBuf,
}

impl Libvirt {
    /// None when libvirt is not installed, we are not root, or one runs already: it is not ours to use.
    pub(crate) fn start(dir: &Path, base: &Path) -> Option<Self> {
        let root = rustix::process::geteuid().is_root();
        if !root || !Path::new(LIBVIRTD).exists() || Path::new("/run/libvirt/libvirt-sock").exists() {
            return None;
        }
        // Orphaned QEMUs come to us and are reaped; else destroy waits for a pid 1 that takes its time.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).ok()?;
        let dir = dir.join("libvirt");
        fs::create_dir(&dir).unwrap();
        let conf = dir.join("libvirtd.conf");
        let sockets = dir.join("sock");
        fs::create_dir(&sockets).unwrap();
        let text = format!(
            "unix_sock_dir = \"{}\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\nlisten_tls = 0\nlisten_tcp = 0\n",
            sockets.display()
        );
        fs::write(&conf, text).unwrap();
        // libvirtd reads its QEMU settings from one place only; it sees ours there and nobody else does.
        let settings = dir.join("qemu.conf");
        fs::write(
            &settings,
            "security_driver = \"none\"\nstdio_handler = \"file\"\nuser = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\n",
        )
        .unwrap();
        let log = fs::File::create(dir.join("libvirtd.log")).unwrap();
        let daemon = Command::new("unshare")
            .args([
                "--mount",
                "sh",
                "-c",
                "mount --bind \"$0\" /etc/libvirt/qemu.conf && exec \"$1\" -f \"$2\"",
            ])
            .args([settings.as_path(), Path::new(LIBVIRTD), conf.as_path()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .ok()?;
        let socket = sockets.join("libvirt-sock");
        let uri = format!("qemu+unix:///system?socket={}", socket.display());
        let libvirt = Self { daemon, uri, _dir: dir.clone() };
        let begun = Instant::now();
        while !libvirt.run(&["version"]) {
            if begun.elapsed() > Duration::from_secs(30) {
                println!("libvirtd did not get ready; see {}", dir.join("libvirtd.log").display());
                return None;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let disk = dir.join("disk.qcow2");
        let overlay = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .arg(base)
            .arg(&disk)
            .status()
            .unwrap();
        assert!(overlay.success());
        let xml = dir.join("domain.xml");
        fs::write(&xml, domain(&disk)).unwrap();
        assert!(libvirt.run(&["define", xml.to_str().unwrap()]), "the domain cannot be defined");
        Some(libvirt)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("virsh");
        command.args(["-q", "-c", &self.uri]).args(args).stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> bool {
        self.command(args).output().is_ok_and(|output| output.status.success())
    }

    /// Milliseconds that virsh took.
    pub(crate) fn virsh(&mut self, args: &[&str]) -> f64 {
        let begun = Instant::now();
        let mut child = self.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        // We are the subreaper: whatever is orphaned meanwhile has to be reaped, as an init does.
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            self.reap_orphans();
            std::thread::sleep(Duration::from_micros(500));
        };
        let time = ms(begun.elapsed());
        assert!(status.success(), "virsh {args:?} failed");
        time
    }

    /// Reaps children that are QEMUs of libvirtd; not the daemon and not virsh, whose ends others wait for.
    fn reap_orphans(&self) {
        let children = format!("/proc/self/task/{}/children", std::process::id());
        let Ok(children) = fs::read_to_string(children) else { return };
        for pid in children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()) {
            let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if comm.starts_with("qemu-system")
                && let Some(pid) = rustix::process::Pid::from_raw(pid)
            {
                let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::NOHANG);
            }
        }
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        self.run(&["destroy", DOMAIN]);
        self.run(&["undefine", DOMAIN]);
        let pid = rustix::process::Pid::from_child(&self.daemon);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.daemon.wait();
    }
}

/// The same machine in libvirt's words.
fn domain(disk: &Path) -> String {
    format!(
        "<domain type='qemu'><name>{DOMAIN}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features><cpu mode='maximum'/>
  <devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vda' bus='virtio'/></disk>
    <interface type='user'><model type='virtio'/></interface>
    <serial type='null'/><video><model type='vga'/></video><input type='tablet' bus='usb'/>
    <controller type='usb' model='qemu-xhci'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='virtio'/></devices></domain>",
        disk.display()
    )
}
