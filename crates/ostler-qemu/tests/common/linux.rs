//! The tiny Linux guest of `guest/build`, run from memory, and a shell in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ostler_qemu::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{QemuHost, console_text, eventually, spec};

fn guest_file(name: &str) -> PathBuf {
    let set = |variable| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || set("OSTLER_CACHE").or_else(|| Some(set("HOME")?.join(".cache/ostler")));
    let dir = set("OSTLER_TEST_GUEST").or_else(|| Some(cache()?.join("guest"))).expect("a home directory");
    let path = dir.join(name);
    assert!(path.is_file(), "{} is missing: run guest/build first", path.display());
    path
}

/// Without disks, but with the controller that SCSI disks need.
pub(crate) fn linux(disks: Vec<DiskSpec>) -> MachineSpec {
    let options = "console=ttyS0 quiet mitigations=off nokaslr no_timer_check ostler.root=none";
    MachineSpec {
        kernel: Some(KernelBoot {
            kernel: guest_file("vmlinux"),
            initrd: Some(guest_file("initrd")),
            cmdline: options.into(),
        }),
        memory_bytes: 192 << 20,
        disks,
        nics: Vec::new(),
        ..spec(Path::new("/dev/null"))
    }
}

pub(crate) struct Shell {
    console: UnixStream,
    commands: usize,
}

impl Shell {
    /// Waits until the guest is up and takes its console.
    pub(crate) async fn of(machine: &Arc<dyn Machine>) -> Self {
        eventually("the guest's login", || console_text(machine).contains("Try: ")).await;
        Self { console: machine.console().await.unwrap(), commands: 0 }
    }

    /// Types a command; the answer comes from [`Shell::answer`].
    pub(crate) async fn begin(&mut self, command: &str) {
        self.commands += 1;
        let number = self.commands;
        // The quotes keep the echo of what was typed from looking like the answer.
        let line = format!("echo BE\"\"GIN-{number}; {command}; echo E\"\"ND-{number}-$?\n");
        self.console.write_all(line.as_bytes()).await.unwrap();
    }

    /// What the command that was begun last printed; it must succeed.
    pub(crate) async fn answer(&mut self) -> String {
        let number = self.commands;
        let (begin, end) = (format!("BEGIN-{number}\r\n"), format!("END-{number}-"));
        let mut seen = String::new();
        let read = async {
            let mut buffer = [0u8; 4096];
            loop {
                let length = self.console.read(&mut buffer).await.unwrap();
                assert!(length > 0, "the console closed");
                seen += &String::from_utf8_lossy(&buffer[..length]);
                if let Some((_, after)) = seen.split_once(&begin)
                    && let Some((output, status)) = after.split_once(&end)
                    && let Some((status, _)) = status.split_once('\r')
                {
                    return (output.trim().replace('\r', ""), status.to_owned());
                }
            }
        };
        let done = tokio::time::timeout(Duration::from_secs(60), read).await;
        let Ok((output, status)) = done else { panic!("no answer; the console says {seen:?}") };
        assert_eq!(status, "0", "a command failed: {output}");
        output
    }

    pub(crate) async fn run(&mut self, command: &str) -> String {
        self.begin(command).await;
        self.answer().await
    }

    /// Runs a command until it prints this.
    pub(crate) async fn until(&mut self, command: &str, wanted: &str) {
        let repeat = format!(
            "for i in $(seq 300); do x=$({{ {command}; }} 2>/dev/null) && [ \"$x\" = \"{wanted}\" ] && break; usleep 20000; done; echo \"$x\""
        );
        assert_eq!(self.run(&repeat).await, wanted, "{command}");
    }
}

/// Fills `mib` MiB of a disk with a byte, beginning at `at` MiB, and flushes.
pub(crate) fn write_command(device: &str, byte: char, at: u32, mib: u32) -> String {
    format!(
        "tr '\\0' {byte} </dev/zero | dd of=/dev/{device} bs=1M count={mib} seek={at} iflag=fullblock conv=fsync,notrunc 2>/dev/null"
    )
}

pub(crate) async fn start_linux(
    host: &QemuHost,
    disks: Vec<DiskSpec>,
) -> (MachineSpec, Arc<dyn Machine>, Shell) {
    let spec = linux(disks);
    let machine = host.hypervisor.start(spec.clone(), StartOptions::default()).await.unwrap();
    let shell = Shell::of(&machine).await;
    (spec, machine, shell)
}
