//! The care of layers in a directory: garbage, merging, flattening, growing, checks, and what does not add up.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::{
    Inner,
    layer::{Role, Unclean, image_name, layer_name},
    work::WorkLock,
};
use crate::{
    ImageFormat, ImageRef, StorageError,
    files::{self, Context, LockKind},
    pool::{
        Audit, Broken, CheckReport, Merge, Orphan, VolumeInfo, Work, check_grow,
        tree::{Base, Chain},
        volume_missing,
    },
    tool::Stack,
};

impl Inner {
    pub(super) fn collect(&self, in_use: &HashSet<Uuid>) -> Result<Vec<Uuid>, StorageError> {
        let _lock = self.exclusive()?;
        let mut scan = self.scan()?;
        scan.check_whole(|id| self.layer_path(id))?;
        let mut gone = Vec::new();
        for id in scan.tree.garbage(in_use) {
            // Someone may still work on a layer that was needed when it began.
            if let Ok(_work) = self.work_lock(id, LockKind::Exclusive)
                && files::remove(&self.layer_path(id))?
            {
                gone.push(id);
            }
        }
        if !gone.is_empty() {
            files::sync_dir(&self.volumes)?;
        }
        // Only now the notes that they were no volumes.
        let mut noted = false;
        for (id, role) in &scan.roles {
            if *role == Role::Layer && !self.layer_exists(*id)? {
                noted |= files::remove(&self.role_path(*id))?;
            }
        }
        if noted {
            files::sync_dir(&self.volumes)?;
        }
        Ok(gone)
    }

    pub(super) fn merge_candidates(&self) -> Result<Vec<Merge>, StorageError> {
        let _lock = self.shared()?;
        Ok(self.scan()?.tree.merge_candidates())
    }

    pub(super) fn merge(&self, layer: Uuid, child: Uuid, work: &Work) -> Result<(), StorageError> {
        let (chain, _locks) = {
            let _lock = self.shared()?;
            let mut scan = self.scan()?;
            if let Some(error) = scan.layers_damaged.remove(&child) {
                return Err(error);
            }
            if !scan.tree.merge_check(layer, child)? {
                return Ok(());
            }
            let chain = self.chain(child, Unclean::Refuse)?;
            let locks = self.work_locks(&chain, LockKind::Exclusive)?;
            (chain, locks)
        };
        let base = match chain.layers.get(1).map(|(_, node)| &node.base) {
            Some(Base::Layer(below)) => Some((layer_name(*below), ImageFormat::Qcow2)),
            Some(Base::Image(image)) => Some((image_name(image)?, image.format)),
            Some(Base::Nothing) | None => None,
        };
        self.rebase(&chain, base, work)
    }

    pub(super) fn flatten(&self, volume: Uuid, work: &Work) -> Result<(), StorageError> {
        let (chain, _locks) = self.closed(volume)?;
        match chain.top().base {
            Base::Nothing => Ok(()),
            Base::Image(_) | Base::Layer(_) => self.rebase(&chain, None, work),
        }
    }

    fn rebase(
        &self,
        chain: &Chain,
        base: Option<(String, ImageFormat)>,
        work: &Work,
    ) -> Result<(), StorageError> {
        let stack = self.stack(chain, chain.top().size)?;
        let base = base.as_ref().map(|(name, format)| (name.as_str(), *format));
        let done = self.tool.rebase(&stack, base, &work.cancel, |done| work.advance(done));
        sync(&stack.top)?;
        done.map_err(StorageError::from)
    }

    /// A volume's chain with its top locked for long work, after what was prepared is committed.
    fn closed(&self, volume: Uuid) -> Result<(Chain, Vec<WorkLock>), StorageError> {
        let _lock = self.exclusive()?;
        self.recover_locked(volume)?;
        let chain = self.chain(self.top_of(volume)?, Unclean::Refuse)?;
        let locks = self.work_locks(&chain, LockKind::Exclusive)?;
        Ok((chain, locks))
    }

    pub(super) fn volume_grow(&self, id: Uuid, size: u64, work: &Work) -> Result<VolumeInfo, StorageError> {
        let (chain, locks) = self.closed(id)?;
        if check_grow(chain.top().size, size)? {
            let stack = self.stack(&chain, size)?;
            self.tool.resize(&stack, size, &work.cancel)?;
            sync(&stack.top)?;
        }
        drop(locks);
        self.volume_info(id)?.ok_or_else(|| volume_missing(id))
    }

    pub(super) fn volume_check(
        &self,
        id: Uuid,
        repair: bool,
        work: &Work,
    ) -> Result<CheckReport, StorageError> {
        let kind = if repair { LockKind::Exclusive } else { LockKind::Shared };
        let (chain, _locks) = {
            let _lock = self.shared()?;
            let chain = self.chain(self.top_of(id)?, Unclean::Accept)?;
            let locks = self.work_locks(&chain, kind)?;
            (chain, locks)
        };
        let mut report = CheckReport::default();
        let steps = u64::from(chain.depth());
        for at in 0..chain.layers.len() {
            let part = Chain { layers: chain.layers[at..].to_vec(), image: chain.image.clone() };
            let stack = self.stack(&part, part.top().size)?;
            let found = self.tool.check_layer(&stack, repair && at == 0, &work.cancel)?;
            report.leaks += found.leaks;
            report.corruptions += found.corruptions;
            report.repaired += found.repaired;
            work.advance((at as u64 + 1) * 10_000 / steps);
        }
        if repair {
            sync(&self.layer_path(chain.layers[0].0))?;
        }
        report.clean = report.corruptions == 0;
        Ok(report)
    }

    /// The files of a chain for the tool, whose top may come to hold `size` guest bytes.
    fn stack(&self, chain: &Chain, size: u64) -> Result<Stack, StorageError> {
        let mut files = self.files(chain)?.into_iter().map(|layer| layer.path);
        let top = files.next().expect("a chain has a top");
        let now = fs::metadata(&top).context("look at", &top)?.len();
        // Every guest block anew, its tables, and what leaked before.
        let max_size = now + size + size / 1024 + (64 << 20);
        Ok(Stack { top, below: files.collect(), max_size })
    }

    pub(super) fn audit(&self) -> Result<Audit, StorageError> {
        let _lock = self.shared()?;
        let scan = self.scan()?;
        let mut audit = Audit::default();
        for path in &scan.strays {
            audit.orphans.extend(orphan(path, "its name is none that a pool gives"));
        }
        for path in self.image_strays()? {
            audit.orphans.extend(orphan(&path, "it is not an image"));
        }
        let needed = scan.tree.needed();
        for id in scan.tree.layers.keys().chain(scan.layers_damaged.keys()) {
            let why = "no volume, snapshot or layer needs it; it goes with the next collection";
            if !needed.contains(id) {
                audit.orphans.extend(orphan(&self.layer_path(*id), why));
            }
        }
        for (id, role) in &scan.roles {
            if *role == Role::Layer && !self.layer_exists(*id)? {
                audit.orphans.extend(orphan(&self.role_path(*id), "its layer is gone"));
            }
        }
        for (id, error) in &scan.roles_damaged {
            audit.broken.push(Broken::Volume { id: *id, why: text(error) });
        }
        for (id, error) in &scan.records_damaged {
            audit.broken.push(Broken::Snapshot { id: *id, why: text(error) });
        }
        for (id, top) in &scan.tree.volumes {
            if let Some(why) = self.fault(*top) {
                audit.broken.push(Broken::Volume { id: *id, why });
            }
        }
        for (id, record) in &scan.tree.snapshots {
            if let Some(why) = self.fault(record.layer) {
                audit.broken.push(Broken::Snapshot { id: *id, why });
            }
        }
        Ok(audit)
    }

    /// Why a chain cannot be opened.
    fn fault(&self, top: Uuid) -> Option<String> {
        self.chain(top, Unclean::Refuse).err().map(|error| text(&error))
    }

    fn image_strays(&self) -> Result<Vec<PathBuf>, StorageError> {
        let mut strays = Vec::new();
        for entry in fs::read_dir(&self.images).context("list", &self.images)? {
            let entry = entry.context("list", &self.images)?;
            let name = entry.file_name();
            let ours = name.as_encoded_bytes().starts_with(super::SCRATCH.as_bytes())
                || name.to_str().and_then(ImageRef::from_file_name).is_some();
            if !ours {
                strays.push(entry.path());
            }
        }
        Ok(strays)
    }
}

/// An error and what is behind it, in one line.
fn text(error: &StorageError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// A file that still is there, for the report.
fn orphan(path: &Path, why: &str) -> Option<Orphan> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some(Orphan { path: path.to_owned(), bytes: metadata.blocks() * 512, why: why.to_owned() })
}

/// What a tool has written survives a crash of the machine.
fn sync(path: &Path) -> Result<(), StorageError> {
    fs::File::open(path).and_then(|file| file.sync_all()).context("sync", path)
}
