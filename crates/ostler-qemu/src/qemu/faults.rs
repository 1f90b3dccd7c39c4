//! QEMU's own words made into errors that say what to do. Pure, but for one look at a port.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};

use crate::args::names::{device, layer_node};
use crate::disk::DiskSpec;
use crate::error::{QmpError, StartError};
use crate::machine::ExitReason;
use crate::spec::{MachineSpec, NicBackend, PortForward, PortProtocol};

/// What was being done when QEMU refused.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stage {
    Disk(usize),
    Other,
}

/// QEMU answered a command with an error.
pub(super) fn refused(spec: &MachineSpec, stage: Stage, source: QmpError, last_words: String) -> StartError {
    let QmpError::Refused { desc, .. } = &source else { return StartError::Qmp { source, last_words } };
    match stage {
        Stage::Disk(disk) => StartError::BadImage { disk: spec.disks[disk].id.clone(), reason: desc.clone() },
        Stage::Other => StartError::Qmp { source, last_words },
    }
}

/// QEMU ended while it started.
pub(super) fn died(
    spec: &MachineSpec,
    restoring: bool,
    reason: ExitReason,
    last_words: String,
) -> StartError {
    let says = |text: &str| last_words.contains(text);
    if says("cannot set up guest memory") || says("Cannot allocate memory") {
        return StartError::OutOfMemory { memory_bytes: spec.memory_bytes, last_words };
    }
    if let Some(forward) = blamed_forward(spec, &last_words) {
        return port_in_use(forward);
    }
    if let Some((disk, reason)) = blamed_disk(spec, &last_words) {
        return StartError::BadImage { disk: disk.id.clone(), reason };
    }
    if restoring && (says("load of migration failed") || says("migration")) {
        return StartError::BadState { last_words };
    }
    StartError::Died { how: describe(reason), last_words }
}

pub(super) fn describe(reason: ExitReason) -> String {
    match reason {
        ExitReason::Clean => "exit status 0".into(),
        ExitReason::Code(code) => format!("exit status {code}"),
        ExitReason::Signal(signal) => format!("signal {signal}"),
        ExitReason::Unknown => "exit status unknown".into(),
    }
}

/// The disk that QEMU's "-blockdev {…}: Image is not in qcow2 format" is about, and the reason.
fn blamed_disk<'a>(spec: &'a MachineSpec, words: &str) -> Option<(&'a DiskSpec, String)> {
    words.lines().find_map(|line| {
        let (_, option) = line.split_once("-blockdev ").or_else(|| line.split_once("-device "))?;
        let (json, reason) = option.rsplit_once("}: ")?;
        let is_of = |disk: &&DiskSpec| {
            let names = [layer_node(disk, 0), device(&disk.id)];
            names.iter().any(|name| json.contains(&format!("\"{name}\"")))
        };
        spec.disks.iter().find(is_of).map(|disk| (disk, reason.trim().to_owned()))
    })
}

/// The forward that QEMU's "Could not set up host forwarding rule 'tcp:127.0.0.1:2222-:22'" is about.
fn blamed_forward<'a>(spec: &'a MachineSpec, words: &str) -> Option<&'a PortForward> {
    let (_, rule) = words.split_once("Could not set up host forwarding rule '")?;
    let (rule, _) = rule.split_once('\'')?;
    let forwards = spec.nics.iter().flat_map(|nic| match &nic.backend {
        NicBackend::User { forwards, .. } => forwards.as_slice(),
        NicBackend::Tap { .. } => &[],
    });
    forwards.into_iter().find(|forward| {
        let PortForward { protocol, host_addr, host_port, guest_port } = forward;
        rule == format!("{protocol}:{host_addr}:{host_port}-:{guest_port}")
    })
}

fn port_in_use(forward: &PortForward) -> StartError {
    let reason = why_not(forward.protocol, forward.host_addr, forward.host_port);
    StartError::PortInUse { addr: forward.host_addr, port: forward.host_port, reason }
}

/// QEMU does not say why, so we try for ourselves.
fn why_not(protocol: PortProtocol, addr: IpAddr, port: u16) -> String {
    let addr = SocketAddr::new(addr, port);
    let tried = match protocol {
        PortProtocol::Tcp => TcpListener::bind(addr).map(drop),
        PortProtocol::Udp => UdpSocket::bind(addr).map(drop),
    };
    match tried {
        Err(error) => match error.kind() {
            io::ErrorKind::AddrInUse => "something else uses it: choose another port".into(),
            io::ErrorKind::PermissionDenied => "ports below 1024 need rights that QEMU does not have: choose a higher port".into(),
            io::ErrorKind::AddrNotAvailable => "this host does not have the address".into(),
            _ => error.to_string(),
        },
        Ok(()) => "QEMU was refused it; it is free for us now, so something may have used it for a moment, or QEMU's \
                   user may not use it"
            .into(),
    }
}
