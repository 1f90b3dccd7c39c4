//! New volumes, and volumes that grow.

use std::sync::Arc;

use ostler_api::disk::DiskLimits;
use ostler_api::metadata::labels_check;
use ostler_api::operation::{Accepted, OperationPhase};
use ostler_api::snapshot::{Snapshot, SnapshotDisk};
use ostler_api::volume::{Volume, VolumeCreate, VolumePhase, VolumeSpec, VolumeStatus};
use ostler_api::{
    AcceleratorWish, ApiError, ByteSize, ErrorCode, Kind, Metadata, Name, OperationId, VolumeId,
};

use crate::cache::Tables;
use crate::caller::Caller;
use crate::clone::copy_of;
use crate::cloud::Cloud;
use crate::commit::Change;
use crate::event::target;
use crate::idempotency::{Idempotency, remember};
use crate::operation::begin;
use crate::permission::Verb;
use crate::scheduler::{Candidate, Need, place};
use crate::snapshot::check_quiet;
use crate::vm_create::{check_disk, image_use, taken};

/// `check_disk` speaks of the field of a VM.
fn check_size(size: ByteSize) -> Result<(), ApiError> {
    check_disk(size).map_err(|mut error| {
        error.field = Some("size".to_owned());
        error
    })
}

impl Cloud {
    /// A new volume on its own, placed at once: on the node it has to be on, or the one with most room.
    pub async fn volume_create(
        &self,
        caller: &Caller,
        project: Option<&str>,
        request: VolumeCreate,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted<Arc<Volume>>, ApiError> {
        labels_check(&request.labels).map_err(|error| ApiError::invalid("labels", error))?;
        request.size.map_or(Ok(()), check_size)?;
        check_limits(&request.limits)?;
        if request.image.is_some() && request.snapshot.is_some() {
            return Err(ApiError::invalid(
                "snapshot",
                "a volume begins as an image or as a snapshot, not as both",
            ));
        }
        if request.disk.is_some() && request.snapshot.is_none() {
            return Err(ApiError::invalid("disk", "only a snapshot has disks to choose from"));
        }
        if let Some(made) = self.made_before(caller, idempotency.as_ref()).await? {
            return self.accepted(caller, made.id, made.operation);
        }
        let (id, operation) = (VolumeId::new(), OperationId::new());
        self.commit(|tables, change| {
            let project = self.project(tables, caller, project, Verb::Create, Kind::Volume)?;
            let mut volume = self.plan_volume(tables, change, caller, &project, &request)?;
            volume.metadata.id = id.into();
            volume.metadata.labels.clone_from(&request.labels);
            volume.spec.protected = request.protected;
            volume.spec.limits = request.limits;
            volume.spec.cache = request.cache;
            volume.spec.discard = request.discard;
            volume.status.phase = VolumePhase::Creating;
            volume.status.node = Some(self.volume_node(tables, &volume, request.node.as_ref())?);
            change.create(&volume)?;
            let about = target(&volume);
            change.create(&begin(
                operation,
                Some(project),
                "volume.create",
                about,
                OperationPhase::Pending,
            )?)?;
            remember(change, caller, idempotency.as_ref(), id.into(), Some(operation))
        })
        .await?;
        self.accepted(caller, id.into(), Some(operation))
    }

    fn plan_volume(
        &self,
        tables: &Tables,
        change: &mut Change,
        caller: &Caller,
        project: &Name,
        request: &VolumeCreate,
    ) -> Result<Volume, ApiError> {
        if tables.volumes.named(Some(project), &request.name).is_some() {
            return Err(taken(Kind::Volume, &request.name));
        }
        if let Some(name) = &request.snapshot {
            let snapshot = self.snapshot_use(tables, change, caller, project, name)?;
            let disk = chosen(&snapshot, request.disk.as_deref())?;
            let mut volume = copy_of(project, request.name.clone(), &snapshot, disk);
            volume.spec.size = at_least(request.size, disk.size, "snapshot")?;
            return Ok(volume);
        }
        let spec = match &request.image {
            Some(name) => {
                let (image, _) = image_use(self, tables, change, caller, project, "image", name)?;
                let least = ByteSize(image.virtual_size.0.next_multiple_of(512));
                let size = at_least(request.size, least, "image")?;
                check_size(size)?;
                VolumeSpec { image: Some(image), ..VolumeSpec::blank(size) }
            }
            None => VolumeSpec::blank(request.size.ok_or_else(|| {
                ApiError::invalid("size", "a blank volume needs a size").hint("such as --size 10G")
            })?),
        };
        let metadata = Metadata::new(VolumeId::new().into(), request.name.clone(), Some(project.clone()));
        Ok(Volume { metadata, spec, status: VolumeStatus::pending() })
    }

    /// Where a new volume goes.
    fn volume_node(&self, tables: &Tables, volume: &Volume, wanted: Option<&Name>) -> Result<Name, ApiError> {
        let from = volume.spec.snapshot.as_ref().and_then(|from| tables.snapshots.get(from.snapshot.into()));
        let bound = from.and_then(|snapshot| snapshot.status.node.as_ref());
        if let Some(node) = wanted
            && tables.nodes.named(None, node).is_none()
        {
            return Err(ApiError {
                field: Some("node".to_owned()),
                ..ApiError::not_found(Kind::Node, node.as_str())
            });
        }
        if let (Some(bound), Some(wanted)) = (bound, wanted)
            && bound != wanted
        {
            return Err(ApiError::conflict(format!("the snapshot is on node {bound}, not on {wanted}"))
                .hint("leave the node out: a linked copy is where its snapshot is"));
        }
        let need = Need {
            cpus: 0,
            memory: ByteSize(0),
            disk: volume.spec.size,
            accelerator: AcceleratorWish::Auto,
            selector: Default::default(),
            node: bound.or(wanted).cloned(),
        };
        let candidates: Vec<Candidate> = tables
            .nodes
            .iter()
            .map(|node| {
                let used =
                    tables.on_node.get(&node.metadata.name).map(|on| on.allocation).unwrap_or_default();
                // A disk needs no QEMU to lie there.
                Candidate { hypervisor: true, ..Candidate::new(node, used) }
            })
            .collect();
        let index = place(&need, &candidates, &self.config.scheduler).map_err(|why| {
            ApiError::new(ErrorCode::NoCapacity, format!("the volume has no place: {}", why.message()))
                .hint("see the nodes: ostler node list")
        })?;
        Ok(candidates[index].name.clone())
    }

    /// Makes a volume larger, also while it is in use. Never smaller.
    pub async fn volume_resize(
        &self,
        caller: &Caller,
        project: Option<&str>,
        name: &str,
        size: ByteSize,
        idempotency: Option<Idempotency>,
    ) -> Result<Accepted<Arc<Volume>>, ApiError> {
        check_size(size)?;
        if let Some(made) = self.made_before(caller, idempotency.as_ref()).await? {
            return self.accepted(caller, made.id, made.operation);
        }
        let fresh = OperationId::new();
        let (id, operation) = self
            .commit(|tables, change| {
                let volume = self.find::<Volume>(tables, caller, Verb::Update, project, name)?;
                let id = volume.metadata.id;
                let now = volume.spec.size;
                if size < now {
                    return Err(ApiError::invalid(
                        "size",
                        format!("volume {} has {now}; it cannot shrink to {size}", volume.metadata.name),
                    )
                    .hint("what is beyond the new end would be lost: copy the data to a smaller volume"));
                }
                if size == now {
                    return Ok((id, tables.open_on(id).next()));
                }
                if !matches!(volume.status.phase, VolumePhase::Ready | VolumePhase::Pending) {
                    return Err(ApiError::conflict(format!("the volume is {}", volume.status.phase))
                        .hint("wait until it is ready: ostler volume show"));
                }
                check_quiet(tables, &volume)?;
                let mut new = Volume::clone(&volume);
                new.spec.size = size;
                change.update(volume.as_ref(), &new)?;
                let phase = match volume.status.node {
                    Some(_) => OperationPhase::Pending,
                    None => OperationPhase::Succeeded,
                };
                let project = volume.metadata.project.clone();
                change.create(&begin(fresh, project, "volume.resize", target(volume.as_ref()), phase)?)?;
                remember(change, caller, idempotency.as_ref(), id, Some(fresh))?;
                Ok((id, Some(fresh)))
            })
            .await?;
        self.accepted(caller, id, operation)
    }
}

pub(crate) fn check_limits(limits: &DiskLimits) -> Result<(), ApiError> {
    limits.check().map_err(|(field, why)| ApiError::invalid(format!("limits.{field}"), why))
}

/// The size asked for, if the source fits into it; the source's when none is asked for.
fn at_least(size: Option<ByteSize>, least: ByteSize, what: &str) -> Result<ByteSize, ApiError> {
    let size = size.unwrap_or(least);
    if size < least {
        return Err(ApiError::invalid("size", format!("the {what} is {least}; {size} is too small for it"))
            .hint(format!("leave the size out to take the {what}'s")));
    }
    Ok(size)
}

/// The disk of a snapshot that is meant.
fn chosen<'a>(snapshot: &'a Snapshot, name: Option<&str>) -> Result<&'a SnapshotDisk, ApiError> {
    let disks = &snapshot.spec.disks;
    let names = || disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
    match (name, disks.as_slice()) {
        (None, [only]) => Ok(only),
        (None, _) => Err(ApiError::invalid("disk", format!("the snapshot has several disks: {}", names()))
            .hint("name one of them")),
        (Some(name), _) => disks.iter().find(|disk| disk.name == *name).ok_or_else(|| {
            ApiError::invalid("disk", format!("the snapshot has no disk {name:?}; it has {}", names()))
        }),
    }
}
