//! The prober on real images, as `qemu-img` makes them, and on random and mutated bytes.

use std::fs;

use ostler_storage::{ImageContent, ImageFormat};
use proptest::prelude::*;

use crate::support::{MIB, disk, image, probe_bytes, probe_file};

const SIZE: usize = 5 * MIB + 512;

#[test]
fn every_format_and_variant_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let content = disk(SIZE);
    for (format, options, detail) in [
        ("qcow2", vec![], "qcow2 version 3"),
        ("qcow2", vec!["compat=0.10"], "qcow2 version 2"),
        ("qcow2", vec!["cluster_size=2M"], "qcow2 version 3"),
        ("qcow2", vec!["cluster_size=512"], "qcow2 version 3"),
        ("qcow2", vec!["compression_type=zstd"], "qcow2 version 3"),
        ("qcow2", vec!["extended_l2=on"], "qcow2 version 3"),
        ("qcow2", vec!["refcount_bits=1"], "qcow2 version 3"),
        ("qcow2", vec!["preallocation=full"], "qcow2 version 3"),
        ("vmdk", vec![], "monolithicSparse"),
        ("vmdk", vec!["subformat=streamOptimized"], "streamOptimized"),
        ("vdi", vec![], "dynamic VDI"),
        ("vdi", vec!["static=on"], "static VDI"),
        ("vhdx", vec![], "VHDX version 1"),
        ("vhdx", vec!["subformat=fixed"], "VHDX version 1"),
        ("vhdx", vec!["block_size=1M"], "VHDX version 1"),
    ] {
        let path = image(dir.path(), &content, format, &options);
        let probed = probe_file(&path).unwrap_or_else(|refusal| panic!("{format} {options:?}: {refusal}"));
        assert_eq!(probed.format.as_str(), format, "{options:?}");
        assert_eq!(probed.content, ImageContent::Disk);
        assert_eq!(probed.detail, detail, "{format} {options:?}");
        assert_eq!(probed.virtual_size, SIZE as u64, "{format} {options:?}");
    }
}

#[test]
fn qcow2_with_snapshots_and_bitmaps_is_fine() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), &disk(SIZE), "qcow2", &[]);
    crate::support::qemu_img(&["snapshot", "-c", "before", path.to_str().unwrap()]);
    crate::support::qemu_img(&["bitmap", "--add", path.to_str().unwrap(), "changes"]);
    assert_eq!(probe_file(&path).unwrap().format, ImageFormat::Qcow2);
}

#[test]
fn raw_content_is_told_apart() {
    let mut iso = vec![0; 40960];
    iso[0x8001..0x8006].copy_from_slice(b"CD001");
    let mut kernel = vec![0; 4096];
    kernel[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    kernel[0x202..0x206].copy_from_slice(b"HdrS");
    let mut arm_kernel = vec![0; 4096];
    arm_kernel[0x38..0x3c].copy_from_slice(b"ARM\x64");
    for (bytes, content) in [
        (disk(MIB), ImageContent::Disk),
        (iso, ImageContent::Iso),
        (kernel, ImageContent::Kernel),
        (arm_kernel, ImageContent::Kernel),
        (b"070701 and more".to_vec(), ImageContent::Initrd),
        (b"070702 and more".to_vec(), ImageContent::Initrd),
    ] {
        let probed = probe_bytes(&bytes).unwrap();
        assert_eq!((probed.format, probed.content), (ImageFormat::Raw, content));
        assert_eq!(probed.virtual_size, (bytes.len() as u64).next_multiple_of(512));
    }
}

#[test]
fn names_of_formats_go_both_ways() {
    for format in ImageFormat::ALL {
        assert_eq!(format.as_str().parse(), Ok(format));
    }
    assert_eq!("QCOW2".parse::<ImageFormat>().unwrap_err().known, "raw, qcow2, vmdk, vdi, vhdx");
}

/// One small real image per format, to be mutated.
fn real_images() -> &'static [Vec<u8>] {
    static IMAGES: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
    IMAGES.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let content = disk(MIB);
        let path = image(dir.path(), &content, "qcow2", &[]);
        crate::support::qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
        let mut images = vec![fs::read(path).unwrap()];
        for (format, options) in [
            ("vmdk", vec![]),
            ("vmdk", vec!["subformat=streamOptimized"]),
            ("vdi", vec![]),
            ("vhdx", vec!["block_size=1M"]),
        ] {
            images.push(fs::read(image(dir.path(), &content, format, &options)).unwrap());
        }
        images
    })
}

/// Which image, what is written where, and where it is cut.
type Mutation = (usize, Vec<(usize, Vec<u8>)>, Option<usize>);

/// Places where headers and tables are: the beginning, and wherever the image has bytes at all.
fn mutation() -> impl Strategy<Value = Mutation> {
    let byte_runs = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..9),
        Just(vec![0xff; 8]),
        Just(vec![0; 8]),
        Just(vec![0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
    ];
    let place = prop_oneof![0usize..1024, 0usize..(1 << 20), 65536usize..70000, 196_608usize..200_000];
    (0usize..5, prop::collection::vec((place, byte_runs), 1..6), prop::option::of(0usize..(2 << 20)))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let _ = probe_bytes(&bytes);
    }

    #[test]
    fn random_bytes_after_a_magic_never_panic(
        magic in prop::sample::select(vec![
            &b"QFI\xfb\0\0\0\x03"[..], b"QFI\xfb\0\0\0\x02", b"KDMV\x01\0\0\0", b"vhdxfile", b"# Disk DescriptorFile\n",
        ]),
        bytes in prop::collection::vec(any::<u8>(), 0..4096),
    ) {
        let _ = probe_bytes(&[magic, &bytes].concat());
        let mut vdi = bytes.clone();
        vdi.resize(vdi.len().max(0x200), 0);
        vdi[0x40..0x48].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe, 1, 0, 1, 0]);
        let _ = probe_bytes(&vdi);
    }

    #[test]
    fn mutated_images_never_panic((which, changes, cut) in mutation()) {
        let mut bytes = real_images()[which].clone();
        for (at, change) in changes {
            for (offset, byte) in change.iter().enumerate() {
                let len = bytes.len();
                bytes[(at + offset) % len] = *byte;
            }
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        if let Ok(probed) = probe_bytes(&bytes) {
            prop_assert!(probed.virtual_size <= 2 << 40 && probed.virtual_size.is_multiple_of(512));
        }
    }
}
