//! Where records are kept: a directory, in which each is replaced in one step, or memory for simulated hosts.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ostler_api::{VmId, VolumeId};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::record::{Record, Seen, VolumeRecord};

/// How much a write must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durable {
    /// The end of the agent. Enough for what is void after a restart of the host.
    Agent,
    /// A power failure.
    Host,
}

/// Where records are kept.
#[derive(Debug, Clone)]
pub struct Keep(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Directory(Arc<Directory>),
    Memory(Arc<Mutex<Memory>>),
}

#[derive(Debug)]
struct Directory {
    path: PathBuf,
    /// The newest write of each VM's record. A disk that hung must not let an older one have the last word.
    newest: Mutex<HashMap<VmId, Arc<Mutex<u64>>>>,
    writes: AtomicU64,
}

impl Directory {
    fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.path.join(path)
    }
}

#[derive(Debug, Default)]
struct Memory {
    vms: HashMap<VmId, Record>,
    /// Everything that is small: JSON by file name.
    rest: HashMap<String, String>,
}

impl Keep {
    pub fn directory(data_dir: &Path) -> Self {
        let path = data_dir.to_owned();
        Self(Kind::Directory(Arc::new(Directory {
            path,
            newest: Mutex::default(),
            writes: AtomicU64::new(0),
        })))
    }

    /// Clones share their content.
    pub fn memory() -> Self {
        Self(Kind::Memory(Arc::default()))
    }

    pub(crate) fn on_disk(&self) -> bool {
        matches!(self.0, Kind::Directory(_))
    }

    /// Removes what an agent left that was killed while it wrote. Called before anything is written.
    pub(crate) async fn sweep(&self) -> io::Result<()> {
        match &self.0 {
            Kind::Memory(_) => Ok(()),
            Kind::Directory(dir) => {
                let path = dir.path.clone();
                blocking(move || {
                    sweep(&path);
                    Ok(())
                })
                .await
            }
        }
    }

    /// Every record; one that cannot be read is passed over with a warning.
    pub(crate) async fn vms(&self) -> io::Result<HashMap<VmId, Record>> {
        match &self.0 {
            Kind::Memory(memory) => Ok(memory.lock().vms.clone()),
            Kind::Directory(dir) => {
                let dir = dir.join("vms");
                blocking(move || read_all(&dir, |dir| dir.join("record.json"))).await
            }
        }
    }

    pub(crate) async fn vm_put(&self, vm: VmId, record: &Record, durable: Durable) -> io::Result<()> {
        match &self.0 {
            Kind::Memory(memory) => {
                memory.lock().vms.insert(vm, record.clone());
                Ok(())
            }
            Kind::Directory(dir) => {
                let path = dir.join("vms").join(vm.to_string()).join("record.json");
                let text = json(record)?;
                let number = dir.writes.fetch_add(1, Ordering::Relaxed) + 1;
                let newest = Arc::clone(dir.newest.lock().entry(vm).or_default());
                let write = move || {
                    let mut newest = newest.lock();
                    if *newest > number {
                        return Ok(());
                    }
                    *newest = number;
                    replace(&path, &text, durable)
                };
                blocking(write).await
            }
        }
    }

    /// Drops everything that is kept of a VM, its record last. Fine when there is nothing.
    pub(crate) async fn vm_drop(&self, vm: VmId) -> io::Result<()> {
        match &self.0 {
            Kind::Memory(memory) => {
                memory.lock().vms.remove(&vm);
                Ok(())
            }
            Kind::Directory(dir) => {
                let number = dir.writes.fetch_add(1, Ordering::Relaxed) + 1;
                let newest = dir.newest.lock().remove(&vm).unwrap_or_default();
                let dir = dir.join("vms").join(vm.to_string());
                let remove = move || {
                    let mut newest = newest.lock();
                    *newest = number;
                    drop_dir(&dir)
                };
                blocking(remove).await
            }
        }
    }

    pub(crate) async fn volumes(&self) -> io::Result<HashMap<VolumeId, VolumeRecord>> {
        match &self.0 {
            Kind::Memory(memory) => {
                let memory = memory.lock();
                let volumes = memory.rest.iter().filter_map(|(name, text)| {
                    let id = name.strip_prefix("volumes/")?.strip_suffix(".json")?.parse().ok()?;
                    Some((id, serde_json::from_str(text).ok()?))
                });
                Ok(volumes.collect())
            }
            Kind::Directory(dir) => {
                let dir = dir.join("volumes");
                blocking(move || read_all(&dir, Path::to_owned)).await
            }
        }
    }

    pub(crate) async fn volume_put(&self, volume: VolumeId, record: &VolumeRecord) -> io::Result<()> {
        self.put(format!("volumes/{volume}.json"), json(record)?, Durable::Agent).await
    }

    pub(crate) async fn volume_drop(&self, volume: VolumeId) -> io::Result<()> {
        let name = format!("volumes/{volume}.json");
        match &self.0 {
            Kind::Memory(memory) => {
                memory.lock().rest.remove(&name);
                Ok(())
            }
            Kind::Directory(dir) => {
                let path = dir.join(name);
                blocking(move || gone_is_fine(std::fs::remove_file(path))).await
            }
        }
    }

    pub(crate) async fn seen(&self) -> io::Result<Seen> {
        Ok(self.get("seen.json").await?.unwrap_or_default())
    }

    pub(crate) async fn seen_put(&self, seen: Seen) -> io::Result<()> {
        self.put("seen.json".to_owned(), json(&seen)?, Durable::Agent).await
    }

    /// The node's id: made at the first call, the same ever after.
    pub(crate) async fn node_id(&self) -> io::Result<ostler_api::NodeId> {
        if let Some(id) = self.get("node-id").await? {
            return Ok(id);
        }
        let id = ostler_api::NodeId::new();
        self.put("node-id".to_owned(), json(&id)?, Durable::Host).await?;
        Ok(id)
    }

    async fn get<T: DeserializeOwned + Send + 'static>(&self, name: &str) -> io::Result<Option<T>> {
        match &self.0 {
            Kind::Memory(memory) => {
                let text = memory.lock().rest.get(name).cloned();
                text.map(|text| serde_json::from_str(&text).map_err(io::Error::other)).transpose()
            }
            Kind::Directory(dir) => {
                let path = dir.join(name);
                blocking(move || read(&path)).await
            }
        }
    }

    async fn put(&self, name: String, text: Vec<u8>, durable: Durable) -> io::Result<()> {
        match &self.0 {
            Kind::Memory(memory) => {
                let text = String::from_utf8(text).map_err(io::Error::other)?;
                memory.lock().rest.insert(name, text);
                Ok(())
            }
            Kind::Directory(dir) => {
                let path = dir.join(name);
                blocking(move || replace(&path, &text, durable)).await
            }
        }
    }
}

fn json(value: &impl Serialize) -> io::Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(io::Error::other)
}

/// Runs file work where it cannot hold up other tasks.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged: {error}", path.display()))
    })
}

/// Reads the file that `file` names for each entry of `dir` whose name begins with an id.
fn read_all<Id, T>(dir: &Path, file: impl Fn(&Path) -> PathBuf) -> io::Result<HashMap<Id, T>>
where
    Id: std::str::FromStr + std::hash::Hash + Eq,
    T: DeserializeOwned,
{
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(HashMap::new()),
        Err(error) => return Err(error),
    };
    let mut all = HashMap::new();
    for entry in entries {
        let path = entry?.path();
        if is_unfinished(&path) {
            continue;
        }
        let id = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        let Some(id) = id else { continue };
        match read(&file(&path)) {
            Ok(Some(value)) => drop(all.insert(id, value)),
            Ok(None) => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "a record cannot be read"),
        }
    }
    Ok(all)
}

/// Replaces a file in one step. The directory is made when it is missing.
fn replace(path: &Path, text: &[u8], durable: Durable) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::other("a file without a directory"))?;
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
    let write = || -> io::Result<()> {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(text)?;
        if durable == Durable::Host {
            file.sync_all()?;
        }
        Ok(())
    };
    let written = match write() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            std::fs::create_dir_all(dir).and_then(|()| write())
        }
        written => written,
    };
    if let Err(error) = written.and_then(|()| std::fs::rename(&temporary, path)) {
        let _ = std::fs::remove_file(&temporary);
        return Err(error);
    }
    // The new name has to be durable too.
    if durable == Durable::Host { std::fs::File::open(dir)?.sync_all() } else { Ok(()) }
}

fn is_unfinished(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "tmp")
}

fn sweep(data_dir: &Path) {
    let list = |dir: &Path| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let (vms, volumes) = (data_dir.join("vms"), data_dir.join("volumes"));
    let dirs = list(&vms).into_iter().chain([data_dir.to_owned(), volumes]);
    for path in dirs.flat_map(|dir| list(&dir)).filter(|path| is_unfinished(path)) {
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::debug!(path = %path.display(), %error, "an unfinished record stays");
        }
    }
}

fn drop_dir(dir: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name != "record.json") {
            gone_is_fine(std::fs::remove_file(path))?;
        }
    }
    gone_is_fine(std::fs::remove_dir_all(dir))
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn record() -> Record {
        Record { cloud: Some(Uuid::now_v7()), revision: 7, saved: true, ..Record::default() }
    }

    #[tokio::test]
    async fn what_is_kept_comes_back_from_disk_and_from_memory() {
        let dir = tempfile::tempdir().unwrap();
        for keep in [Keep::directory(dir.path()), Keep::memory()] {
            let (vm, volume, record) = (VmId::new(), VolumeId::new(), record());
            assert!(keep.vms().await.unwrap().is_empty());
            keep.vm_put(vm, &Record::default(), Durable::Agent).await.unwrap();
            keep.vm_put(vm, &record, Durable::Host).await.unwrap();
            keep.volume_put(volume, &VolumeRecord { cloud: record.cloud, revision: 3 }).await.unwrap();
            keep.seen_put(Seen { cloud: record.cloud, revision: 9 }).await.unwrap();
            let node = keep.node_id().await.unwrap();

            let again = keep.clone();
            assert_eq!(again.vms().await.unwrap(), HashMap::from([(vm, record)]));
            assert_eq!(again.volumes().await.unwrap()[&volume].revision, 3);
            assert_eq!(again.seen().await.unwrap().revision, 9);
            assert_eq!(again.node_id().await.unwrap(), node);

            for _ in 0..2 {
                keep.vm_drop(vm).await.unwrap();
                keep.volume_drop(volume).await.unwrap();
            }
            assert!(keep.vms().await.unwrap().is_empty());
            assert!(keep.volumes().await.unwrap().is_empty());
        }
        assert_eq!(std::fs::read_dir(dir.path().join("vms")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_damaged_record_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let keep = Keep::directory(dir.path());
        let (good, bad) = (VmId::new(), VmId::new());
        keep.vm_put(good, &record(), Durable::Host).await.unwrap();
        keep.vm_put(bad, &record(), Durable::Host).await.unwrap();
        let bad = dir.path().join("vms").join(bad.to_string());
        std::fs::write(bad.join("record.json"), b"{\"clo").unwrap();
        std::fs::write(bad.join("record.7-1.tmp"), b"{\"clo").unwrap();
        keep.sweep().await.unwrap();
        assert_eq!(keep.vms().await.unwrap().into_keys().collect::<Vec<_>>(), [good]);
        assert!(!bad.join("record.7-1.tmp").exists());
    }
}
