//! From a machine to its launch plan.

use std::ffi::OsString;

use serde::Serialize;

use super::devices::{Device, Netdev, NetdevString, NicProperties, Throttle};
use super::disks::{
    SCSI_CONTROLLER, disk_node, firmware_node, hot_device, ide_device, is_ata, made_places, places, throttle,
    throttled_device,
};
use super::escape::escape_commas;
use super::layout::{self, Fixed};
use crate::spec::{Accelerator, DiskBus, Firmware, MachineSpec, MachineType, NicBackend, NicModel, NicSpec};

/// What QEMU inherits besides standard input, output and error starts at this number.
pub const FIRST_FD: i32 = 3;

/// Descriptor sets below this number are for firmware and logs, disks' files follow.
const SET_CONSOLE_LOG: u32 = 1;
const SET_FIRMWARE_CODE: u32 = 2;
const SET_FIRMWARE_VARS: u32 = 3;
pub(crate) const FIRST_DISK_SET: u32 = 10;

/// What the host adds to the machine's description.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// Resolved, such as `pc-q35-7.2`.
    pub machine_version: String,
    pub cpu_model: String,
    pub tcg_tb_size_mib: u32,
    /// A saved state will be read.
    pub restore: bool,
}

/// Something that is opened by us for QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdUse {
    /// Proves that the machine lives; QEMU does not know of it.
    Lock,
    Qmp,
    Console,
    ConsoleLog,
    Kernel,
    Initrd,
    FirmwareCode,
    FirmwareVars,
    DiskLayer {
        disk: usize,
        layer: usize,
    },
    Tap {
        nic: usize,
    },
}

/// What limits a disk has from the start; set over QMP before the virtual CPUs run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    pub disk: usize,
    pub throttle: Throttle,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchPlan {
    /// Without the program's name.
    pub args: Vec<OsString>,
    /// The nth becomes descriptor `FIRST_FD + n` of QEMU.
    pub inherit: Vec<FdUse>,
    pub limits: Vec<Limits>,
}

/// Computes the plan of a machine that [`super::validate()`] has passed.
pub fn plan(spec: &MachineSpec, host: &HostFacts) -> LaunchPlan {
    let mut builder =
        Builder { spec, plan: LaunchPlan { args: Vec::new(), inherit: Vec::new(), limits: Vec::new() } };
    builder.inherit(FdUse::Lock);
    builder.process(host);
    builder.machine(host);
    builder.firmware();
    builder.kernel();
    builder.channels();
    builder.fixed_devices();
    builder.disks();
    builder.nics();
    builder.plan
}

struct Builder<'a> {
    spec: &'a MachineSpec,
    plan: LaunchPlan,
}

impl Builder<'_> {
    fn arg(&mut self, option: &str, value: impl Into<OsString>) {
        self.plan.args.push(option.into());
        self.plan.args.push(value.into());
    }

    fn json(&mut self, option: &str, value: &impl Serialize) {
        let text =
            serde_json::to_string(value).expect("plain structs of strings and numbers always serialise");
        self.arg(option, text);
    }

    fn inherit(&mut self, source: FdUse) -> i32 {
        self.plan.inherit.push(source);
        FIRST_FD + i32::try_from(self.plan.inherit.len()).expect("a few dozen") - 1
    }

    fn inherit_set(&mut self, set: u32, source: FdUse) {
        let fd = self.inherit(source);
        self.arg("-add-fd", format!("fd={fd},set={set}"));
    }

    fn has_pci(&self) -> bool {
        match self.spec.machine {
            MachineType::Q35 | MachineType::I440fx => true,
            MachineType::Microvm => false,
        }
    }

    fn process(&mut self, host: &HostFacts) {
        for flag in ["-nodefaults", "-no-user-config", "-S"] {
            self.plan.args.push(flag.into());
        }
        self.arg("-name", format!("guest={},debug-threads=on", escape_commas(&self.spec.name)));
        self.arg("-uuid", self.spec.id.to_string());
        self.arg("-msg", "timestamp=on");
        self.arg("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        // A guest that powers itself off or panics stays visible as such, also when no agent is there to see it.
        self.arg("-action", "shutdown=pause,panic=pause");
        if host.restore {
            self.arg("-incoming", "defer");
        }
    }

    fn machine(&mut self, host: &HostFacts) {
        let spec = self.spec;
        let mut machine = format!("{},usb=off,dump-guest-core=off", host.machine_version);
        match spec.machine {
            // Without a screen the firmware speaks on the serial port.
            MachineType::Q35 | MachineType::I440fx => {
                machine += ",vmport=off";
                machine += if spec.vnc { "" } else { ",graphics=off" };
            }
            MachineType::Microvm => {}
        }
        if let Firmware::Uefi { .. } = spec.firmware {
            machine += ",pflash0=firmware-code,pflash1=firmware-vars";
        }
        self.arg("-machine", machine);
        let accelerator = match spec.accelerator {
            Accelerator::Kvm => "kvm".to_owned(),
            Accelerator::Tcg => format!("tcg,thread=multi,tb-size={}", host.tcg_tb_size_mib),
        };
        self.arg("-accel", accelerator);
        self.arg("-cpu", host.cpu_model.as_str());
        self.arg("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", spec.cpus));
        self.arg("-m", format!("size={}M", spec.memory_bytes >> 20));
        self.arg("-overcommit", "mem-lock=off");
        self.arg("-rtc", "base=utc");
        // Sleep states that nobody could wake a cloud guest from.
        match spec.machine {
            MachineType::Q35 => {
                self.arg("-global", "ICH9-LPC.disable_s3=1");
                self.arg("-global", "ICH9-LPC.disable_s4=1");
            }
            MachineType::I440fx => {
                self.arg("-global", "PIIX4_PM.disable_s3=1");
                self.arg("-global", "PIIX4_PM.disable_s4=1");
            }
            MachineType::Microvm => {}
        }
        self.arg("-boot", "menu=off,strict=on");
        self.arg("-display", "none");
        // No listening socket: each VNC client is handed over as a connected descriptor.
        self.arg("-vnc", "none");
    }

    fn firmware(&mut self) {
        if let Firmware::Uefi { .. } = self.spec.firmware {
            self.inherit_set(SET_FIRMWARE_CODE, FdUse::FirmwareCode);
            self.inherit_set(SET_FIRMWARE_VARS, FdUse::FirmwareVars);
            self.json("-blockdev", &firmware_node("firmware-code", SET_FIRMWARE_CODE, true));
            self.json("-blockdev", &firmware_node("firmware-vars", SET_FIRMWARE_VARS, false));
        }
    }

    fn kernel(&mut self) {
        let Some(kernel) = &self.spec.kernel else { return };
        let fd = self.inherit(FdUse::Kernel);
        self.arg("-kernel", format!("/proc/self/fd/{fd}"));
        if kernel.initrd.is_some() {
            let fd = self.inherit(FdUse::Initrd);
            // QEMU splits this value at commas; a path of ours has none.
            self.arg("-initrd", format!("/proc/self/fd/{fd}"));
        }
        self.arg("-append", microvm_cmdline(self.spec, &kernel.cmdline));
    }

    fn channels(&mut self) {
        let qmp = self.inherit(FdUse::Qmp);
        self.arg("-chardev", format!("socket,id=qmp,fd={qmp},server=on,wait=off"));
        self.arg("-mon", "chardev=qmp,mode=control");
        self.inherit_set(SET_CONSOLE_LOG, FdUse::ConsoleLog);
        let console = self.inherit(FdUse::Console);
        self.arg(
            "-chardev",
            format!(
                "socket,id=serial0,fd={console},server=on,wait=off,logfile=/dev/fdset/{SET_CONSOLE_LOG},logappend=on"
            ),
        );
        match self.spec.machine {
            MachineType::Q35 | MachineType::I440fx => {
                self.json("-device", &Device::Serial { id: "serial0-port", chardev: "serial0" });
            }
            // microvm makes its port itself from the first -serial.
            MachineType::Microvm => self.arg("-serial", "chardev:serial0"),
        }
    }

    fn fixed_devices(&mut self) {
        let spec = self.spec;
        let machine = spec.machine;
        let at = |device| layout::fixed(machine, device);
        let pci = self.has_pci();
        if machine == MachineType::Q35 {
            for port in layout::root_ports(made_places(spec).virtio.into(), spec.nics.len()) {
                self.json("-device", &port);
            }
        }
        if pci {
            self.json("-device", &Device::PanicNotifier { id: "panic" });
        }
        if spec.vnc {
            self.json("-device", &Device::Screen { id: "screen", at: at(Fixed::Screen) });
            self.json("-device", &Device::Usb { id: "usb", at: at(Fixed::Usb) });
            self.json("-device", &Device::Tablet { id: "tablet", bus: "usb.0" });
        }
        if spec.rng {
            self.arg("-object", r#"{"qom-type":"rng-random","id":"entropy","filename":"/dev/urandom"}"#);
            let device = if pci {
                Device::RngPci { id: "rng", rng: "entropy", at: at(Fixed::Rng) }
            } else {
                Device::RngMmio { id: "rng", rng: "entropy" }
            };
            self.json("-device", &device);
        }
        if spec.balloon {
            let device = if pci {
                Device::BalloonPci { id: "balloon", free_page_reporting: true, at: at(Fixed::Balloon) }
            } else {
                Device::BalloonMmio { id: "balloon", free_page_reporting: true }
            };
            self.json("-device", &device);
        }
        if made_places(spec).scsi {
            self.json("-device", &Device::Scsi { id: SCSI_CONTROLLER, at: at(Fixed::Scsi) });
        }
        if machine == MachineType::I440fx && spec.disks.iter().any(|disk| disk.bus == DiskBus::Sata) {
            self.json("-device", &Device::Ahci { id: "ahci", at: at(Fixed::Ahci) });
        }
    }

    fn disks(&mut self) {
        let spec = self.spec;
        let places = places(&spec.disks);
        let (mut ata, mut set) = (0, FIRST_DISK_SET);
        for (number, disk) in spec.disks.iter().enumerate() {
            let first_set = set;
            for layer in 0..disk.layers.len() {
                self.inherit_set(set, FdUse::DiskLayer { disk: number, layer });
                set += 1;
            }
            let node = disk_node(disk, first_set);
            let device = if is_ata(disk.bus) {
                ide_device(spec, disk, ata)
            } else {
                hot_device(spec.machine, disk, places[number])
            };
            ata += usize::from(is_ata(disk.bus));
            self.json("-blockdev", &node);
            self.json("-device", &device);
            if !disk.limits.is_none() {
                let device = throttled_device(spec.machine, disk);
                let throttle = throttle(device, &disk.limits);
                self.plan.limits.push(Limits { disk: number, throttle });
            }
        }
    }

    fn nics(&mut self) {
        for (number, nic) in self.spec.nics.iter().enumerate() {
            let netdev = match &nic.backend {
                NicBackend::User { forwards, hostname } => Netdev::User {
                    id: format!("net-{}", nic.id),
                    hostname: hostname.clone(),
                    hostfwd: forwards
                        .iter()
                        .map(|forward| NetdevString {
                            str: format!(
                                "{}:{}:{}-:{}",
                                forward.protocol, forward.host_addr, forward.host_port, forward.guest_port
                            ),
                        })
                        .collect(),
                },
                NicBackend::Tap { .. } => {
                    let fd = self.inherit(FdUse::Tap { nic: number });
                    Netdev::Tap { id: format!("net-{}", nic.id), fd: fd.to_string(), vhost: false }
                }
            };
            let device = nic_device(self.spec.machine, nic, number);
            self.json("-netdev", &netdev);
            self.json("-device", &device);
        }
    }
}

/// Under TCG, microvm's clock calibration hangs one boot in five unless the kernel is told the result.
fn microvm_cmdline(spec: &MachineSpec, given: &str) -> String {
    let mut cmdline = given.to_owned();
    if spec.machine == MachineType::Microvm && spec.accelerator == Accelerator::Tcg {
        for (name, value) in [("tsc_early_khz=", "1000000"), ("lpj=", "4000000")] {
            if !given.split_whitespace().any(|word| word.starts_with(name)) {
                cmdline = format!("{cmdline} {name}{value}");
            }
        }
    }
    cmdline.trim_start().to_owned()
}

fn nic_device(machine: MachineType, nic: &NicSpec, number: usize) -> Device {
    let pci = machine != MachineType::Microvm;
    let properties = NicProperties {
        id: format!("nic-{}", nic.id),
        netdev: format!("net-{}", nic.id),
        mac: nic.mac.to_string(),
        bootindex: nic.boot_index,
        romfile: (pci && nic.boot_index.is_none()).then_some(""),
    };
    match (nic.model, pci) {
        (NicModel::Virtio, true) => Device::NicPci { nic: properties, at: layout::nic(machine, number) },
        (NicModel::Virtio, false) => Device::NicMmio { nic: properties },
        (NicModel::E1000, _) => Device::NicE1000 { nic: properties, at: layout::nic(machine, number) },
    }
}
