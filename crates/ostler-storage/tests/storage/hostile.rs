//! Images that must be refused, each with the reason that a person needs.

use std::{fs, io::Write, path::Path};

use ostler_storage::{ImageFormat, ProbeLimits, Refusal, probe};

use crate::support::{MIB, disk, image, probe_bytes, probe_file, qemu_img};

/// A real qcow2 image of 5 MiB, as bytes to be patched.
fn qcow2() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    fs::read(image(dir.path(), &disk(5 * MIB), "qcow2", &[])).unwrap()
}

fn patched(mut bytes: Vec<u8>, at: usize, change: &[u8]) -> Vec<u8> {
    bytes[at..at + change.len()].copy_from_slice(change);
    bytes
}

fn refused(bytes: &[u8]) -> Refusal {
    probe_bytes(bytes).expect_err("this must be refused")
}

#[test]
fn qcow2_with_a_backing_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("overlay.qcow2");
    for name in ["/etc/passwd", "json:{\"driver\":\"file\"}", "nbd://evil/disk"] {
        qemu_img(&["create", "-u", "-f", "qcow2", "-b", name, "-F", "raw", path.to_str().unwrap(), "1M"]);
        let refusal = probe_file(&path).unwrap_err();
        assert_eq!(refusal, Refusal::BackingFile { format: ImageFormat::Qcow2, name: name.to_owned() });
        assert!(refusal.to_string().contains(&format!("{name:?}")), "{refusal}");
    }
}

#[test]
fn qcow2_with_a_backing_file_whose_name_lies_elsewhere() {
    let bytes = patched(qcow2(), 8, &(1u64 << 40).to_be_bytes());
    let bytes = patched(bytes, 16, &100u32.to_be_bytes());
    assert_eq!(refused(&bytes).code(), "backing_file");
    let bytes = patched(qcow2(), 8, &u64::MAX.to_be_bytes());
    assert_eq!(refused(&patched(bytes, 16, &u32::MAX.to_be_bytes())).code(), "backing_file");
}

#[test]
fn qcow2_with_an_external_data_file() {
    let dir = tempfile::tempdir().unwrap();
    let (path, data) = (dir.path().join("image.qcow2"), dir.path().join("data.raw"));
    let option = format!("data_file={}", data.display());
    qemu_img(&["create", "-f", "qcow2", "-o", &option, path.to_str().unwrap(), "1M"]);
    let name = data.display().to_string();
    assert_eq!(
        probe_file(&path).unwrap_err(),
        Refusal::ExternalDataFile { format: ImageFormat::Qcow2, name }
    );
    // The feature bit alone, without a name.
    assert_eq!(refused(&patched(qcow2(), 72, &4u64.to_be_bytes())).code(), "external_data_file");
    // The name alone, without the feature bit.
    let bytes = patched(fs::read(&path).unwrap(), 72, &0u64.to_be_bytes());
    assert_eq!(refused(&bytes).code(), "external_data_file");
}

#[test]
fn qcow2_with_features() {
    let refusal = refused(&patched(qcow2(), 72, &(1u64 << 63 | 1 << 5).to_be_bytes()));
    assert_eq!(refusal.code(), "unknown_features");
    assert!(refusal.to_string().contains("bit 5, bit 63"), "{refusal}");
    assert_eq!(refused(&patched(qcow2(), 72, &1u64.to_be_bytes())).code(), "unclean");
    assert_eq!(refused(&patched(qcow2(), 72, &2u64.to_be_bytes())).code(), "unclean");
    assert_eq!(refused(&patched(qcow2(), 72, &8u64.to_be_bytes())).code(), "damaged_header");
}

#[test]
fn qcow2_of_another_version() {
    for version in [0u32, 1, 4, u32::MAX] {
        let refusal = refused(&patched(qcow2(), 4, &version.to_be_bytes()));
        let version = version.into();
        assert_eq!(refusal, Refusal::UnsupportedVersion { format: ImageFormat::Qcow2, version });
    }
}

#[test]
fn qcow2_with_damaged_fields() {
    for (at, change, field) in [
        (20, 8u32.to_be_bytes().to_vec(), "cluster_bits"),
        (20, 22u32.to_be_bytes().to_vec(), "cluster_bits"),
        (20, u32::MAX.to_be_bytes().to_vec(), "cluster_bits"),
        (32, 7u32.to_be_bytes().to_vec(), "crypt_method"),
        (36, 0u32.to_be_bytes().to_vec(), "l1_size"),
        (40, 0u64.to_be_bytes().to_vec(), "l1_table_offset"),
        (40, 4097u64.to_be_bytes().to_vec(), "l1_table_offset"),
        (48, 1u64.to_be_bytes().to_vec(), "refcount_table_offset"),
        (56, 0u32.to_be_bytes().to_vec(), "refcount_table_clusters"),
        (56, u32::MAX.to_be_bytes().to_vec(), "refcount_table_clusters"),
        (60, u32::MAX.to_be_bytes().to_vec(), "nb_snapshots"),
        (96, 7u32.to_be_bytes().to_vec(), "refcount_order"),
        (100, 103u32.to_be_bytes().to_vec(), "header_length"),
        (100, u32::MAX.to_be_bytes().to_vec(), "header_length"),
    ] {
        match refused(&patched(qcow2(), at, &change)) {
            Refusal::Damaged { field: found, .. } => assert_eq!(found, field, "byte {at}"),
            other => panic!("byte {at}: {other:?}"),
        }
    }
}

#[test]
fn qcow2_with_tables_beyond_the_file() {
    for (at, change) in [
        (40, (1u64 << 40).to_be_bytes().to_vec()),
        (40, (!0xffff_u64).to_be_bytes().to_vec()),
        (48, (1u64 << 40).to_be_bytes().to_vec()),
        (56, 100u32.to_be_bytes().to_vec()),
        (36, (4u32 << 20).to_be_bytes().to_vec()),
    ] {
        assert_eq!(refused(&patched(qcow2(), at, &change)).code(), "truncated", "byte {at}");
    }
    let snapshots = patched(qcow2(), 60, &1u32.to_be_bytes());
    assert_eq!(refused(&patched(snapshots, 64, &(1u64 << 40).to_be_bytes())).code(), "truncated");
    // An L1 entry that names a table beyond the end.
    let bytes = qcow2();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    assert_eq!(refused(&patched(bytes, l1, &(1u64 << 40).to_be_bytes())).code(), "truncated");
    let bytes = qcow2();
    let half = bytes.len() / 2;
    assert!(probe_bytes(&bytes[..half]).is_err());
}

#[test]
fn sizes_over_the_limit() {
    let refusal = refused(&patched(qcow2(), 24, &(1u64 << 60).to_be_bytes()));
    assert_eq!(refusal, Refusal::TooLarge { what: "virtual size", value: 1 << 60, limit: 2 << 40 });
    assert_eq!(refused(&patched(qcow2(), 24, &u64::MAX.to_be_bytes())).code(), "too_large");
    let limits = ProbeLimits { max_virtual_size: MIB as u64 };
    let dir = tempfile::tempdir().unwrap();
    for format in ["raw", "qcow2", "vmdk", "vdi", "vhdx"] {
        let path = image(dir.path(), &disk(5 * MIB), format, &[]);
        let refusal = probe(&mut fs::File::open(path).unwrap(), &limits).unwrap_err();
        assert!(matches!(refusal, Refusal::TooLarge { limit: 1_048_576, .. }), "{format}: {refusal}");
    }
}

#[test]
fn encrypted_images() {
    for method in [1u32, 2] {
        assert_eq!(refused(&patched(qcow2(), 32, &method.to_be_bytes())).code(), "encrypted");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let secret = "secret,id=s,data=password";
    let option = "encrypt.format=aes,encrypt.key-secret=s";
    qemu_img(&[
        "create",
        "-q",
        "--object",
        secret,
        "-f",
        "qcow2",
        "-o",
        option,
        path.to_str().unwrap(),
        "1M",
    ]);
    assert_eq!(probe_file(&path).unwrap_err(), Refusal::Encrypted { scheme: "AES" });
    // As `qemu-img create -f luks` begins, which itself fails at times on a busy machine: it measures the processor.
    let mut luks = disk(MIB);
    luks[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
    assert_eq!(refused(&luks), Refusal::Encrypted { scheme: "LUKS" });
}

#[test]
fn vmdk_descriptors_that_name_other_files() {
    let descriptor = |extent: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\n{extent}\n"
        )
    };
    for (extent, name) in [
        ("RW 1 FLAT \"/etc/passwd\" 0", "/etc/passwd"),
        ("RW   1\tFLAT   \"/etc/shadow\" 0", "/etc/shadow"),
        ("RDONLY 1 VMFS \"nbd:host\"", "nbd:host"),
        ("RW 1 SPARSE json:{}", "json:{}"),
    ] {
        for text in [descriptor(extent), format!("\n# a comment\n\nversion=1\n{extent}\n")] {
            let name = name.to_owned();
            assert_eq!(refused(text.as_bytes()), Refusal::ExternalExtent { format: ImageFormat::Vmdk, name });
        }
    }
    let dir = tempfile::tempdir().unwrap();
    for kind in ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let path = image(dir.path(), &disk(MIB), "vmdk", &[&format!("subformat={kind}")]);
        assert_eq!(probe_file(&path).unwrap_err().code(), "external_extent", "{kind}");
    }
}

#[test]
fn vmdk_sparse_files_that_lead_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(image(dir.path(), &disk(MIB), "vmdk", &[])).unwrap();
    // With capacity 0 QEMU would follow the embedded descriptor.
    assert_eq!(refused(&patched(bytes.clone(), 12, &[0; 8])).code(), "damaged_header");
    assert_eq!(refused(&patched(bytes.clone(), 4, &9u32.to_le_bytes())).code(), "unsupported_version");
    assert_eq!(refused(&patched(bytes.clone(), 56, &(1u64 << 40).to_le_bytes())).code(), "truncated");
    assert_eq!(refused(&patched(bytes.clone(), 28, &(1u64 << 40).to_le_bytes())).code(), "truncated");
    assert_eq!(refused(&patched(bytes.clone(), 20, &[0; 8])).code(), "damaged_header");
    let at = |needle: &str| {
        bytes
            .windows(needle.len())
            .position(|window| window == needle.as_bytes())
            .expect("the descriptor has it")
    };
    let parent = patched(bytes.clone(), at("parentCID=ffffffff"), b"parentCID=12345678");
    assert_eq!(refused(&parent).code(), "backing_file");
    let flat = patched(bytes.clone(), at("SPARSE \""), b"FLAT \"/\"");
    assert_eq!(refused(&flat).code(), "external_extent");
    let kind = patched(bytes.clone(), at("monolithicSparse"), b"twoGbMaxExtentSp");
    assert_eq!(refused(&kind).code(), "external_extent");
}

#[test]
fn vdi_that_is_cut_or_has_a_parent() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(image(dir.path(), &disk(5 * MIB), "vdi", &[])).unwrap();
    for len in [0x48, 0x1ff, 0x210, bytes.len() - MIB] {
        assert_eq!(refused(&bytes[..len]).code(), "truncated", "{len} bytes");
    }
    assert_eq!(refused(&patched(bytes.clone(), 0x4c, &4u32.to_le_bytes())).code(), "backing_file");
    assert_eq!(refused(&patched(bytes.clone(), 0x1a8, &[7; 16])).code(), "backing_file");
    assert_eq!(refused(&patched(bytes.clone(), 0x44, &2u32.to_le_bytes())).code(), "unsupported_version");
    for (at, change) in
        [(0x178, 7u32), (0x168, 4096), (0x17c, 1), (0x180, 1), (0x184, u32::MAX), (0x154, 1), (0x158, 0)]
    {
        assert_eq!(
            refused(&patched(bytes.clone(), at, &change.to_le_bytes())).code(),
            "damaged_header",
            "{at:#x}"
        );
    }
    let map = u32::from_le_bytes(bytes[0x154..0x158].try_into().unwrap()) as usize;
    assert_eq!(refused(&patched(bytes.clone(), map, &1000u32.to_le_bytes())).code(), "damaged_header");
}

#[test]
fn vhdx_that_is_cut_or_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(image(dir.path(), &disk(5 * MIB), "vhdx", &["block_size=1M"])).unwrap();
    for len in [8, 65536, 200_000, MIB, 3 * MIB, bytes.len() - MIB] {
        assert_eq!(refused(&bytes[..len]).code(), "truncated", "{len} bytes");
    }
    // Both headers, then both region tables.
    for (first, second) in [(65536, 131_072), (196_608, 262_144)] {
        let broken = patched(bytes.clone(), first + 16, &[0xff; 4]);
        assert!(probe_bytes(&broken).is_ok(), "one good copy is enough");
        assert_eq!(refused(&patched(broken, second + 16, &[0xff; 4])).code(), "damaged_header");
    }
}

#[test]
fn vhdx_with_a_parent() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(image(dir.path(), &disk(5 * MIB), "vhdx", &["block_size=1M"])).unwrap();
    // File parameters: block size of 1 MiB, then the flags, of which bit 1 means "has a parent".
    let needle = [0u8, 0, 16, 0, 0, 0, 0, 0];
    let table = bytes.windows(8).position(|window| window == b"metadata").unwrap();
    let at = table + 65536 + bytes[table + 65536..].windows(8).position(|window| window == needle).unwrap();
    assert_eq!(refused(&patched(bytes.clone(), at + 4, &2u32.to_le_bytes())).code(), "backing_file");
    // A parent locator among the metadata, in place of the logical sector size's entry.
    let locator = uuid::uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").to_bytes_le();
    let sector = uuid::uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f").to_bytes_le();
    let entry = table + bytes[table..].windows(16).position(|window| window == sector).unwrap();
    assert_eq!(refused(&patched(bytes.clone(), entry, &locator)).code(), "backing_file");
    let unknown = patched(bytes, entry, &[0xee; 16]);
    assert_eq!(refused(&unknown).code(), "unknown_features");
}

#[test]
fn containers_that_we_do_not_read_do_not_pass_as_raw() {
    let dir = tempfile::tempdir().unwrap();
    for (format, options) in
        [("vpc", vec![]), ("vpc", vec!["subformat=fixed"]), ("qed", vec![]), ("parallels", vec![])]
    {
        let path = image(dir.path(), &disk(5 * MIB), format, &options);
        assert_eq!(probe_file(&path).unwrap_err().code(), "unsupported_format", "{format} {options:?}");
    }
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    assert_eq!(refused(&tar).code(), "unsupported_format");
    assert_eq!(refused(b"").code(), "empty");
    assert_eq!(refused(&[0x1f, 0x8b, 8, 0, 0]).code(), "nested_compression");
}

#[test]
fn a_name_says_nothing_about_the_format() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    qemu_img(&[
        "create",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "/etc/passwd",
        "-F",
        "raw",
        path.to_str().unwrap(),
        "1M",
    ]);
    assert_eq!(probe_file(&path).unwrap_err().code(), "backing_file");
    let tricky = Path::new("json:{\"driver\":\"nbd\"}");
    let mut file = fs::File::create(dir.path().join(tricky)).unwrap();
    file.write_all(&disk(MIB)).unwrap();
    assert_eq!(probe_file(&dir.path().join(tricky)).unwrap().format, ImageFormat::Raw);
}
