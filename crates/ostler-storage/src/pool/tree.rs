//! The layers, volumes and snapshots of a pool as data, and what follows from them. No I/O.
//!
//! Who uses it: the simulated pool keeps one; the directory pool reads one from its files when it must look at all of them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Merge, NewVolume, VolumeSource, conflict};
use crate::{ImageRef, StorageError};

/// Longest chain that is read, in layers without the image.
pub(super) const MAX_DEPTH: usize = 64;

/// What a layer stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Base {
    Nothing,
    Image(Arc<ImageRef>),
    Layer(Uuid),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) size: u64,
    pub(super) used: u64,
    pub(super) base: Base,
}

/// A snapshot as it is kept. With `next` it is prepared and not yet committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    pub(super) volume: Uuid,
    pub(super) layer: Uuid,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) next: Option<Uuid>,
}

/// Why a chain cannot be followed to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainError {
    #[error("its layer {0} is missing")]
    Missing(Uuid),
    #[error("its layers form a circle at {0}")]
    Circle(Uuid),
    #[error("it has more than {MAX_DEPTH} layers")]
    TooDeep,
}

/// A volume's layers, top first, and the image under them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) layers: Vec<(Uuid, Node)>,
    pub(super) image: Option<Arc<ImageRef>>,
}

impl Chain {
    /// Follows a chain down from `top` through whatever knows the layers.
    pub(super) fn follow<E: From<ChainError>>(
        top: Uuid,
        mut get: impl FnMut(Uuid) -> Result<Option<Node>, E>,
    ) -> Result<Self, E> {
        let mut layers: Vec<(Uuid, Node)> = Vec::new();
        let mut next = top;
        loop {
            if layers.iter().any(|(id, _)| *id == next) {
                return Err(ChainError::Circle(next).into());
            }
            if layers.len() == MAX_DEPTH {
                return Err(ChainError::TooDeep.into());
            }
            let node = get(next)?.ok_or(ChainError::Missing(next))?;
            let base = node.base.clone();
            layers.push((next, node));
            match base {
                Base::Nothing => return Ok(Self { layers, image: None }),
                Base::Image(image) => return Ok(Self { layers, image: Some(image) }),
                Base::Layer(below) => next = below,
            }
        }
    }

    pub(super) fn top(&self) -> &Node {
        &self.layers[0].1
    }

    pub(super) fn depth(&self) -> u32 {
        self.layers.len() as u32
    }

    /// Refuses to put one more layer on a chain that is as long as may be.
    pub(super) fn check_room(&self) -> Result<(), StorageError> {
        if self.layers.len() < MAX_DEPTH {
            return Ok(());
        }
        Err(StorageError::Invalid {
            what: "snapshot",
            why: format!("its chain has {MAX_DEPTH} layers, which is the limit; flatten or merge it first"),
        })
    }
}

/// Everything in a pool but its images.
#[derive(Debug, Default)]
pub(super) struct Tree {
    pub(super) layers: HashMap<Uuid, Node>,
    /// Each volume's top.
    pub(super) volumes: HashMap<Uuid, Uuid>,
    pub(super) snapshots: HashMap<Uuid, Record>,
}

impl Tree {
    pub(super) fn chain(&self, top: Uuid) -> Result<Chain, ChainError> {
        Chain::follow(top, |id| Ok(self.layers.get(&id).cloned()))
    }

    /// The layers that volumes and snapshots point to. What was prepared for a volume that is gone is not needed.
    fn roots(&self) -> impl Iterator<Item = Uuid> {
        let snapshots = self.snapshots.values().flat_map(|record| {
            let next = record.next.filter(|_| self.volumes.contains_key(&record.volume));
            [Some(record.layer), next].into_iter().flatten()
        });
        self.volumes.values().copied().chain(snapshots)
    }

    /// The given layers and all that they stand on.
    fn reach(&self, roots: impl IntoIterator<Item = Uuid>) -> HashSet<Uuid> {
        let mut seen = HashSet::new();
        for root in roots {
            let mut at = Some(root);
            while let Some(id) = at {
                if !seen.insert(id) {
                    break;
                }
                at = match self.layers.get(&id).map(|node| &node.base) {
                    Some(Base::Layer(below)) => Some(*below),
                    Some(Base::Nothing | Base::Image(_)) | None => None,
                };
            }
        }
        seen
    }

    pub(super) fn needed(&self) -> HashSet<Uuid> {
        self.reach(self.roots())
    }

    /// The layers that can go, each before what it stands on.
    pub(super) fn garbage(&self, in_use: &HashSet<Uuid>) -> Vec<Uuid> {
        let needed = self.reach(self.roots().chain(in_use.iter().copied()));
        let mut garbage: Vec<(usize, Uuid)> = self
            .layers
            .keys()
            .filter(|id| !needed.contains(id))
            .map(|id| (self.reach([*id]).len(), *id))
            .collect();
        garbage.sort_unstable_by(|a, b| b.cmp(a));
        garbage.into_iter().map(|(_, id)| id).collect()
    }

    /// Layers that stand on `layer`, garbage left out.
    fn children<'a>(&'a self, needed: &'a HashSet<Uuid>) -> HashMap<Uuid, Vec<Uuid>> {
        let mut children: HashMap<Uuid, Vec<Uuid>> = HashMap::new();
        for (id, node) in &self.layers {
            if let Base::Layer(below) = node.base
                && needed.contains(id)
            {
                children.entry(below).or_default().push(*id);
            }
        }
        children
    }

    fn pinned(&self) -> HashSet<Uuid> {
        self.roots().collect()
    }

    pub(super) fn merge_candidates(&self) -> Vec<Merge> {
        let needed = self.needed();
        let pinned = self.pinned();
        let mut merges: Vec<Merge> = self
            .children(&needed)
            .into_iter()
            .filter(|(layer, _)| !pinned.contains(layer))
            .filter_map(|(layer, children)| match children[..] {
                [into_child] => Some(Merge { layer, into_child }),
                _ => None,
            })
            .collect();
        merges.sort_unstable_by_key(|merge| merge.layer);
        merges
    }

    /// Whether a merge has something to do: false when the child does not stand on the layer any more.
    pub(super) fn merge_check(&self, layer: Uuid, child: Uuid) -> Result<bool, StorageError> {
        let node = self
            .layers
            .get(&child)
            .ok_or_else(|| StorageError::NotFound { what: format!("layer {child}") })?;
        if node.base != Base::Layer(layer) {
            let below = self.chain(child).map(|chain| chain.layers.iter().any(|(id, _)| *id == layer));
            return match below {
                Ok(false) => Ok(false),
                Ok(true) | Err(_) => Err(conflict(
                    format!("layer {child}"),
                    format!("it does not stand directly on layer {layer}"),
                )),
            };
        }
        let by = if self.pinned().contains(&layer) {
            "a volume or a snapshot".to_owned()
        } else {
            let needed = self.needed();
            let children = self.children(&needed).remove(&layer).unwrap_or_default();
            match children.iter().find(|other| **other != child) {
                Some(other) => format!("layer {other}"),
                None => return Ok(true),
            }
        };
        Err(StorageError::InUse { what: format!("layer {layer}"), by })
    }

    /// Bytes that only this volume and its own snapshots need, in the chain of its top.
    pub(super) fn own_bytes(&self, volume: Uuid, chain: &Chain) -> u64 {
        let tops = self.volumes.iter().filter(|(id, _)| **id != volume).map(|(_, top)| *top);
        let snapshots = self
            .snapshots
            .values()
            .filter(|record| record.volume != volume)
            .flat_map(|record| [Some(record.layer), record.next].into_iter().flatten());
        let shared = self.reach(tops.chain(snapshots));
        chain.layers.iter().filter(|(id, _)| !shared.contains(id)).map(|(_, node)| node.used).sum()
    }

    /// Snapshots of a volume that are prepared and not committed.
    pub(super) fn prepared(&self, volume: Uuid) -> Vec<Uuid> {
        prepared(&self.snapshots, volume)
    }
}

/// Snapshots of a volume that are prepared and not committed.
pub(super) fn prepared(snapshots: &HashMap<Uuid, Record>, volume: Uuid) -> Vec<Uuid> {
    snapshots
        .iter()
        .filter(|(_, record)| record.volume == volume && record.next.is_some())
        .map(|(id, _)| *id)
        .collect()
}

impl Record {
    /// Refuses a snapshot that is another volume's.
    pub(super) fn check_volume(&self, snapshot: Uuid, volume: Uuid) -> Result<(), StorageError> {
        if self.volume == volume {
            return Ok(());
        }
        let difference = format!("it is of volume {} and not of {volume}", self.volume);
        Err(conflict(format!("snapshot {snapshot}"), difference))
    }

    /// Refuses a snapshot that is not committed.
    pub(super) fn check_committed(&self, snapshot: Uuid) -> Result<(), StorageError> {
        match self.next {
            None => Ok(()),
            Some(_) => Err(StorageError::Busy { what: format!("snapshot {snapshot}, which is being made,") }),
        }
    }
}

/// Checks that a volume which exists is the one asked for. `snapshot` is the record of the snapshot asked for, if there is
/// one still.
pub(super) fn check_same(
    volume: &NewVolume,
    existing: &Node,
    snapshot: Option<&Record>,
) -> Result<(), StorageError> {
    let same = match (&volume.source, &existing.base) {
        (VolumeSource::Blank, Base::Nothing) => true,
        (VolumeSource::Image { image, .. }, Base::Image(base)) => **base == *image,
        (VolumeSource::Snapshot { .. }, Base::Layer(base)) => {
            snapshot.is_none_or(|record| record.layer == *base)
        }
        (VolumeSource::Blank | VolumeSource::Image { .. } | VolumeSource::Snapshot { .. }, _) => false,
    };
    let difference = if existing.size != volume.size {
        format!("it has {} bytes and {} were asked for", existing.size, volume.size)
    } else if !same {
        let is = match &existing.base {
            Base::Nothing => "blank".to_owned(),
            Base::Image(image) => format!("made from {image}"),
            Base::Layer(layer) => format!("over layer {layer}"),
        };
        let wanted = match &volume.source {
            VolumeSource::Blank => "a blank one".to_owned(),
            VolumeSource::Image { image, .. } => format!("one from {image}"),
            VolumeSource::Snapshot { snapshot } => format!("one from snapshot {snapshot}"),
        };
        format!("it is {is} and {wanted} was asked for")
    } else {
        return Ok(());
    };
    Err(conflict(format!("volume {}", volume.id), difference))
}

/// Refuses to make again a volume of which snapshots still need layers.
pub(super) fn hidden(volume: Uuid) -> StorageError {
    conflict(
        format!("volume {volume}"),
        "it was deleted and snapshots still need its data; use another id".to_owned(),
    )
}
