//! A machine started by hand: the plan's own arguments with the descriptors replaced by what a person would write,
//! spawned, and let go over QMP. What our starts are measured against.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ostler_qemu::MachineSpec;
use ostler_qemu::args::{FIRST_FD, FdUse, HostFacts, plan};

/// The command line of `spec`, with its sockets in `dir`.
pub(crate) fn command_line(spec: &MachineSpec, dir: &Path) -> Vec<OsString> {
    let facts = HostFacts {
        machine_version: "q35".into(),
        cpu_model: "max".into(),
        tcg_tb_size_mib: 64,
        restore: false,
    };
    let plan = plan(spec, &facts);
    let mut args: Vec<String> = Vec::new();
    let mut sets: Vec<(String, String)> = Vec::new();
    let mut planned = plan.args.into_iter().map(|arg| arg.into_string().unwrap());
    while let Some(arg) = planned.next() {
        match arg.as_str() {
            "-add-fd" => {
                let value = planned.next().unwrap();
                let (fd, set) = value.strip_prefix("fd=").unwrap().split_once(",set=").unwrap();
                let number = fd.parse::<i32>().unwrap() - FIRST_FD;
                if let FdUse::DiskLayer { disk, layer } = plan.inherit[usize::try_from(number).unwrap()] {
                    let path = spec.disks[disk].layers[layer].path.display().to_string();
                    sets.push((format!("/dev/fdset/{set}"), path));
                }
            }
            "-chardev" => {
                let value = planned.next().unwrap();
                let socket = if value.contains("id=qmp") { "qmp" } else { "serial0" };
                let path = dir.join(format!("{socket}.sock"));
                args.extend([arg, format!("socket,id={socket},path={},server=on,wait=off", path.display())]);
            }
            "-blockdev" => {
                let mut node = planned.next().unwrap();
                for (set, path) in &sets {
                    node = node.replace(&format!("\"{set}\""), &format!("\"{path}\""));
                }
                args.extend([arg, node]);
            }
            _ => args.push(arg),
        }
    }
    assert!(plan.limits.is_empty(), "the benchmark's disks have no limits");
    args.into_iter().map(OsString::from).collect()
}

/// A QEMU that runs its guest.
pub(crate) struct ByHand {
    child: Child,
    /// From the spawn to virtual CPUs that run.
    pub(crate) started: Duration,
}

impl ByHand {
    pub(crate) fn start(args: &[OsString], dir: &Path) -> Self {
        let socket = dir.join("qmp.sock");
        for name in ["qmp.sock", "serial0.sock"] {
            // What the round before left.
            let _ = std::fs::remove_file(dir.join(name));
        }
        let begun = Instant::now();
        let mut child = Command::new("qemu-system-x86_64")
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut qmp = connect(&socket, &mut child);
        let mut lines = BufReader::new(qmp.try_clone().unwrap()).lines();
        let mut answer = |wanted: &str| {
            while !lines.next().expect("QEMU answers").unwrap().contains(wanted) {}
        };
        answer("QMP");
        qmp.write_all(b"{\"execute\":\"qmp_capabilities\"}").unwrap();
        answer("return");
        qmp.write_all(b"{\"execute\":\"cont\"}").unwrap();
        answer("return");
        Self { child, started: begun.elapsed() }
    }

    /// Kills it and waits for its end.
    pub(crate) fn end(mut self) -> Duration {
        let begun = Instant::now();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        begun.elapsed()
    }
}

fn connect(socket: &Path, child: &mut Child) -> UnixStream {
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(_) => {
                assert!(child.try_wait().unwrap().is_none(), "QEMU ended");
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
}
