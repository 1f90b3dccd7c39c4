//! The end of every test: all VMs are deleted, and then nothing of them is left on the host.

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use uuid::Uuid;

use super::TestServer;
use super::wait::calm;

impl TestServer {
    /// Deletes all VMs and waits until the host is clean. Takes the server, since nothing comes after this. Volumes and
    /// snapshots that were made on their own are the test's to delete.
    pub(crate) fn nothing_left(mut self) {
        let names = self.ok(&["vm", "list", "-o", "name"]);
        let names: Vec<_> = names.lines().collect();
        if !names.is_empty() {
            self.ok(&[&["vm", "delete", "--wait"], &names[..]].concat());
        }
        calm("nothing is left of the VMs", || self.leaks());
        let status = self.sigterm();
        assert!(status.success(), "the server ended with {status}");
        assert!(!self.socket().exists(), "the socket is left");
    }

    /// What is there although there is no VM.
    fn leaks(&self) -> Vec<String> {
        let node = self.node_dir();
        let mut left: Vec<String> = self.processes().iter().map(|pid| format!("process {pid}")).collect();
        let machine = |name: &str| Uuid::parse_str(name).is_ok();
        left.extend(entries(&node.join("run"), machine));
        for dir in ["vms", "volumes", "pool/volumes", "pool/snapshots"] {
            left.extend(entries(&node.join(dir), |_| true));
        }
        left.extend(entries(&self.data().join("images/incoming"), |_| true));
        let used = |port: &&u16| TcpListener::bind(("127.0.0.1", **port)).is_err();
        left.extend(self.ports.iter().filter(used).map(|port| format!("port {port}")));
        for noun in ["vm", "snapshot", "volume"] {
            let names = self.ok(&[noun, "list", "-o", "name"]);
            left.extend(names.lines().map(|name| format!("{noun} {name}")));
        }
        let unfinished = self.operations().into_iter().filter(|operation| !operation.status.phase.is_final());
        left.extend(unfinished.map(|operation| format!("operation {}", operation.spec.action)));
        left
    }
}

fn entries(dir: &Path, counts: impl Fn(&str) -> bool) -> Vec<String> {
    let found = fs::read_dir(dir).into_iter().flatten().flatten();
    found
        .filter(|entry| counts(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path().display().to_string())
        .collect()
}
