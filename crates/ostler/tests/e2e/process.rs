//! Processes as `/proc` shows them. A zombie has ended; whoever should have reaped it is not waited for.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, WaitOptions};

use super::wait::wait_until;

/// Ends with its parent become ours at once, so that they are reaped quickly (pid 1 may take seconds).
pub(crate) fn adopt_orphans() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("a subreaper");
}

/// Whether it runs; its remains are not it. Orphans that became ours are reaped.
pub(crate) fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The name stands in parentheses and may hold anything.
    let rest = stat.rsplit(')').next().unwrap_or_default();
    let mut fields = rest.split_whitespace();
    let (state, parent) = (fields.next().unwrap_or("X"), fields.next().unwrap_or("0"));
    let ended = matches!(state, "Z" | "X");
    if ended && parent == std::process::id().to_string() && stat.contains("(qemu") {
        let _ = rustix::process::waitpid(pid_of(pid), WaitOptions::NOHANG);
    }
    !ended
}

fn pid_of(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

/// Sends a signal; one that has ended meanwhile does not mind.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = pid_of(pid) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

pub(crate) fn ends(pid: u32) {
    wait_until(&format!("process {pid} ends"), || !is_alive(pid));
}

/// kill -9 of a QEMU.
pub(crate) fn kill_qemu(pid: u32) {
    signal(pid, Signal::KILL);
    ends(pid);
}

/// The processes that work in or below `dir`, which is where an agent puts its QEMUs.
pub(crate) fn working_in(dir: &Path) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let here = fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir));
        if here && is_alive(pid) {
            found.push(pid);
        }
    }
    found
}
