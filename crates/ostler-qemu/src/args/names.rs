//! How block nodes are named. Pure.
//!
//! QEMU allows 31 characters, a letter first. `-f` at the end is the file below a format node.
//!
//! | node | name |
//! |---|---|
//! | a layer with a name | `b.DISK.NAME` |
//! | a layer without | `blk-DISK` on top at the start, `blk-DISK-lN` below |
//!
//! A disk's id has no dot, so the named ones can be taken apart again.

use crate::disk::DiskSpec;

/// Disk id and layer name together: what 31 leaves beside `b.`, `.` and `-f`.
pub(super) const MAX_ID_AND_LAYER: usize = 26;

pub(crate) fn layer_node(disk: &DiskSpec, layer: usize) -> String {
    match &disk.layers[layer].name {
        Some(name) => named_node(&disk.id, name),
        None if layer == 0 => format!("blk-{}", disk.id),
        None => format!("blk-{}-l{layer}", disk.id),
    }
}

pub(crate) fn named_node(disk: &str, layer: &str) -> String {
    format!("b.{disk}.{layer}")
}

pub(crate) fn file_of(node: &str) -> String {
    format!("{node}-f")
}

/// What a node's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeOf<'a> {
    pub(crate) disk: &'a str,
    pub(crate) layer: Option<&'a str>,
    /// The file below the layer.
    pub(crate) file: bool,
}

/// None for nodes that are of no disk (firmware, and those QEMU names itself).
pub(crate) fn owner(node: &str) -> Option<NodeOf<'_>> {
    let (name, file) = match node.strip_suffix("-f") {
        Some(name) => (name, true),
        None => (node, false),
    };
    if let Some(rest) = name.strip_prefix("b.") {
        let (disk, layer) = rest.split_once('.')?;
        return Some(NodeOf { disk, layer: Some(layer), file });
    }
    let disk = name.strip_prefix("blk-")?;
    let is_number = |suffix: &str| !suffix.is_empty() && suffix.bytes().all(|c| c.is_ascii_digit());
    let disk = match disk.rsplit_once("-l") {
        Some((disk, suffix)) if is_number(suffix) => disk,
        _ => disk,
    };
    Some(NodeOf { disk, layer: None, file })
}

pub(crate) fn device(disk: &str) -> String {
    format!("disk-{disk}")
}

/// The disk whose device QEMU calls so: `disk-ID`, or its path in the object tree.
pub(crate) fn disk_of_device(device: &str) -> Option<&str> {
    let id = match device.strip_prefix("/machine/peripheral/") {
        Some(path) => path.split('/').next()?,
        None => device,
    };
    id.strip_prefix("disk-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_can_be_taken_apart_again() {
        let of = |disk, layer, file| Some(NodeOf { disk, layer, file });
        assert_eq!(owner(&named_node("disk0", "0123456789ab")), of("disk0", Some("0123456789ab"), false));
        assert_eq!(owner(&file_of(&named_node("a-f", "x"))), of("a-f", Some("x"), true));
        assert_eq!(owner("blk-root"), of("root", None, false));
        assert_eq!(owner("blk-root-l12-f"), of("root", None, true));
        assert_eq!(owner("firmware-code"), None);
        assert_eq!(owner("#block123"), None);
        let longest = "x".repeat(MAX_ID_AND_LAYER - 12);
        assert_eq!(file_of(&named_node(&longest, "0123456789ab")).len(), 31);
    }

    #[test]
    fn devices_name_their_disk() {
        assert_eq!(disk_of_device("disk-root"), Some("root"));
        assert_eq!(disk_of_device("/machine/peripheral/disk-root/virtio-backend"), Some("root"));
        assert_eq!(disk_of_device("/machine/unattached/device[3]"), None);
        assert_eq!(disk_of_device("nic-lan"), None);
    }
}
