//! A look at every file of a pool: the tree that they make, and what does not fit in.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::{
    Inner, SCRATCH,
    layer::{Role, Unclean},
};
use crate::{
    ImageRef, StorageError,
    files::Context,
    pool::tree::{Base, Record, Tree},
};

/// What a pool's files say.
pub(super) struct Scan {
    pub(super) tree: Tree,
    pub(super) roles: HashMap<Uuid, Role>,
    /// Files that cannot be read, or not be believed.
    pub(super) layers_damaged: HashMap<Uuid, StorageError>,
    pub(super) roles_damaged: HashMap<Uuid, StorageError>,
    pub(super) records_damaged: HashMap<Uuid, StorageError>,
    /// Files with names that we never give.
    pub(super) strays: Vec<PathBuf>,
}

/// The snapshots of a pool.
#[derive(Default)]
pub(super) struct Records {
    pub(super) read: HashMap<Uuid, Record>,
    /// Those that cannot be read.
    pub(super) damaged: HashMap<Uuid, StorageError>,
}

/// What the names in the folder of volumes say.
struct Names {
    layers: HashSet<Uuid>,
    roles: HashSet<Uuid>,
    strays: Vec<PathBuf>,
}

impl Inner {
    fn names(&self) -> Result<Names, StorageError> {
        let mut names = Names { layers: HashSet::new(), roles: HashSet::new(), strays: Vec::new() };
        for name in list(&self.volumes)? {
            if let Some(id) = id_of(&name, ".qcow2") {
                names.layers.insert(id);
            } else if let Some(id) = id_of(&name, ".json") {
                names.roles.insert(id);
            } else {
                names.strays.push(self.volumes.join(name));
            }
        }
        Ok(names)
    }

    /// Every volume and its top. One whose pointer cannot be read is listed as its own top.
    pub(super) fn tops(&self) -> Result<HashMap<Uuid, Uuid>, StorageError> {
        let names = self.names()?;
        let mut tops: HashMap<Uuid, Uuid> =
            names.layers.difference(&names.roles).map(|id| (*id, *id)).collect();
        for id in names.roles {
            match self.role(id) {
                Ok(Some(Role::Top(top))) => drop(tops.insert(id, top)),
                Ok(Some(Role::Layer) | None) => {}
                Err(_) => drop(tops.insert(id, id)),
            }
        }
        Ok(tops)
    }

    /// Every snapshot that can be read; the damaged ones are told apart.
    pub(super) fn records(&self) -> Result<Records, StorageError> {
        let mut records = Records::default();
        for name in list(&self.snapshots)? {
            let Some(id) = id_of(&name, ".json") else { continue };
            match self.record(id) {
                Ok(Some(record)) => drop(records.read.insert(id, record)),
                Ok(None) => {}
                Err(error) => drop(records.damaged.insert(id, error)),
            }
        }
        Ok(records)
    }

    /// Reads everything. The caller holds a lock.
    pub(super) fn scan(&self) -> Result<Scan, StorageError> {
        let names = self.names()?;
        let Records { read: snapshots, damaged: records_damaged } = self.records()?;
        let mut scan = Scan {
            tree: Tree { snapshots, ..Tree::default() },
            roles: HashMap::new(),
            layers_damaged: HashMap::new(),
            roles_damaged: HashMap::new(),
            records_damaged,
            strays: names.strays,
        };
        for name in list(&self.snapshots)? {
            if id_of(&name, ".json").is_none() {
                scan.strays.push(self.snapshots.join(name));
            }
        }
        for id in &names.layers {
            match self.layer_read(*id, Unclean::Accept) {
                Ok(Some(node)) => drop(scan.tree.layers.insert(*id, node)),
                Ok(None) => {}
                Err(error) => drop(scan.layers_damaged.insert(*id, error)),
            }
            if !names.roles.contains(id) {
                scan.tree.volumes.insert(*id, *id);
            }
        }
        for id in names.roles {
            match self.role(id) {
                Ok(Some(role)) => {
                    scan.roles.insert(id, role);
                    if let Role::Top(top) = role {
                        scan.tree.volumes.insert(id, top);
                    }
                }
                Ok(None) => {}
                Err(error) => drop(scan.roles_damaged.insert(id, error)),
            }
        }
        Ok(scan)
    }
}

impl Scan {
    /// Who stands on an image, or may do so.
    pub(super) fn image_holder(&self, image: &ImageRef) -> Option<String> {
        if let Some(id) = self.layers_damaged.keys().next() {
            // A layer that cannot be read may stand on anything.
            return Some(format!("volume {id}, maybe: its header cannot be read"));
        }
        let holds = |base: &Base| matches!(base, Base::Image(base) if **base == *image);
        let layer = self.tree.layers.iter().find(|(_, node)| holds(&node.base)).map(|(id, _)| *id)?;
        let volume = self.tree.volumes.iter().find(|(_, top)| **top == layer);
        Some(match volume {
            Some((volume, _)) => format!("volume {volume}"),
            None => format!("layer {layer}, on which snapshots or volumes stand"),
        })
    }

    /// Refuses to go on unless every chain that is needed can be followed to its end.
    pub(super) fn check_whole(&mut self, path: impl Fn(Uuid) -> PathBuf) -> Result<(), StorageError> {
        for damaged in [&mut self.roles_damaged, &mut self.records_damaged] {
            let first = damaged.keys().next().copied();
            if let Some(error) = first.and_then(|id| damaged.remove(&id)) {
                return Err(error);
            }
        }
        let volumes = self.tree.volumes.values();
        let roots: Vec<Uuid> =
            volumes.copied().chain(self.tree.snapshots.values().map(|record| record.layer)).collect();
        for root in roots {
            if let Err(error) = self.tree.chain(root) {
                return Err(self
                    .layers_damaged
                    .remove(&root)
                    .unwrap_or_else(|| StorageError::Damaged { path: path(root), why: error.to_string() }));
            }
        }
        Ok(())
    }
}

/// The names in a folder, without files that are not whole yet.
fn list(folder: &Path) -> Result<Vec<OsString>, StorageError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).context("list", folder)? {
        let name = entry.context("list", folder)?.file_name();
        if !name.as_encoded_bytes().starts_with(SCRATCH.as_bytes()) {
            names.push(name);
        }
    }
    Ok(names)
}

/// The id in a name that is exactly as we write it.
fn id_of(name: &OsString, suffix: &str) -> Option<Uuid> {
    let text = name.to_str()?.strip_suffix(suffix)?;
    text.parse().ok().filter(|id: &Uuid| id.to_string() == text)
}
