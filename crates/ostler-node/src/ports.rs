//! Published ports are tried before QEMU is started, so that a port in use is named and not found in QEMU's last words.

use std::io;
use std::net::{IpAddr, TcpListener, UdpSocket};

use ostler_api::Fault;
use ostler_api::vm::{Protocol, Publish, Vm};

use crate::fault;

/// Opens and closes each port once. Quick: nothing here waits for anything.
pub(crate) fn ports_check(vm: &Vm) -> Result<(), Fault> {
    for publish in vm.spec.nics.iter().flat_map(|nic| &nic.publish) {
        try_port(publish).map_err(|error| {
            let Publish { protocol, host_addr, host_port, .. } = publish;
            let (code, hint) = match error.kind() {
                io::ErrorKind::AddrInUse => ("port_in_use", "end what uses it"),
                io::ErrorKind::AddrNotAvailable => ("address_unavailable", "use an address of this node"),
                io::ErrorKind::PermissionDenied => ("port_not_permitted", "use a port above 1023"),
                _ => ("port_unavailable", "mend that"),
            };
            let addr = match host_addr {
                IpAddr::V4(addr) => addr.to_string(),
                IpAddr::V6(addr) => format!("[{addr}]"),
            };
            let message = format!(
                "port {host_port}/{protocol} on {addr} cannot be published: {error}; {hint}, or publish another port, \
                 then start the VM again"
            );
            fault::fault(code, message)
        })?;
    }
    Ok(())
}

fn try_port(publish: &Publish) -> io::Result<()> {
    let at = (publish.host_addr, publish.host_port);
    match publish.protocol {
        Protocol::Tcp => TcpListener::bind(at).map(drop),
        Protocol::Udp => UdpSocket::bind(at).map(drop),
    }
}
