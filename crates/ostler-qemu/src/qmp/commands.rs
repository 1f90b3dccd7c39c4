//! QMP's commands, each a type with the type of its reply. Only what the driver uses.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::block::{BlockNodeInfo, DriveInfo, FdSet, JobInfo, ObjectInfo, TransactionAction};
use crate::args::{BlockNode, Device, Throttle};

/// The serialised value is the command's `arguments`.
pub trait Command: Serialize {
    const NAME: &'static str;
    type Reply: DeserializeOwned + Send + 'static;
}

/// The empty object most commands answer with; anything is taken.
#[derive(Debug, Deserialize)]
pub struct Done {}

macro_rules! command {
    ($(#[$meta:meta])* $type:ident $name:literal -> $reply:ty { $($(#[$field_meta:meta])* $field:ident: $field_type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct $type { $($(#[$field_meta])* pub $field: $field_type),* }

        impl Command for $type {
            const NAME: &'static str = $name;
            type Reply = $reply;
        }
    };
}

command!(QmpCapabilities "qmp_capabilities" -> Done { enable: &'static [&'static str] });
command!(QueryVersion "query-version" -> VersionInfo {});
command!(QueryMachines "query-machines" -> Vec<MachineInfo> {});
command!(QueryStatus "query-status" -> StatusInfo {});
command!(Stop "stop" -> Done {});
command!(Cont "cont" -> Done {});
command!(SystemReset "system_reset" -> Done {});
command!(SystemPowerdown "system_powerdown" -> Done {});
command!(Quit "quit" -> Done {});
command!(
    /// Sent with a descriptor, which `fdname` then names in the commands that follow.
    GetFd "getfd" -> Done { fdname: String }
);
command!(CloseFd "closefd" -> Done { fdname: String });
command!(
    AddClient "add_client" -> Done { protocol: &'static str, fdname: String, skipauth: bool }
);
command!(Migrate "migrate" -> Done { uri: String });
command!(MigrateIncoming "migrate-incoming" -> Done { uri: String });
command!(MigrateCancel "migrate_cancel" -> Done {});
command!(
    /// Bytes in a second.
    MigrateSetParameters "migrate-set-parameters" -> Done { max_bandwidth: u64 }
);
command!(QueryMigrate "query-migrate" -> MigrationInfo {});
command!(Balloon "balloon" -> Done { value: u64 });
command!(QueryBalloon "query-balloon" -> BalloonInfo {});

command!(
    /// Sent with a descriptor, which the set then has; the set is made when there is none of this number.
    AddFd "add-fd" -> Done { fdset_id: u32 }
);
command!(RemoveFd "remove-fd" -> Done { fdset_id: u32 });
command!(QueryFdsets "query-fdsets" -> Vec<FdSet> {});
command!(BlockdevDel "blockdev-del" -> Done { node_name: String });
command!(
    /// The request only: `DEVICE_DELETED` tells when the guest let go.
    DeviceDel "device_del" -> Done { id: String }
);
command!(QueryBlock "query-block" -> Vec<DriveInfo> {});
command!(
    /// `flat` leaves out what each node knows of those below.
    QueryNamedBlockNodes "query-named-block-nodes" -> Vec<BlockNodeInfo> { flat: bool }
);
command!(BlockResize "block_resize" -> Done { node_name: String, size: u64 });
command!(
    /// All actions at one instant, or none.
    Transaction "transaction" -> Done { actions: Vec<TransactionAction> }
);
command!(
    BlockStream "block-stream" -> Done {
        job_id: String,
        device: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        base_node: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        backing_file: Option<String>,
        speed: u64,
        auto_dismiss: bool,
    }
);
command!(
    BlockCommit "block-commit" -> Done {
        job_id: String,
        device: String,
        top_node: String,
        base_node: String,
        backing_file: String,
        speed: u64,
        auto_dismiss: bool,
    }
);
command!(QueryJobs "query-jobs" -> Vec<JobInfo> {});
command!(JobCancel "job-cancel" -> Done { id: String });
command!(JobDismiss "job-dismiss" -> Done { id: String });
command!(QomList "qom-list" -> Vec<ObjectInfo> { path: String });
command!(QomGet "qom-get" -> serde_json::Value { path: String, property: &'static str });

/// `block_set_io_throttle`, whose arguments have underscores.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct BlockSetIoThrottle(pub Throttle);

impl Command for BlockSetIoThrottle {
    const NAME: &'static str = "block_set_io_throttle";
    type Reply = Done;
}

/// `blockdev-add`, whose arguments are the node itself.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct BlockdevAdd(pub BlockNode);

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Reply = Done;
}

/// `device_add`.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct DeviceAdd(pub Device);

impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Reply = Done;
}

#[derive(Debug, Deserialize)]
pub struct VersionInfo {
    pub qemu: VersionTriple,
}

#[derive(Debug, Deserialize)]
pub struct VersionTriple {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineInfo {
    pub name: String,
    pub alias: Option<String>,
    #[serde(default)]
    pub deprecated: bool,
}

/// QEMU's run state; `other` is one of a newer QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    Debug,
    Inmigrate,
    InternalError,
    IoError,
    Paused,
    Postmigrate,
    Prelaunch,
    FinishMigrate,
    RestoreVm,
    Running,
    SaveVm,
    Shutdown,
    Suspended,
    Watchdog,
    GuestPanicked,
    Colo,
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
pub struct StatusInfo {
    pub status: Status,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStatus {
    None,
    Setup,
    Cancelling,
    Cancelled,
    Active,
    PreSwitchover,
    Device,
    Completed,
    Failed,
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationInfo {
    /// Absent when there was never one.
    pub status: Option<MigrationStatus>,
    pub ram: Option<MigrationRam>,
    pub error_desc: Option<String>,
}

#[derive(Debug, Deserialize)]
pub struct MigrationRam {
    pub total: u64,
    pub remaining: u64,
}

#[derive(Debug, Deserialize)]
pub struct BalloonInfo {
    pub actual: u64,
}
