//! Creating VMs: everything is checked and resolved here, names to ids, so that later steps cannot fail on it.

use std::sync::Arc;
use std::time::Duration;

use ostler_api::image::{Image, ImageContent, ImageFormat, ImagePhase, ImageUse};
use ostler_api::metadata::labels_check;
use ostler_api::operation::{Accepted, Operation, OperationPhase};
use ostler_api::vm::{
    CMDLINE_MAX, CPUS_MAX, DiskBus, Firmware, KernelBoot, MEMORY_MAX, MEMORY_MIN, MachineType, NicModel,
    PUBLISH_MAX, Power, Publish, Vm, VmCreate, VmDisk, VmNic, VmSpec, VmStatus,
};
use ostler_api::vm_action::{VmAction, VmTask};
use ostler_api::vm_phase::{VmPhase, vm_phase};
use ostler_api::volume::{VOLUME_SIZE_MAX, VOLUME_SIZE_MIN, Volume, VolumeSpec, VolumeStatus};
use ostler_api::{
    ApiError, ByteSize, ErrorCode, Kind, Metadata, Name, OperationId, Resource, Time, VmId, VolumeId,
};

use crate::cache::Tables;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::event::target;
use crate::idempotency::{Idempotency, remember};
use crate::operation;
use crate::permission::Verb;

impl Cloud {
    /// A new VM: its spec, its root volume and the operation that starts it, in one transaction.
    pub async fn vm_create(
        &self,
        caller: &Caller,
        project: Option<&str>,
        request: VmCreate,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted<Arc<Vm>>, ApiError> {
        check(&request)?;
        if let Some(made) = self.made_before(caller, idempotency.as_ref()).await? {
            return self.accepted(caller, made.id, made.operation);
        }
        let (vm, operation) = (VmId::new(), OperationId::new());
        let operation = request.start.then_some(operation);
        self.commit(|tables, change| {
            let project = self.project(tables, caller, project, Verb::Create, Kind::Vm)?;
            plan(self, tables, change, caller, vm, operation, &project, &request)?;
            remember(change, caller, idempotency.as_ref(), vm.into(), operation)
        })
        .await?;
        self.accepted(caller, vm.into(), operation)
    }

    /// The answer to a request that made or changed a resource and began an operation.
    pub(crate) fn accepted<T: crate::cache::Cached>(
        &self,
        caller: &Caller,
        id: uuid::Uuid,
        operation: Option<OperationId>,
    ) -> Result<Accepted<Arc<T>>, ApiError> {
        let resource = self.get::<T>(caller, Some("*"), &id.to_string())?;
        Ok(accepted_now(&self.cache.read(), resource, operation))
    }

    /// The answer to a request that deletes: the resource as it is now, or as it was when it is gone.
    pub(crate) fn going<T: crate::cache::Cached>(
        &self,
        before: Arc<T>,
        operation: Option<OperationId>,
    ) -> Accepted<Arc<T>> {
        let tables = self.cache.read();
        let now = T::table(&tables).get(before.metadata().id).cloned();
        accepted_now(&tables, now.unwrap_or(before), operation)
    }
}

fn accepted_now<T>(tables: &Tables, resource: Arc<T>, operation: Option<OperationId>) -> Accepted<Arc<T>> {
    let operation = operation.and_then(|id| tables.operations.get(id.into()));
    Accepted { operation: operation.map(|operation| Operation::clone(operation)), resource }
}

pub(crate) fn taken(kind: Kind, name: &Name) -> ApiError {
    let mut error =
        ApiError::new(ErrorCode::AlreadyExists, format!("there is a {kind} named {name:?} already"))
            .hint("choose another name");
    error.field = Some("name".to_owned());
    error
}

/// What can be said of a request without looking at anything else.
fn check(request: &VmCreate) -> Result<(), ApiError> {
    labels_check(&request.labels).map_err(|error| ApiError::invalid("labels", error))?;
    check_cpus(request.cpus)?;
    check_memory(request.memory)?;
    check_publish(&request.publish)?;
    if let Some(disk) = request.disk {
        check_disk(disk)?;
    }
    if request.snapshot.is_some() && (request.image.is_some() || request.disk.is_some()) {
        return Err(ApiError::invalid(
            "snapshot",
            "a snapshot brings its disks: no image or disk size beside it",
        ));
    }
    if [&request.image, &request.snapshot, &request.kernel, &request.cdrom].iter().all(|what| what.is_none())
    {
        return Err(ApiError::invalid("image", "nothing to boot from")
            .hint("give an image, a snapshot, a kernel or a CD-ROM image: ostler image list"));
    }
    if request.kernel.is_none() && (request.initrd.is_some() || request.cmdline.is_some()) {
        return Err(ApiError::invalid("kernel", "an initrd or a command line needs a kernel"));
    }
    if let Some(cmdline) = &request.cmdline {
        check_cmdline(cmdline)?;
    }
    if request.machine == MachineType::Microvm {
        check_microvm(request)?;
    }
    if request.disk_bus == DiskBus::Ide && request.machine == MachineType::Q35 {
        return Err(ApiError::invalid("disk_bus", "the q35 machine has no IDE controller")
            .hint("use sata, or machine i440fx"));
    }
    if request.disk_bus == DiskBus::Sata && request.machine == MachineType::I440fx {
        return Err(ApiError::invalid("disk_bus", "the i440fx machine has no SATA controller")
            .hint("use ide, or machine q35"));
    }
    Ok(())
}

fn check_microvm(request: &VmCreate) -> Result<(), ApiError> {
    let refuse = |field: &str, detail: &str| Err(ApiError::invalid(field, detail).hint("use machine q35"));
    if request.kernel.is_none() {
        return refuse("kernel", "a microvm boots a kernel directly and needs one");
    }
    if request.firmware == Firmware::Uefi {
        return refuse("firmware", "a microvm has no UEFI");
    }
    if request.cdrom.is_some() {
        return refuse("cdrom", "a microvm has no CD-ROM drive");
    }
    if request.disk_bus != DiskBus::Virtio {
        return refuse("disk_bus", "a microvm has virtio disks only");
    }
    if request.nic_model != NicModel::Virtio {
        return refuse("nic_model", "a microvm has virtio network cards only");
    }
    Ok(())
}

pub(crate) fn check_cpus(cpus: u32) -> Result<(), ApiError> {
    if (1..=CPUS_MAX).contains(&cpus) {
        return Ok(());
    }
    Err(ApiError::invalid("cpus", format!("a VM has 1 to {CPUS_MAX} CPUs, not {cpus}")))
}

pub(crate) fn check_memory(memory: ByteSize) -> Result<(), ApiError> {
    if !(MEMORY_MIN..=MEMORY_MAX).contains(&memory) {
        return Err(ApiError::invalid(
            "memory",
            format!("a VM has {MEMORY_MIN} to {MEMORY_MAX} of memory, not {memory}"),
        ));
    }
    if !memory.0.is_multiple_of(1 << 20) {
        return Err(ApiError::invalid("memory", format!("memory is whole MiB; {} bytes are not", memory.0)));
    }
    Ok(())
}

pub(crate) fn check_disk(disk: ByteSize) -> Result<(), ApiError> {
    if !(VOLUME_SIZE_MIN..=VOLUME_SIZE_MAX).contains(&disk) {
        return Err(ApiError::invalid(
            "disk",
            format!("a disk has {VOLUME_SIZE_MIN} to {VOLUME_SIZE_MAX}, not {disk}"),
        ));
    }
    if !disk.0.is_multiple_of(512) {
        return Err(ApiError::invalid(
            "disk",
            format!("a disk is a multiple of 512 bytes; {} is not", disk.0),
        ));
    }
    Ok(())
}

pub(crate) fn check_publish(publish: &[Publish]) -> Result<(), ApiError> {
    if publish.len() > PUBLISH_MAX {
        return Err(ApiError::invalid("publish", format!("at most {PUBLISH_MAX} ports can be published")));
    }
    for (index, one) in publish.iter().enumerate() {
        for (field, port) in [("host_port", one.host_port), ("guest_port", one.guest_port)] {
            if port == 0 {
                return Err(ApiError::invalid(format!("publish[{index}].{field}"), "a port is 1 to 65535"));
            }
        }
        if one.host_addr.is_ipv6() {
            return Err(ApiError::invalid(
                format!("publish[{index}].host_addr"),
                format!(
                    "{} is an IPv6 address; QEMU's user-mode network publishes on IPv4 only",
                    one.host_addr
                ),
            )
            .hint("publish on an IPv4 address, such as 127.0.0.1 or 0.0.0.0"));
        }
        let same = |other: &Publish| {
            other.protocol == one.protocol
                && other.host_port == one.host_port
                && other.host_addr == one.host_addr
        };
        if publish[..index].iter().any(same) {
            return Err(ApiError::invalid(
                format!("publish[{index}].host_port"),
                format!("{one} is given twice"),
            ));
        }
    }
    Ok(())
}

fn check_cmdline(cmdline: &str) -> Result<(), ApiError> {
    if cmdline.len() > CMDLINE_MAX {
        return Err(ApiError::invalid("cmdline", format!("a command line has at most {CMDLINE_MAX} bytes")));
    }
    if cmdline.chars().any(char::is_control) {
        return Err(ApiError::invalid("cmdline", "a command line has no control characters"));
    }
    Ok(())
}

/// Finds an image that a new VM shall use, and makes the transaction fail when it changes meanwhile.
pub(crate) fn image_use(
    cloud: &Cloud,
    tables: &Tables,
    change: &mut Change,
    caller: &Caller,
    project: &Name,
    field: &str,
    name: &str,
) -> Result<(ImageUse, ImageContent), ApiError> {
    let image = cloud.find::<Image>(tables, caller, Verb::Read, Some(project.as_str()), name).map_err(
        |mut error| {
            error.field = Some(field.to_owned());
            error
        },
    )?;
    let data = match (&image.status.phase, &image.status.data, image.metadata.deleted) {
        (ImagePhase::Active, Some(data), None) => data,
        (phase, _, _) => {
            let mut error =
                ApiError::conflict(format!("image {} is {phase} and cannot be used", image.metadata.name))
                    .hint("wait until it is active: ostler image show");
            error.field = Some(field.to_owned());
            return Err(error);
        }
    };
    change.guard(image.as_ref());
    let used = ImageUse {
        image: image.metadata.id.into(),
        sha256: data.sha256.clone(),
        format: data.format,
        virtual_size: data.virtual_size,
    };
    Ok((used, data.content))
}

fn raw_image(used: ImageUse, field: &str) -> Result<ImageUse, ApiError> {
    match used.format {
        ImageFormat::Raw => Ok(used),
        ImageFormat::Qcow2 | ImageFormat::Vmdk | ImageFormat::Vdi | ImageFormat::Vhdx => {
            Err(ApiError::invalid(field, format!("a disk image cannot be used as {field}"))
                .hint(format!("import the {field} itself as an image: ostler image import NAME FILE")))
        }
    }
}

/// The root volume of a VM: a linked copy of `image`, or blank.
pub(crate) fn root_volume(
    project: &Name,
    vm: VmId,
    name: Name,
    image: Option<ImageUse>,
    size: Option<ByteSize>,
) -> Result<Volume, ApiError> {
    let least =
        image.as_ref().map_or(ByteSize(0), |image| ByteSize(image.virtual_size.0.next_multiple_of(512)));
    let size = size.unwrap_or(least.max(VOLUME_SIZE_MIN));
    if size < least {
        return Err(ApiError::invalid(
            "disk",
            format!("the image is {least}; a disk of {size} is too small for it"),
        )
        .hint("leave the size out to take the image's"));
    }
    Ok(Volume {
        metadata: Metadata::new(VolumeId::new().into(), name, Some(project.clone())),
        spec: VolumeSpec { image, vm: Some(vm), ..VolumeSpec::blank(size) },
        status: VolumeStatus::pending(),
    })
}

/// `NAME-root`, cut so that it stays a name; with a part of the id when that is taken.
pub(crate) fn volume_name(
    tables: &Tables,
    project: &Name,
    vm: &Name,
    id: uuid::Uuid,
) -> Result<Name, ApiError> {
    let short = |cut: usize| vm.as_str()[..vm.as_str().len().min(cut)].trim_end_matches('-').to_owned();
    let plain = Name::new(&format!("{}-root", short(58))).map_err(ApiError::internal)?;
    if tables.volumes.named(Some(project), &plain).is_none() {
        return Ok(plain);
    }
    let tail = id.simple().to_string().split_off(24);
    Name::new(&format!("{}-root-{tail}", short(49))).map_err(ApiError::internal)
}

/// A locally administered address out of the random bits of the VM's id.
fn mac(id: VmId) -> String {
    let bytes = id.0.as_bytes();
    format!("52:54:{:02x}:{:02x}:{:02x}:{:02x}", bytes[12], bytes[13], bytes[14], bytes[15])
}

#[expect(clippy::too_many_arguments, reason = "one plan, made of what the request names")]
fn plan(
    cloud: &Cloud,
    tables: &Tables,
    change: &mut Change,
    caller: &Caller,
    id: VmId,
    operation: Option<OperationId>,
    project: &Name,
    request: &VmCreate,
) -> Result<(), ApiError> {
    if tables.vms.named(Some(project), &request.name).is_some() {
        return Err(taken(Kind::Vm, &request.name));
    }
    if let Some(node) = &request.node
        && tables.nodes.named(None, node).is_none()
    {
        return Err(ApiError {
            field: Some("node".to_owned()),
            ..ApiError::not_found(Kind::Node, node.as_str())
        });
    }
    let mut image = |field: &str, name: &Option<String>| match name {
        None => Ok(None),
        Some(name) => image_use(cloud, tables, change, caller, project, field, name).map(Some),
    };
    let root = image("image", &request.image)?;
    let kernel = image("kernel", &request.kernel)?;
    let initrd = image("initrd", &request.initrd)?;
    let cdrom = image("cdrom", &request.cdrom)?;
    let kernel = match kernel {
        None => None,
        Some((kernel, _)) => Some(KernelBoot {
            kernel: raw_image(kernel, "kernel")?,
            initrd: initrd.map(|(initrd, _)| raw_image(initrd, "initrd")).transpose()?,
            cmdline: request.cmdline.clone().unwrap_or_default(),
        }),
    };
    if let Some((_, ImageContent::Kernel | ImageContent::Initrd)) = &root {
        return Err(ApiError::invalid("image", "that image is a kernel or an initrd and no disk")
            .hint("boot it directly: --kernel IMAGE --initrd IMAGE"));
    }
    let mut disks = Vec::new();
    if root.is_some() || request.disk.is_some() {
        let name = volume_name(tables, project, &request.name, id.into())?;
        let volume = root_volume(project, id, name, root.map(|(image, _)| image), request.disk)?;
        disks.push(VmDisk { volume: volume.metadata.id.into(), bus: request.disk_bus, owned: true });
        change.create(&volume)?;
    }
    if let Some(name) = &request.snapshot {
        disks = cloud.snapshot_disks(tables, change, caller, project, id, request, name)?;
    }
    let mut metadata = Metadata::new(id.into(), request.name.clone(), Some(project.clone()));
    metadata.labels = request.labels.clone();
    let now = metadata.created;
    let mut vm = Vm {
        metadata,
        spec: VmSpec {
            cpus: request.cpus,
            memory: request.memory,
            machine: request.machine,
            firmware: request.firmware,
            accelerator: request.accelerator,
            kernel,
            disks,
            cdrom: cdrom.map(|(cdrom, _)| raw_image(cdrom, "cdrom")).transpose()?,
            nics: vec![VmNic { mac: mac(id), model: request.nic_model, publish: request.publish.clone() }],
            node_selector: request.node_selector.clone(),
            node: request.node.clone(),
            power: if request.start { Power::Running } else { Power::Stopped },
        },
        status: VmStatus {
            phase: VmPhase::Pending,
            reason: None,
            node: None,
            task: operation.map(|operation| task(operation, VmAction::Start, now)),
            observed: None,
            node_silent: false,
        },
    };
    vm.status.phase = vm_phase(&vm.status);
    if let Some(operation) = operation {
        let operation = operation::begin(
            operation,
            Some(project.clone()),
            "vm.create",
            target(&vm),
            OperationPhase::Pending,
        )?;
        change.create(&operation)?;
    }
    change.create(&vm)
}

/// A task with the deadline of its action.
pub(crate) fn task(operation: OperationId, action: VmAction, now: Time) -> VmTask {
    let deadline = now.after(Duration::from_secs(action.deadline_secs().into()));
    VmTask { operation, action, requested: now, deadline }
}

/// Whether `new` may take `name` from `old`.
pub(crate) fn check_rename<T: crate::cache::Cached>(
    tables: &Tables,
    object: &T,
    name: &Name,
) -> Result<(), ApiError> {
    let metadata = object.metadata();
    match T::table(tables).named(metadata.project.as_ref(), name) {
        Some(other) if Resource::metadata(other.as_ref()).id != metadata.id => Err(taken(T::KIND, name)),
        Some(_) | None => Ok(()),
    }
}
