//! Which accelerators this host really has: a pure decision over what the host shows.
//!
//! A `/dev/kvm` that opens proves nothing: there are hosts where it exists without hardware virtualisation behind it,
//! and ordinary guests hang there. KVM counts only when the CPU offers vmx or svm as well.

use std::io;

use crate::host::AcceleratorProbe;
use crate::spec::Accelerator;

/// `kvm_open` is what opening `/dev/kvm` for reading and writing gave; `cpuinfo` the text of `/proc/cpuinfo`.
pub fn accelerators(kvm_open: Result<(), &io::Error>, cpuinfo: &str) -> Vec<AcceleratorProbe> {
    let (usable, reason) = kvm(kvm_open, &cpu_flags(cpuinfo));
    let tcg = if usable {
        "always there; much slower than KVM"
    } else {
        "KVM is not usable here, so guests run in software, several times slower"
    };
    vec![
        AcceleratorProbe { accelerator: Accelerator::Kvm, usable, reason },
        AcceleratorProbe { accelerator: Accelerator::Tcg, usable: true, reason: tcg.to_owned() },
    ]
}

fn kvm(open: Result<(), &io::Error>, flags: &[String]) -> (bool, String) {
    let extension = ["vmx", "svm"].into_iter().find(|name| flags.iter().any(|flag| flag == name));
    match (open, extension) {
        (Ok(()), Some(name)) => (true, format!("/dev/kvm opens and the CPU offers {name}")),
        (Ok(()), None) => (
            false,
            "/dev/kvm opens, but the CPU offers neither vmx nor svm: ordinary guests would hang. Turn on \
             virtualisation in the firmware, or nested virtualisation on the outer host"
                .to_owned(),
        ),
        (Err(error), _) if error.kind() == io::ErrorKind::NotFound => (
            false,
            match extension {
                Some(name) => format!(
                    "the CPU offers {name} but there is no /dev/kvm: load the module kvm_intel or kvm_amd"
                ),
                None => "there is no /dev/kvm and the CPU offers neither vmx nor svm".to_owned(),
            },
        ),
        (Err(error), _) if error.kind() == io::ErrorKind::PermissionDenied => {
            (false, "/dev/kvm may not be opened by this user: add it to the group kvm".to_owned())
        }
        (Err(error), _) => (false, format!("/dev/kvm does not open: {error}")),
    }
}

/// The flags of the first CPU.
pub fn cpu_flags(cpuinfo: &str) -> Vec<String> {
    field(cpuinfo, "flags")
        .map(|flags| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

/// The name of the first CPU.
pub fn cpu_model_name(cpuinfo: &str) -> String {
    field(cpuinfo, "model name").unwrap_or("unknown").to_owned()
}

/// How many CPUs are listed.
pub fn cpu_count(cpuinfo: &str) -> u32 {
    let listed =
        cpuinfo.lines().filter(|line| line.split(':').next().is_some_and(|key| key.trim() == "processor"));
    u32::try_from(listed.count()).unwrap_or(u32::MAX).max(1)
}

fn field<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: &str = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu vmx sse2\n\nprocessor\t: 1\nflags\t: fpu vmx\n";
    const PLAIN: &str = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse2 hypervisor vmmcall\n";

    fn usable(open: Result<(), &io::Error>, cpuinfo: &str) -> (bool, String) {
        let probe = accelerators(open, cpuinfo).remove(0);
        assert_eq!(probe.accelerator, Accelerator::Kvm);
        (probe.usable, probe.reason)
    }

    #[test]
    fn kvm_needs_both_the_device_and_the_cpu() {
        assert!(usable(Ok(()), INTEL).0);
        let (ok, why) = usable(Ok(()), PLAIN);
        assert!(!ok && why.contains("neither vmx nor svm"), "{why}");
        let (ok, why) = usable(Err(&io::Error::from(io::ErrorKind::NotFound)), INTEL);
        assert!(!ok && why.contains("load the module"), "{why}");
        let (ok, why) = usable(Err(&io::Error::from(io::ErrorKind::PermissionDenied)), INTEL);
        assert!(!ok && why.contains("group kvm"), "{why}");
    }

    #[test]
    fn tcg_is_always_there() {
        assert!(
            accelerators(Ok(()), "")
                .iter()
                .any(|probe| probe.accelerator == Accelerator::Tcg && probe.usable)
        );
    }

    #[test]
    fn cpuinfo_is_read() {
        assert_eq!((cpu_count(INTEL), cpu_model_name(INTEL).as_str()), (2, "Some Xeon"));
        assert_eq!((cpu_count(""), cpu_model_name("").as_str()), (1, "unknown"));
    }
}
