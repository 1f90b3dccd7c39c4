//! New layers on top of several disks at one instant: all are opened first, then one transaction puts them in place.

use std::time::Duration;

use tokio::time::Instant;

use super::{Desk, Disk};
use crate::args::{self, NodeOptions, names};
use crate::disk::{DiskDiscard, SnapshotDisk};
use crate::error::{DiskError, Result};
use crate::qemu::machine::QemuMachine;
use crate::qmp::block::{BlockNodeInfo, DetectZeroes, TransactionAction};
use crate::qmp::commands::{BlockdevAdd, Transaction};

impl QemuMachine {
    pub(in crate::qemu) async fn snapshot_disks(&self, wanted: Vec<SnapshotDisk>) -> Result<Duration> {
        for (number, disk) in wanted.iter().enumerate() {
            args::new_layer(&disk.id, &disk.overlay).map_err(DiskError::from)?;
            if wanted[..number].iter().any(|earlier| earlier.id == disk.id) {
                return Err(DiskError::invalid("disks", format!("'{}' is given twice", disk.id)).into());
            }
        }
        let desk = self.desk().await?;
        let mut disks = Vec::with_capacity(wanted.len());
        for disk in &wanted {
            desk.sweep(&disk.id).await?;
            disks.push(desk.disk(&disk.id).await?);
        }
        let pairs: Vec<_> = wanted.iter().zip(&disks).collect();
        let in_place = |(new, now): &(&SnapshotDisk, &Disk)| now.node_name == overlay_node(new);
        let missing = pairs.iter().find(|pair| !in_place(pair));
        let Some((lacking, _)) = missing else { return Ok(Duration::ZERO) };
        if pairs.iter().any(in_place) {
            return Err(DiskError::PartOfSnapshot { disk: lacking.id.clone() }.into());
        }
        let taken = desk.snapshot(&pairs).await;
        if taken.is_err() {
            for disk in &wanted {
                desk.undo(&disk.id).await;
            }
        }
        taken
    }
}

fn overlay_node(disk: &SnapshotDisk) -> String {
    names::named_node(&disk.id, disk.overlay.name.as_deref().unwrap_or_default())
}

/// How the disk is opened now. QEMU does not tell about discards, but the two are set together.
fn options(top: &BlockNodeInfo) -> NodeOptions {
    NodeOptions {
        direct: top.cache.direct,
        discard: match top.detect_zeroes {
            DetectZeroes::Unmap => DiskDiscard::Unmap,
            DetectZeroes::On | DetectZeroes::Off => DiskDiscard::Ignore,
        },
    }
}

impl Desk<'_> {
    async fn snapshot(&self, pairs: &[(&SnapshotDisk, &Disk)]) -> Result<Duration> {
        let mut files = Vec::with_capacity(pairs.len());
        for (new, now) in pairs {
            if now.top.ro {
                return Err(DiskError::ReadOnly { disk: new.id.clone() }.into());
            }
            files.extend(self.open(&new.id, vec![(new.overlay.path.clone(), true)]).await?);
        }
        let first_set = self.hand_over(files).await?;
        for (set, (new, now)) in (first_set..).zip(pairs) {
            let name = overlay_node(new);
            let node = args::layer_node(&name, new.overlay.format, set, false, options(&now.top), None);
            self.qmp.execute(&BlockdevAdd(node)).await?;
        }
        self.check_sizes(pairs).await?;
        let actions = pairs
            .iter()
            .map(|(new, now)| TransactionAction::BlockdevSnapshot {
                node: now.node_name.clone(),
                overlay: overlay_node(new),
            })
            .collect();
        let began = Instant::now();
        self.qmp.execute(&Transaction { actions }).await?;
        Ok(began.elapsed())
    }

    /// QEMU would put a layer of any size on top, and the guest's disk would change under it.
    async fn check_sizes(&self, pairs: &[(&SnapshotDisk, &Disk)]) -> Result<()> {
        let nodes = self.nodes().await?;
        for (new, now) in pairs {
            let name = overlay_node(new);
            let overlay = nodes.iter().find(|node| node.node_name.as_deref() == Some(&name));
            let overlay = overlay.map_or(0, |node| node.image.virtual_size);
            let size = now.top.image.virtual_size;
            if overlay != size {
                return Err(DiskError::SizeDiffers { disk: new.id.clone(), size, overlay }.into());
            }
        }
        Ok(())
    }
}
