//! What the tests of this crate share.

use std::sync::Arc;

use ostler_api::image::{Image, ImageContent, ImageData, ImageFormat, ImagePhase, ImageSpec, ImageStatus};
use ostler_api::metadata::Labels;
use ostler_api::node::{NodeFacts, NodeRegister};
use ostler_api::vm::{
    Firmware, MachineState, MachineType, NicModel, Power, Vm, VmCreate, VmNic, VmObserved, VmSpec, VmStatus,
};
use ostler_api::vm_phase::VmPhase;
use ostler_api::work::{Report, Reports, TaskAnswer, TaskOutcome, VmReport};
use ostler_api::{
    Accelerator, AcceleratorWish, ByteSize, DEFAULT_PROJECT, ImageId, Metadata, Name, NodeId, Time, VmId,
};
use ostler_storage::ImageStore;
use ostler_store::MemoryStore;

use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::config::CloudConfig;

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// A VM that is placed on `node`.
pub(crate) fn vm(vm_name: &str, node: &str) -> Vm {
    Vm {
        metadata: Metadata::new(VmId::new().into(), name(vm_name), Some(name(DEFAULT_PROJECT))),
        spec: VmSpec {
            cpus: 1,
            memory: ByteSize::mib(256),
            machine: MachineType::Q35,
            firmware: Firmware::Bios,
            accelerator: AcceleratorWish::Auto,
            kernel: None,
            disks: Vec::new(),
            cdrom: None,
            nics: vec![VmNic {
                mac: "52:54:00:00:00:01".into(),
                model: NicModel::Virtio,
                publish: Vec::new(),
            }],
            node_selector: Labels::new(),
            node: None,
            power: Power::Running,
        },
        status: VmStatus {
            phase: VmPhase::Pending,
            reason: None,
            node: Some(name(node)),
            task: None,
            observed: None,
            node_silent: false,
        },
    }
}

/// A cloud over a store in memory, with its image directory.
pub(crate) struct TestCloud {
    pub(crate) cloud: Arc<Cloud>,
    pub(crate) admin: Caller,
    _dir: tempfile::TempDir,
}

impl TestCloud {
    pub(crate) async fn new() -> Self {
        Self::with(CloudConfig::default()).await
    }

    pub(crate) async fn with(config: CloudConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let images = Arc::new(ImageStore::open(dir.path()).unwrap());
        let cloud = Cloud::open(Arc::new(MemoryStore::new()), images, config).await.unwrap();
        let admin = cloud.caller_local();
        Self { cloud, admin, _dir: dir }
    }

    /// Puts an active image without a file in place.
    pub(crate) async fn image(&self, image_name: &str) -> ImageId {
        let id = ImageId::new();
        let mut metadata = Metadata::new(id.into(), name(image_name), Some(name(DEFAULT_PROJECT)));
        metadata.created = Time::now();
        let image = Image {
            metadata,
            spec: ImageSpec { url: None, expected_sha256: None },
            status: ImageStatus {
                phase: ImagePhase::Active,
                reason: None,
                data: Some(ImageData {
                    sha256: "a".repeat(64),
                    source_sha256: "a".repeat(64),
                    format: ImageFormat::Qcow2,
                    source_format: ImageFormat::Qcow2,
                    content: ImageContent::Disk,
                    virtual_size: ByteSize::gib(1),
                    size: ByteSize::mib(10),
                }),
            },
        };
        self.cloud.commit(|_, change| change.create(&image)).await.unwrap();
        id
    }

    pub(crate) async fn node(&self, node: &str, cpus: u32, memory: ByteSize) {
        let register = NodeRegister { id: NodeId::new(), labels: Labels::new(), facts: facts(cpus, memory) };
        self.cloud.node_register(&self.admin, node, register).await.unwrap();
    }

    pub(crate) fn create(vm_name: &str) -> VmCreate {
        VmCreate { image: Some("img".into()), memory: ByteSize::mib(256), ..VmCreate::named(name(vm_name)) }
    }

    pub(crate) fn vm(&self, vm_name: &str) -> Arc<Vm> {
        self.cloud.get::<Vm>(&self.admin, None, vm_name).unwrap()
    }

    /// Answers the VM's task as its node would.
    pub(crate) async fn answer(&self, vm_name: &str, state: MachineState, outcome: TaskOutcome) {
        let vm = self.vm(vm_name);
        let task = vm.status.task.clone().unwrap();
        let report = VmReport {
            vm: vm.metadata.id.into(),
            observed: observed(&vm, state),
            answer: Some(TaskAnswer {
                operation: task.operation,
                action: task.action.name().to_owned(),
                outcome,
            }),
        };
        self.report(&vm, report).await;
    }

    pub(crate) async fn report(&self, vm: &Vm, report: VmReport) {
        let node = vm.status.node.clone().unwrap();
        let reports = Reports { reports: vec![Report::Vm(Box::new(report))] };
        let taken = self.cloud.node_reports(&self.admin, node.as_str(), reports).await.unwrap();
        assert_eq!((taken.taken, taken.dropped), (1, 0));
    }
}

pub(crate) fn observed(vm: &Vm, state: MachineState) -> VmObserved {
    let generation = vm.status.observed.as_ref().map_or(1, |observed| observed.generation + 1);
    VmObserved { generation, state, at: Time::now(), end: None, fault: None, facts: None }
}

pub(crate) fn facts(cpus: u32, memory: ByteSize) -> NodeFacts {
    NodeFacts {
        version: "0".into(),
        boot: "b".into(),
        cpus,
        memory,
        disk: ByteSize::gib(1000),
        disk_free: ByteSize::gib(1000),
        cpu_model: "test".into(),
        hypervisor: Some("7.2".into()),
        accelerators: vec![Accelerator::Tcg],
        warnings: Vec::new(),
    }
}
