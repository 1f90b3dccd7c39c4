//! Properties of everything that is parsed: nothing panics, whatever is accepted comes out as it went in, and the short
//! parsers agree with a plain description of what they take. The fuzz targets in `fuzz/` use the same entry points.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::net::IpAddr;

use ostler_api::disk::DiskLimits;
use ostler_api::image::{ImageCreate, ImageFormat, ImagePatch, ImageUse};
use ostler_api::list::{LabelSelector, ListParams};
use ostler_api::metadata::labels_check;
use ostler_api::node::NodeRegister;
use ostler_api::snapshot::{
    Snapshot, SnapshotCreate, SnapshotDisk, SnapshotPatch, SnapshotPhase, SnapshotRevert, SnapshotSpec,
    SnapshotStatus,
};
use ostler_api::token::TokenCreate;
use ostler_api::vm::{
    DiskBus, Firmware, MachineState, MachineType, NicModel, Protocol, Publish, VmCreate, VmObserved, VmPatch,
};
use ostler_api::volume::{
    SnapshotUse, Volume, VolumeCreate, VolumePatch, VolumePhase, VolumeSpec, VolumeStatus,
};
use ostler_api::work::{
    Report, Reports, SnapshotReport, SnapshotState, StreamKind, StreamRequest, TaskAnswer, TaskOutcome,
    VmReport, VolumeReport, VolumeState, WorkLine,
};
use ostler_api::{AcceleratorWish, ByteSize, Fault, Metadata, Name, Problem, Time};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

/// Reads `bytes` as a `T`; what was read has to be the same after it was written and read again.
fn accepts<T: DeserializeOwned + Serialize + PartialEq + Debug>(bytes: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(bytes) {
        survives(&value);
    }
}

fn survives<T: DeserializeOwned + Serialize + PartialEq + Debug>(value: &T) {
    let text = serde_json::to_string(value).expect("what was read can be written");
    let again: T = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
    assert_eq!(&again, value, "{text}");
}

/// Every type that comes from outside.
fn all_accept(bytes: &[u8]) {
    accepts::<VmCreate>(bytes);
    accepts::<VmPatch>(bytes);
    accepts::<ImageCreate>(bytes);
    accepts::<ImagePatch>(bytes);
    accepts::<VolumeCreate>(bytes);
    accepts::<VolumePatch>(bytes);
    accepts::<SnapshotCreate>(bytes);
    accepts::<SnapshotPatch>(bytes);
    accepts::<TokenCreate>(bytes);
    accepts::<NodeRegister>(bytes);
    accepts::<ListParams>(bytes);
    accepts::<WorkLine>(bytes);
    accepts::<Reports>(bytes);
    accepts::<Problem>(bytes);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,20}".prop_map(Value::from),
        "[a-z0-9-]{1,10}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 32, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..6).prop_map(Value::from),
            btree_map("[a-z_]{1,10}", inner, 0..6).prop_map(|map| json!(map)),
        ]
    })
}

fn name() -> impl Strategy<Value = Name> {
    "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?".prop_map(|text| Name::new(&text).expect("a name"))
}

fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    btree_map("[a-zA-Z0-9._/-]{1,12}", "[^\\p{C}]{0,12}", 0..4)
}

fn id<T: From<Uuid> + Debug>() -> impl Strategy<Value = T> {
    any::<u128>().prop_map(|bits| Uuid::from_u128(bits).into())
}

fn size() -> impl Strategy<Value = ByteSize> {
    any::<u64>().prop_map(ByteSize)
}

fn time() -> impl Strategy<Value = Time> {
    (0i64..4_000_000_000_000).prop_map(|millis| {
        serde_json::from_value(json!(jiff::Timestamp::from_millisecond(millis).expect("a moment")))
            .expect("a time")
    })
}

fn publish() -> impl Strategy<Value = Publish> {
    (any::<bool>(), any::<IpAddr>(), 1u16.., 1u16..).prop_map(|(udp, host_addr, host_port, guest_port)| {
        Publish {
            protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
            host_addr,
            host_port,
            guest_port,
        }
    })
}

fn one_of<T: Copy + Debug + 'static>(all: &'static [T]) -> impl Strategy<Value = T> {
    proptest::sample::select(all)
}

fn vm_create() -> impl Strategy<Value = VmCreate> {
    let word = || option::of("[a-z0-9-]{1,20}");
    let what = (name(), labels(), any::<u32>(), size(), word(), option::of(size()), one_of(DiskBus::ALL));
    let boot = (word(), word(), option::of("\\PC{0,40}"), word(), word());
    let kind = (
        one_of(MachineType::ALL),
        one_of(Firmware::ALL),
        one_of(AcceleratorWish::ALL),
        one_of(NicModel::ALL),
        vec(publish(), 0..4),
    );
    let place = (option::of(name()), labels(), any::<bool>());
    (what, boot, kind, place).prop_map(|(what, boot, kind, place)| {
        let (name, labels, cpus, memory, image, disk, disk_bus) = what;
        let (kernel, initrd, cmdline, cdrom, snapshot) = boot;
        let (machine, firmware, accelerator, nic_model, publish) = kind;
        let (node, node_selector, start) = place;
        VmCreate {
            name,
            labels,
            cpus,
            memory,
            image,
            snapshot,
            disk,
            disk_bus,
            kernel,
            initrd,
            cmdline,
            cdrom,
            machine,
            firmware,
            accelerator,
            nic_model,
            publish,
            node,
            node_selector,
            start,
        }
    })
}

fn vm_patch() -> impl Strategy<Value = VmPatch> {
    (
        option::of(name()),
        option::of(labels()),
        option::of(any::<u32>()),
        option::of(size()),
        option::of(vec(publish(), 0..4)),
    )
        .prop_map(|(name, labels, cpus, memory, publish)| VmPatch {
            name,
            labels,
            cpus,
            memory,
            publish,
        })
}

fn fault() -> impl Strategy<Value = Fault> {
    ("[a-z_]{1,12}", "\\PC{0,40}", time()).prop_map(|(code, message, at)| Fault { code, message, at })
}

fn volume() -> impl Strategy<Value = Volume> {
    let image = (id(), "[0-9a-f]{64}", one_of(ImageFormat::ALL), size())
        .prop_map(|(image, sha256, format, virtual_size)| ImageUse { image, sha256, format, virtual_size });
    let metadata =
        (any::<u128>(), name(), option::of(name()), labels(), any::<u64>(), time(), option::of(time()));
    let snapshot = (id(), any::<u128>())
        .prop_map(|(snapshot, part)| SnapshotUse { snapshot, part: Uuid::from_u128(part) });
    let spec = (size(), option::of(image), option::of(snapshot), option::of(id()), any::<bool>(), limits());
    let status = (
        one_of(VolumePhase::ALL),
        option::of(fault()),
        option::of(name()),
        option::of(size()),
        option::of(size()),
        option::of(id()),
    );
    (metadata, spec, status).prop_map(|(metadata, spec, status)| {
        let (size, image, from, vm, protected, limits) = spec;
        let (phase, reason, node, used, grown, snapshot) = status;
        let (id, name, project, labels, revision, created, deleted) = metadata;
        Volume {
            metadata: Metadata { id: Uuid::from_u128(id), name, project, labels, revision, created, deleted },
            spec: VolumeSpec { image, snapshot: from, vm, protected, limits, ..VolumeSpec::blank(size) },
            status: VolumeStatus { phase, reason, node, used, size: grown, snapshot, flatten: None },
        }
    })
}

fn limits() -> impl Strategy<Value = DiskLimits> {
    any::<[u64; 4]>().prop_map(|[iops, bps_read, bps_write, iops_burst]| DiskLimits {
        iops,
        bps_read,
        bps_write,
        iops_burst,
        ..DiskLimits::default()
    })
}

fn snapshot() -> impl Strategy<Value = Snapshot> {
    let disk =
        (id(), name(), size(), any::<u128>(), any::<u128>()).prop_map(|(volume, name, size, part, layer)| {
            SnapshotDisk { volume, name, size, part: Uuid::from_u128(part), layer: Uuid::from_u128(layer) }
        });
    let spec = (option::of(id()), vec(disk, 0..3), "\\PC{0,40}")
        .prop_map(|(vm, disks, description)| SnapshotSpec { vm, disks, description });
    let revert = (id(), vec(any::<u128>(), 0..3)).prop_map(|(operation, layers)| SnapshotRevert {
        operation,
        layers: layers.into_iter().map(Uuid::from_u128).collect(),
    });
    let status = (
        one_of(SnapshotPhase::ALL),
        option::of(fault()),
        option::of(name()),
        option::of(id()),
        option::of(time()),
        option::of(time()),
        option::of(revert),
    );
    let metadata =
        (any::<u128>(), name(), option::of(name()), labels(), any::<u64>(), time(), option::of(time()));
    (metadata, spec, status).prop_map(|(metadata, spec, status)| {
        let (id, name, project, labels, revision, created, deleted) = metadata;
        let (phase, reason, node, parent, taken, deadline, revert) = status;
        Snapshot {
            metadata: Metadata { id: Uuid::from_u128(id), name, project, labels, revision, created, deleted },
            spec,
            status: SnapshotStatus { phase, reason, node, parent, taken, deadline, revert },
        }
    })
}

fn stream() -> impl Strategy<Value = StreamRequest> {
    let what = prop_oneof![
        any::<u64>().prop_map(|scrollback| StreamKind::Console { scrollback }),
        Just(StreamKind::Vnc),
        (any::<u64>(), any::<bool>()).prop_map(|(tail, follow)| StreamKind::Log { tail, follow }),
    ];
    (id(), id(), what).prop_map(|(id, vm, what)| StreamRequest { id, vm, what })
}

fn work_line() -> impl Strategy<Value = WorkLine> {
    prop_oneof![
        (any::<u128>(), any::<u64>())
            .prop_map(|(cloud, revision)| WorkLine::Hello { cloud: Uuid::from_u128(cloud), revision }),
        id().prop_map(|vm| WorkLine::VmGone { vm }),
        volume().prop_map(|volume| WorkLine::Volume { volume: Box::new(volume) }),
        id().prop_map(|volume| WorkLine::VolumeGone { volume }),
        snapshot().prop_map(|snapshot| WorkLine::Snapshot { snapshot: Box::new(snapshot) }),
        id().prop_map(|snapshot| WorkLine::SnapshotGone { snapshot }),
        "[0-9a-f]{64}".prop_map(|sha256| WorkLine::ImageGone { sha256 }),
        any::<u64>().prop_map(|revision| WorkLine::Synced { revision }),
        any::<u64>().prop_map(|revision| WorkLine::Bookmark { revision }),
        stream().prop_map(|stream| WorkLine::Stream { stream }),
    ]
}

fn report() -> impl Strategy<Value = Report> {
    let outcome = prop_oneof![
        ("[a-z]{1,8}", any::<u64>(), option::of(any::<u64>()))
            .prop_map(|(stage, done, total)| TaskOutcome::Progress { stage, done, total }),
        Just(TaskOutcome::Done),
        fault().prop_map(|fault| TaskOutcome::Failed { fault }),
    ];
    let answer = (id(), "[a-z]{1,8}", outcome).prop_map(|(operation, action, outcome)| TaskAnswer {
        operation,
        action,
        outcome,
    });
    let observed = (any::<u64>(), one_of(MachineState::ALL), time(), option::of(fault())).prop_map(
        |(generation, state, at, fault)| VmObserved { generation, state, at, end: None, fault, facts: None },
    );
    let state = prop_oneof![
        (size(), size()).prop_map(|(used, size)| VolumeState::Ready { used, size }),
        (size(), fault()).prop_map(|(size, fault)| VolumeState::NotGrown { size, fault }),
        fault().prop_map(|fault| VolumeState::Failed { fault }),
        Just(VolumeState::Gone),
    ];
    let snapshot_state = prop_oneof![
        Just(SnapshotState::Ready),
        Just(SnapshotState::Gone),
        id().prop_map(|operation| SnapshotState::Reverted { operation }),
        (id(), fault()).prop_map(|(operation, fault)| SnapshotState::NotReverted { operation, fault }),
        fault().prop_map(|fault| SnapshotState::Failed { fault }),
    ];
    prop_oneof![
        (id(), observed, option::of(answer))
            .prop_map(|(vm, observed, answer)| Report::Vm(Box::new(VmReport { vm, observed, answer }))),
        (id(), state).prop_map(|(volume, state)| Report::Volume(VolumeReport { volume, state })),
        (id(), snapshot_state)
            .prop_map(|(snapshot, state)| Report::Snapshot(SnapshotReport { snapshot, state })),
    ]
}

proptest! {
    #[test]
    fn any_bytes_are_answered(bytes in vec(any::<u8>(), 0..200)) {
        all_accept(&bytes);
    }

    #[test]
    fn any_json_is_answered(value in any_json()) {
        all_accept(value.to_string().as_bytes());
    }

    /// A good request with one field that is anything.
    #[test]
    fn nearly_good_json_is_answered(create in vm_create(), line in work_line(), which in any::<usize>(), odd in any_json()) {
        for value in [json!(create), json!(line)] {
            let Value::Object(mut fields) = value else { panic!("an object") };
            let keys: Vec<String> = fields.keys().cloned().collect();
            fields.insert(keys[which % keys.len()].clone(), odd.clone());
            all_accept(Value::Object(fields).to_string().as_bytes());
        }
    }

    #[test]
    fn requests_survive(create in vm_create(), patch in vm_patch()) {
        survives(&create);
        survives(&patch);
    }

    #[test]
    fn an_image_request_survives(name in name(), labels in labels(), url in option::of("\\PC{0,40}"), sha in option::of("[0-9a-f]{64}")) {
        survives(&ImageCreate { name, labels, url, expected_sha256: sha });
    }

    #[test]
    fn words_between_server_and_node_survive(line in work_line(), reports in vec(report(), 0..4)) {
        survives(&line);
        survives(&Reports { reports });
    }

    /// An unknown field is never passed over.
    #[test]
    fn unknown_fields_are_refused(create in vm_create(), key in "x_[a-z]{1,10}") {
        let Value::Object(mut fields) = json!(create) else { panic!("an object") };
        fields.insert(key, Value::Null);
        prop_assert!(serde_json::from_value::<VmCreate>(Value::Object(fields)).is_err());
    }

    #[test]
    fn published_ports_read_as_they_are_written(publish in publish()) {
        prop_assert_eq!(publish.to_string().parse(), Ok(publish));
    }

    #[test]
    fn any_text_is_a_port_or_not(text in prop_oneof!["\\PC{0,30}", "[0-9.:/\\[\\]a-fudtcp]{0,30}"]) {
        if let Ok(publish) = text.parse::<Publish>() {
            prop_assert!(publish.host_port != 0 && publish.guest_port != 0);
            prop_assert_eq!(publish.to_string().parse(), Ok(publish));
        }
    }

    #[test]
    fn sizes_are_powers_of_1024(number in 0u64..1 << 20, unit in 0usize..5, suffix in one_of(&["", "B", "iB"])) {
        let letter = ["", "K", "M", "G", "T"][unit];
        let suffix = if letter.is_empty() && suffix == "iB" { "B" } else { suffix };
        let expected = u128::from(number) << (10 * unit);
        for text in [format!("{number}{letter}{suffix}"), format!(" {number} {letter}{suffix} ").to_lowercase()] {
            let parsed: Option<u128> = text.parse::<ByteSize>().ok().map(|size| size.0.into());
            prop_assert_eq!(parsed, Some(expected).filter(|bytes| *bytes <= u64::MAX.into()), "{:?}", text);
        }
    }

    #[test]
    fn any_text_is_a_size_or_not(text in prop_oneof!["\\PC{0,20}", "[0-9.]{0,24} ?[kmgtKMGTiB]{0,3}"]) {
        let _ = text.parse::<ByteSize>();
    }

    /// What is shown is right to one decimal, and can be read again.
    #[test]
    fn sizes_shown_are_near(bytes in any::<u64>()) {
        let shown = ByteSize(bytes).to_string();
        // The largest do not fit when they are rounded up.
        if let Ok(again) = shown.parse::<ByteSize>() {
            let off = again.0.abs_diff(bytes);
            prop_assert!(u128::from(off) * 20 <= u128::from(bytes), "{} shown as {}", bytes, shown);
        } else {
            prop_assert!(bytes > u64::MAX / 20 * 19, "{} shown as {}", bytes, shown);
        }
    }

    #[test]
    fn names_are_rfc_1123_labels(text in prop_oneof!["[a-z0-9-]{0,70}", "\\PC{0,10}", "[a-z0-9]{60,66}"]) {
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        let good = (1..=63).contains(&text.len())
            && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            && edge(text.chars().next())
            && edge(text.chars().last());
        prop_assert_eq!(Name::new(&text).is_ok(), good);
        prop_assert_eq!(serde_json::from_value::<Name>(json!(text)).is_ok(), good);
    }

    #[test]
    fn any_text_is_a_selector_or_not(text in "\\PC{0,40}", labels in labels()) {
        if let Ok(selector) = text.parse::<LabelSelector>() {
            let _ = selector.matches(&labels);
        }
    }

    /// The four requirements, and that all of several must hold.
    #[test]
    fn selectors_say_what_they_mean(labels in labels(), key in "[a-z]{1,4}", value in "[a-z0-9]{0,4}", own in any::<proptest::sample::Index>()) {
        let mut pairs = vec![(key, value)];
        // One that is there, where it can be written in a selector.
        let plain = |(key, value): &(&String, &String)| {
            let plain = |text: &str| text.trim() == text && !text.contains(['=', ',', '!']);
            plain(key) && plain(value)
        };
        let there: Vec<(&String, &String)> = labels.iter().filter(plain).collect();
        if !there.is_empty() {
            let (key, value) = there[own.index(there.len())];
            pairs.push((key.clone(), value.clone()));
        }
        let holds = |text: &str| text.parse::<LabelSelector>().map(|selector| selector.matches(&labels));
        for (key, value) in &pairs {
            let equal = labels.get(key) == Some(value);
            let there = labels.contains_key(key);
            prop_assert_eq!(holds(&format!("{key}={value}")), Ok(equal));
            prop_assert_eq!(holds(&format!("{key}!={value}")), Ok(!equal));
            prop_assert_eq!(holds(key), Ok(there));
            prop_assert_eq!(holds(&format!("!{key}")), Ok(!there));
            prop_assert_eq!(holds(&format!("{key}={value}, !{key}")), Ok(false));
            prop_assert_eq!(holds(&format!(" {key} = {value} , {key}")), Ok(equal));
        }
        prop_assert_eq!(holds(""), Ok(true));
        prop_assert!(holds("=x").is_err() && holds("!").is_err());
    }

    #[test]
    fn labels_are_checked_not_trusted(labels in btree_map("\\PC{0,70}", "\\PC{0,300}", 0..4)) {
        if labels_check(&labels).is_ok() {
            for (key, value) in &labels {
                prop_assert!((1..=63).contains(&key.len()) && value.chars().count() <= 255);
            }
        }
    }
}
