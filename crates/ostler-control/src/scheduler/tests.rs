//! Properties of placement.

use proptest::prelude::*;

use super::*;

fn candidate(index: usize, cpus: u32, memory: u64) -> Candidate {
    Candidate {
        name: Name::new(&format!("n{index}")).unwrap(),
        labels: Labels::new(),
        ready: true,
        schedulable: true,
        hypervisor: true,
        accelerators: vec![Accelerator::Tcg],
        cpus,
        memory: ByteSize::gib(memory),
        disk: ByteSize::gib(1000),
        used: Allocation::default(),
    }
}

fn need(cpus: u32, memory: u64) -> Need {
    Need {
        cpus,
        memory: ByteSize::gib(memory),
        disk: ByteSize::gib(1),
        accelerator: AcceleratorWish::Auto,
        selector: Labels::new(),
        node: None,
    }
}

proptest! {
    /// Whatever is placed in whatever order, no node is promised more than its ratio allows.
    #[test]
    fn never_over_committed(
        nodes in proptest::collection::vec((1u32..64, 1u64..256), 1..20),
        needs in proptest::collection::vec((1u32..16, 1u64..64), 1..200),
        spread in prop_oneof![Just(1.0), Just(-1.0), Just(0.0)],
    ) {
        let config = SchedulerConfig { cpu_ratio: 2.0, memory_ratio: 1.0, disk_ratio: 1.0, spread };
        let mut all: Vec<Candidate> =
            nodes.iter().enumerate().map(|(index, (cpus, memory))| candidate(index, *cpus, *memory)).collect();
        for (cpus, memory) in needs {
            let need = need(cpus, memory);
            match place(&need, &all, &config) {
                Ok(index) => all[index].take(&need),
                Err(why) => {
                    // Told for every node, and nobody could have taken it.
                    prop_assert_eq!(why.obstacles.iter().map(|(_, count)| count).sum::<usize>(), all.len());
                    prop_assert!(all.iter().all(|one| obstacle(&need, one, &config).is_some()));
                }
            }
        }
        for one in &all {
            prop_assert!(f64::from(one.used.cpus) <= f64::from(one.cpus) * config.cpu_ratio);
            prop_assert!(one.used.memory <= one.memory);
            prop_assert!(one.used.disk <= one.disk);
        }
    }

    /// The order in which nodes are listed does not change the answer.
    #[test]
    fn the_same_question_has_the_same_answer(
        nodes in proptest::collection::vec((1u32..8, 1u64..8), 1..12),
        turn in 0usize..12,
    ) {
        let config = SchedulerConfig::default();
        let all: Vec<Candidate> =
            nodes.iter().enumerate().map(|(index, (cpus, memory))| candidate(index, *cpus, *memory)).collect();
        let mut turned = all.clone();
        turned.rotate_left(turn % all.len());
        let name = |list: &[Candidate]| place(&need(1, 1), list, &config).map(|index| list[index].name.clone());
        prop_assert_eq!(name(&all).ok(), name(&turned).ok());
    }
}

#[test]
fn spreads_or_packs() {
    let mut all = vec![candidate(0, 8, 8), candidate(1, 8, 8)];
    all[0].take(&need(1, 1));
    let spread = SchedulerConfig::default();
    assert_eq!(place(&need(1, 1), &all, &spread), Ok(1));
    let pack = SchedulerConfig { spread: -1.0, ..spread };
    assert_eq!(place(&need(1, 1), &all, &pack), Ok(0));
}

#[test]
fn each_obstacle_is_told() {
    let config = SchedulerConfig::default();
    let good = candidate(0, 8, 8);
    let with = |change: fn(&mut Candidate)| {
        let mut one = good.clone();
        change(&mut one);
        obstacle(&need(1, 1), &one, &config)
    };
    assert_eq!(with(|_| ()), None);
    assert_eq!(with(|one| one.ready = false), Some(Obstacle::NotReady));
    assert_eq!(with(|one| one.schedulable = false), Some(Obstacle::Cordoned));
    assert_eq!(with(|one| one.hypervisor = false), Some(Obstacle::NoHypervisor));
    assert_eq!(with(|one| one.accelerators.clear()), Some(Obstacle::Accelerator));
    assert_eq!(with(|one| one.cpus = 0), Some(Obstacle::Cpus));
    assert_eq!(with(|one| one.memory = ByteSize(0)), Some(Obstacle::Memory));
    assert_eq!(with(|one| one.disk = ByteSize(0)), Some(Obstacle::Disk));
    let mut labelled = need(1, 1);
    labelled.selector.insert("disk".into(), "fast".into());
    assert_eq!(obstacle(&labelled, &good, &config), Some(Obstacle::Labels));
    let mut pinned = need(1, 1);
    pinned.node = Some(Name::new("other").unwrap());
    assert_eq!(obstacle(&pinned, &good, &config), Some(Obstacle::OtherNode));
    let mut kvm = need(1, 1);
    kvm.accelerator = AcceleratorWish::Kvm;
    assert_eq!(obstacle(&kvm, &good, &config), Some(Obstacle::Accelerator));
}

#[test]
fn hopeless_is_what_no_waiting_mends() {
    let config = SchedulerConfig::default();
    let mut full = candidate(0, 8, 8);
    full.take(&need(1, 8));
    let why = place(&need(1, 1), std::slice::from_ref(&full), &config).unwrap_err();
    assert!(!why.hopeless, "room may become free");
    let why = place(&need(1, 9), &[full], &config).unwrap_err();
    assert!(why.hopeless, "it is larger than any node");
    assert_eq!(why.message(), "no node fits: not enough memory (1 node)");
    let why = place(&need(1, 1), &[], &config).unwrap_err();
    assert!(!why.hopeless, "a node may join");
}
