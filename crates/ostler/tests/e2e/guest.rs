//! The tiny guest: its files, and the marker lines it prints (see `guest/` in the repository).

use std::path::PathBuf;

use super::TestServer;
use super::wait::wait_for;

/// A file that `guest/build` made.
pub(crate) fn guest_file(name: &str) -> PathBuf {
    let set = |variable| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || set("OSTLER_CACHE").or_else(|| Some(set("HOME")?.join(".cache/ostler")));
    let dir = set("OSTLER_TEST_GUEST").or_else(|| Some(cache()?.join("guest"))).expect("a home directory");
    let path = dir.join(name);
    assert!(path.is_file(), "{} is missing: run guest/build first", path.display());
    path
}

/// The kernel's command line for a boot from the guest's disk, with `more` at its end.
pub(crate) fn kernel_cmdline(more: &str) -> String {
    format!(
        "console=ttyS0 root=LABEL=ostler-root quiet mitigations=off nokaslr no_timer_check net.ifnames=0 {more}"
    )
}

/// A line `OSTLER-GUEST WORD uptime=1.83 KEY=VALUE…`.
#[derive(Debug, Clone)]
pub(crate) struct Marker(String);

impl Marker {
    fn is(&self, word: &str) -> bool {
        self.0.split_whitespace().nth(1) == Some(word)
    }

    pub(crate) fn get(&self, key: &str) -> &str {
        self.0
            .split_whitespace()
            .filter_map(|field| field.split_once('='))
            .find_map(|(name, value)| (name == key).then_some(value))
            .unwrap_or_else(|| panic!("no {key} in {:?}", self.0))
    }
}

/// `boots` and `uptime` as the guest's web server tells them.
pub(crate) fn boots_and_uptime(status: &str) -> (u32, f64) {
    let marker = Marker(status.to_owned());
    (marker.get("boots").parse().unwrap(), marker.get("uptime").trim().parse().unwrap())
}

impl TestServer {
    /// Imports the guest's disk as `guest`.
    pub(crate) fn import_guest(&self) {
        self.ok(&["image", "import", "guest", guest_file("ostler-guest.qcow2").to_str().unwrap()]);
    }

    /// Imports the guest's kernel and initramfs as `kernel` and `initrd`.
    pub(crate) fn import_kernel(&self) {
        // The unpacked kernel boots three seconds sooner.
        for (name, file) in [("kernel", "vmlinux"), ("initrd", "initrd")] {
            self.ok(&["image", "import", name, guest_file(file).to_str().unwrap()]);
        }
    }

    /// Creates a VM that boots `kernel`, and waits until it runs. `more` goes to the command line.
    pub(crate) fn create_direct(&self, vm: &str, cmdline: &str, more: &[&str]) {
        let cmdline = kernel_cmdline(cmdline);
        let fixed = ["--memory", "256M", "--kernel", "kernel", "--initrd", "initrd", "--cmdline", &cmdline];
        self.ok(&[&["vm", "create", vm, "--wait"], &fixed[..], more].concat());
    }

    /// What the VM's serial console has shown since its start; nothing while it cannot be had.
    pub(crate) fn log(&self, vm: &str) -> String {
        String::from_utf8_lossy(&self.cli(&["vm", "log", vm]).stdout).into_owned()
    }

    fn markers(&self, vm: &str) -> Vec<Marker> {
        let log = self.log(vm).replace('\r', "\n");
        log.lines()
            .filter(|line| line.starts_with("OSTLER-GUEST "))
            .map(|line| Marker(line.to_owned()))
            .collect()
    }

    /// Waits for a marker of the guest's.
    pub(crate) fn marker(&self, vm: &str, word: &str) -> Marker {
        self.marker_where(vm, word, |_| true)
    }

    pub(crate) fn marker_where(&self, vm: &str, word: &str, good: impl Fn(&Marker) -> bool) -> Marker {
        wait_for(&format!("{vm} says {word}"), || {
            self.markers(vm).into_iter().rev().find(|marker| marker.is(word) && good(marker))
        })
    }

    /// Waits until the guest is up with its disk's counter at `boots`.
    pub(crate) fn booted(&self, vm: &str, boots: u32) -> Marker {
        self.marker_where(vm, "ready", |marker| marker.get("boots") == boots.to_string())
    }

    /// Boots and uptime over the published port, as soon as the guest answers.
    pub(crate) fn status_of(&self, port: u16) -> (u32, f64) {
        let text = wait_for(&format!("port {port} answers"), || {
            super::answer_of(port).filter(|text| text.contains("boots="))
        });
        boots_and_uptime(&text)
    }
}
