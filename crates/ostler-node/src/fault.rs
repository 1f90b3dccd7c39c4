//! From a driver's error to a fault that a status can carry: a stable word, and a message a person can act on.

use std::error::Error as StdError;

use ostler_api::Fault;
use ostler_qemu::{DiskError, Error, ExitReport, QmpError, StartError};
use ostler_storage::StorageError;

/// Longest message; what QEMU says last can be long.
const MESSAGE_MAX: usize = 2000;

/// A fault with a bounded message.
pub(crate) fn fault(code: &str, message: impl Into<String>) -> Fault {
    let mut message: String = message.into();
    if message.len() > MESSAGE_MAX {
        let mut cut = MESSAGE_MAX;
        while !message.is_char_boundary(cut) {
            cut -= 1;
        }
        message.truncate(cut);
        message.push('…');
    }
    Fault::new(code, message)
}

/// An error with its sources, one after the other; a source whose text is there already is not repeated.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

pub(crate) fn start_failed(error: &StartError) -> Fault {
    let (code, hint) = match error {
        StartError::AlreadyRunning { .. } => ("already_running", ""),
        StartError::StartUnderWay { .. } => ("start_under_way", "; start it again"),
        StartError::BinaryMissing { .. } => ("qemu_missing", ""),
        StartError::FirmwareMissing { .. } => ("firmware_missing", ""),
        StartError::Invalid { .. } => ("machine_invalid", ""),
        StartError::PortInUse { .. } => {
            ("port_in_use", "; end what uses it or publish another port, then start the VM again")
        }
        StartError::OutOfMemory { .. } => {
            ("out_of_memory", "; stop other VMs of this node or give this one less")
        }
        StartError::File { .. } => ("file_missing", ""),
        StartError::BadImage { .. } => ("bad_disk", "; rebuild the VM from an image: ostler vm rebuild"),
        StartError::BadState { .. } => (
            "restore_failed",
            "; its saved memory is kept: start it again, or drop the memory with ostler vm stop",
        ),
        StartError::NoFreeUser { .. } => ("no_free_user", ""),
        StartError::Died { .. } => ("qemu_died", ""),
        StartError::Timeout { .. } => ("start_timeout", "; start it again"),
        StartError::Qmp { .. } => ("qemu_refused", ""),
        StartError::Io { .. } => ("start_failed", ""),
        StartError::Simulated(_) => ("simulated", ""),
    };
    fault(code, format!("{}{hint}", chain(error)))
}

pub(crate) fn machine_failed(what: &str, error: &Error) -> Fault {
    let code = match error {
        Error::Qmp(error) => return qmp_failed(what, error),
        Error::Disk(error) => return disk_failed(what, error),
        Error::Io { .. } => "io",
        Error::StillRunning { .. } => "still_running",
        Error::Ended { .. } => "qemu_died",
        Error::Unkillable { .. } => "qemu_unkillable",
        Error::Save(reason) if reason.to_ascii_lowercase().contains("no space") => "no_space",
        Error::Save(_) => "save_failed",
        Error::Missing { .. } => "missing",
        Error::Simulated(_) => "simulated",
    };
    fault(code, format!("{what}: {}", chain(error)))
}

fn disk_failed(what: &str, error: &DiskError) -> Fault {
    let code = match error {
        DiskError::File(error) => return start_failed(error),
        DiskError::NotAttached { .. } => "disk_not_attached",
        DiskError::OtherAttached { .. } | DiskError::PartOfSnapshot { .. } => "disk_differs",
        DiskError::NotHotPluggable { .. } => "disk_not_hot_pluggable",
        DiskError::NoPlace { .. } => "no_place_for_disk",
        DiskError::FileTimeout { .. } => "timed_out",
        DiskError::GuestDidNotRelease { .. } => "guest_keeps_disk",
        DiskError::Shrink { .. } | DiskError::SizeDiffers { .. } => "size_differs",
        DiskError::Invalid { .. } | DiskError::ReadOnly { .. } | DiskError::NoLayer { .. } => "disk_invalid",
        DiskError::Job { reason, .. } if reason.to_ascii_lowercase().contains("no space") => "no_space",
        DiskError::Job { .. } => "disk_job_failed",
        DiskError::Cancelled { .. } => "cancelled",
    };
    fault(code, format!("{what}: {}", chain(error)))
}

pub(crate) fn qmp_failed(what: &str, error: &QmpError) -> Fault {
    match error {
        QmpError::Refused { .. } => fault("qemu_refused", format!("{what}: {}", chain(error))),
        QmpError::Closed => fault("qemu_died", format!("{what}: {}", chain(error))),
        _ => unresponsive(&format!("{what}: {}", chain(error))),
    }
}

pub(crate) fn unresponsive(reason: &str) -> Fault {
    fault(
        "qemu_unresponsive",
        format!("QEMU does not answer ({reason}); wait for it, or force it off: ostler vm stop"),
    )
}

pub(crate) fn storage_failed(what: &str, error: &StorageError) -> Fault {
    fault(error.code(), format!("{what}: {}", chain(error)))
}

/// QEMU's process is gone and nobody asked for it.
pub(crate) fn died(report: &ExitReport) -> Fault {
    let how = match report.reason {
        ostler_qemu::ExitReason::Clean => "ended by itself".to_owned(),
        ostler_qemu::ExitReason::Code(code) => format!("ended with exit code {code}"),
        ostler_qemu::ExitReason::Signal(signal) => format!("was ended by signal {signal}"),
        ostler_qemu::ExitReason::Unknown => "ended".to_owned(),
    };
    died_with(&how, &report.last_words)
}

pub(crate) fn died_with(how: &str, last_words: &str) -> Fault {
    let words = if last_words.trim().is_empty() {
        "it left no message".to_owned()
    } else {
        format!("its last words: {}", last_words.trim())
    };
    fault("qemu_died", format!("QEMU {how}; {words}. Start the VM again: ostler vm start"))
}

pub(crate) fn late(what: &str, limit: std::time::Duration) -> Fault {
    fault("timed_out", format!("{what} was not done within {} s; try again", limit.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded_and_say_the_cause() {
        let long = fault("x", "é".repeat(5000));
        assert!(long.message.len() <= MESSAGE_MAX + 4);
        let error =
            StartError::Io { what: "making the directory".into(), source: std::io::Error::other("broken") };
        assert_eq!(start_failed(&error).message, "making the directory failed: broken");
        let said = died(&ExitReport { reason: ostler_qemu::ExitReason::Signal(9), last_words: "oh".into() });
        assert!(said.message.contains("signal 9") && said.message.contains("oh"), "{}", said.message);
    }

    #[test]
    fn a_port_in_use_is_named() {
        let error = StartError::PortInUse {
            addr: std::net::Ipv4Addr::LOCALHOST.into(),
            port: 2222,
            reason: "Address already in use".into(),
        };
        let fault = start_failed(&error);
        assert_eq!(fault.code, "port_in_use");
        assert!(fault.message.contains("2222"));
    }
}
