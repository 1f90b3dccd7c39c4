//! Layers, and the small files that say what an id is: read strictly, written whole.
//!
//! A layer's backing file can be nothing but an image or a layer of this pool, by the one name we give it.

use std::{fs, io::Cursor, io::Read, os::unix::fs::MetadataExt, path::Path, sync::Arc};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{Inner, scratch};
use crate::{
    ImageFormat, ImageRef, StorageError,
    files::{self, Context},
    pool::{
        IMAGES, Layer, conflict,
        tree::{Base, Chain, ChainError, Node, Record},
        volume_missing,
    },
    probe::window::Window,
    qcow2,
};

/// Bytes in which a layer's header ends, with all that QEMU adds to it: names of features, a list of bitmaps.
const HEADER: usize = 4096;
/// Largest pointer or record that is read.
const MAX_JSON: u64 = 4096;

/// What an id is when more is known than that there is a layer of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    /// A volume with this top.
    Top(Uuid),
    /// Only a layer.
    Layer,
}

/// Whether a layer that waits for a repair may be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unclean {
    Refuse,
    Accept,
}

/// Why a chain was not followed to its end.
enum Follow {
    Chain(ChainError),
    Storage(StorageError),
}

impl From<ChainError> for Follow {
    fn from(error: ChainError) -> Self {
        Self::Chain(error)
    }
}

impl Inner {
    pub(super) fn role(&self, id: Uuid) -> Result<Option<Role>, StorageError> {
        read_json(&self.role_path(id))
    }

    pub(super) fn role_write(&self, id: Uuid, role: Role) -> Result<(), StorageError> {
        write_json(&self.volumes, &self.role_path(id), &role)
    }

    pub(super) fn record(&self, snapshot: Uuid) -> Result<Option<Record>, StorageError> {
        read_json(&self.record_path(snapshot))
    }

    pub(super) fn record_write(&self, snapshot: Uuid, record: &Record) -> Result<(), StorageError> {
        write_json(&self.snapshots, &self.record_path(snapshot), record)
    }

    pub(super) fn layer_exists(&self, id: Uuid) -> Result<bool, StorageError> {
        let path = self.layer_path(id);
        match fs::symlink_metadata(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StorageError::io("look at", &path, error)),
        }
    }

    /// The layer that a volume is written to; `None` when there is no such volume.
    pub(super) fn top(&self, volume: Uuid) -> Result<Option<Uuid>, StorageError> {
        match self.role(volume)? {
            Some(Role::Top(top)) => Ok(Some(top)),
            Some(Role::Layer) => Ok(None),
            None => Ok(self.layer_exists(volume)?.then_some(volume)),
        }
    }

    pub(super) fn top_of(&self, volume: Uuid) -> Result<Uuid, StorageError> {
        self.top(volume)?.ok_or_else(|| volume_missing(volume))
    }

    /// Reads a layer's header; `None` when there is no such layer.
    pub(super) fn layer_read(&self, id: Uuid, unclean: Unclean) -> Result<Option<Node>, StorageError> {
        let path = self.layer_path(id);
        let mut file = match files::open_regular(&path) {
            Err(StorageError::NotFound { .. }) => return Ok(None),
            other => other?,
        };
        let used = file.metadata().context("look at", &path)?.blocks() * 512;
        let damaged = |why: String| StorageError::Damaged { path: path.clone(), why };
        // All that a header of ours says is at the beginning, and one read is what makes a look at a whole pool quick.
        let mut start = vec![0; HEADER];
        let read = files::read_full(&mut file, &mut start).context("read", &path)?;
        let header = Window::new(&mut Cursor::new(&start[..read]))
            .and_then(|mut window| match qcow2::is_qcow2(&mut window)? {
                true => qcow2::Header::read(&mut window).map(Some),
                false => Ok(None),
            })
            .map_err(|refusal| damaged(refusal.to_string()))?
            .ok_or_else(|| damaged("it is not a qcow2 file".to_owned()))?;
        if header.crypt_method != 0 || header.foreign_features() != 0 || header.data_file.is_some() {
            let features = header.incompatible;
            return Err(damaged(format!("its header has features that we never set ({features:#x})")));
        }
        if unclean == Unclean::Refuse && header.is_unclean() {
            return Err(damaged("it is marked as corrupt; check the volume with repair".to_owned()));
        }
        let base = match (&header.backing_file, &header.backing_format) {
            (None, _) => Base::Nothing,
            (Some(name), format) => backing(name, format.as_deref())
                .ok_or_else(|| damaged(format!("its backing file {name:?} is not of this pool")))?,
        };
        Ok(Some(Node { size: header.size, used, base }))
    }

    /// The chain below a layer, which must be there.
    pub(super) fn chain(&self, top: Uuid, unclean: Unclean) -> Result<Chain, StorageError> {
        let chain = Chain::follow(top, |id| self.layer_read(id, unclean).map_err(Follow::Storage));
        let chain = chain.map_err(|error| match error {
            Follow::Storage(error) => error,
            Follow::Chain(error) => {
                StorageError::Damaged { path: self.layer_path(top), why: error.to_string() }
            }
        })?;
        if let Some(image) = &chain.image {
            self.image_size(image)?;
        }
        Ok(chain)
    }

    pub(super) fn layer(&self, id: Uuid) -> Layer {
        Layer { path: self.layer_path(id), format: ImageFormat::Qcow2 }
    }

    /// A chain as files, top first.
    pub(super) fn files(&self, chain: &Chain) -> Result<Vec<Layer>, StorageError> {
        let mut files: Vec<Layer> = chain.layers.iter().map(|(id, _)| self.layer(*id)).collect();
        if let Some(image) = &chain.image {
            files.push(Layer { path: self.image_path(image)?, format: image.format });
        }
        Ok(files)
    }

    /// Writes an empty layer over another one and notes that it is no volume. The caller holds the exclusive lock.
    pub(super) fn layer_make(&self, id: Uuid, size: u64, below: Uuid) -> Result<(), StorageError> {
        let role = self.role(id)?;
        if self.layer_exists(id)? || role.is_some_and(|role| role != Role::Layer) {
            // Left by a call that was killed before it pointed to it: then nothing needs it, and it is made anew.
            let scan = self.scan()?;
            if role != Some(Role::Layer) || scan.tree.needed().contains(&id) {
                return Err(conflict(format!("layer {id}"), "it has other data; use another id"));
            }
            self.layer_remove(id)?;
        }
        self.role_write(id, Role::Layer)?;
        let name = layer_name(below);
        let empty = qcow2::Empty::new(size, Some((&name, ImageFormat::Qcow2)));
        let scratch = scratch(&self.volumes)?;
        empty.write(&scratch.file).context("write", &scratch.path)?;
        scratch.publish(&self.layer_path(id), 0o600)?;
        Ok(())
    }

    /// Removes a layer, and then the note about it, so that it is never taken for a volume.
    pub(super) fn layer_remove(&self, id: Uuid) -> Result<(), StorageError> {
        if files::remove(&self.layer_path(id))? {
            files::sync_dir(&self.volumes)?;
        }
        if files::remove(&self.role_path(id))? {
            files::sync_dir(&self.volumes)?;
        }
        Ok(())
    }
}

/// The name by which a header names a layer.
pub(super) fn layer_name(id: Uuid) -> String {
    format!("{id}.qcow2")
}

/// The name by which a header names an image.
pub(super) fn image_name(image: &ImageRef) -> Result<String, StorageError> {
    Ok(format!("{IMAGES}{}", image.file_name()?))
}

/// What a backing file's name and format mean, if they are exactly what we write.
fn backing(name: &str, format: Option<&str>) -> Option<Base> {
    if let Some(image) = name.strip_prefix(IMAGES) {
        let image = ImageRef::from_file_name(image).filter(|image| format == Some(image.format.as_str()))?;
        return Some(Base::Image(Arc::new(image)));
    }
    let id: Uuid = name.strip_suffix(".qcow2")?.parse().ok()?;
    (layer_name(id) == name && format == Some(ImageFormat::Qcow2.as_str())).then_some(Base::Layer(id))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StorageError> {
    let file = match files::open_regular(path) {
        Err(StorageError::NotFound { .. }) => return Ok(None),
        other => other?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_JSON + 1).read_to_end(&mut bytes).context("read", path)?;
    let damaged = |why: String| StorageError::Damaged { path: path.to_owned(), why };
    if bytes.len() as u64 > MAX_JSON {
        return Err(damaged(format!("it is larger than {MAX_JSON} bytes")));
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|error| damaged(error.to_string()))
}

fn write_json(folder: &Path, path: &Path, value: &impl Serialize) -> Result<(), StorageError> {
    let scratch = scratch(folder)?;
    let bytes = serde_json::to_vec(value).expect("ids become JSON");
    std::io::Write::write_all(&mut &scratch.file, &bytes).context("write", &scratch.path)?;
    scratch.replace(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_we_write_are_backing_files() {
        let id = Uuid::now_v7();
        assert_eq!(backing(&format!("{id}.qcow2"), Some("qcow2")), Some(Base::Layer(id)));
        let image = format!("../images/{}.raw", "a".repeat(64));
        assert!(matches!(backing(&image, Some("raw")), Some(Base::Image(_))));
        for (name, format) in [
            (format!("{id}.qcow2"), Some("raw")),
            (format!("{id}.qcow2"), None),
            (format!("{}.qcow2", id.simple()), Some("qcow2")),
            (format!("{}.qcow2", id.to_string().to_uppercase()), Some("qcow2")),
            (format!("./{id}.qcow2"), Some("qcow2")),
            (format!("../volumes/{id}.qcow2"), Some("qcow2")),
            (format!("/{id}.qcow2"), Some("qcow2")),
            (image, Some("qcow2")),
            (String::new(), None),
        ] {
            assert_eq!(backing(&name, format), None, "{name} {format:?}");
        }
    }

    #[test]
    fn a_file_is_named_to_qemu_as_in_our_headers() {
        let id = Uuid::now_v7();
        let layer = Layer { path: format!("/pool/volumes/{id}.qcow2").into(), format: ImageFormat::Qcow2 };
        assert_eq!(layer.backing_name().unwrap(), layer_name(id));
        let image = ImageRef { sha256: "a".repeat(64), format: ImageFormat::Raw };
        let path = format!("/pool/images/{}", image.file_name().unwrap()).into();
        let file = Layer { path, format: ImageFormat::Raw };
        assert_eq!(file.backing_name().unwrap(), image_name(&image).unwrap());
    }

    #[test]
    fn a_role_is_one_of_two_and_nothing_else() {
        let id = Uuid::nil();
        assert_eq!(serde_json::to_string(&Role::Top(id)).unwrap(), format!("{{\"top\":\"{id}\"}}"));
        assert_eq!(serde_json::to_string(&Role::Layer).unwrap(), "\"layer\"");
        for text in ["{}", "{\"top\":null}", "null", "\"volume\"", ""] {
            assert!(serde_json::from_str::<Role>(text).is_err(), "{text}");
        }
    }
}
