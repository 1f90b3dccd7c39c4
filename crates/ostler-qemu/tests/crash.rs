//! The agent is killed at any moment of a start; the next one finds what is true and goes on.

mod common;

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use ostler_qemu::*;

/// Examples are built beside the tests.
fn agent_binary() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile_dir = test.parent().and_then(|deps| deps.parent()).unwrap();
    profile_dir.join("examples/agent")
}

fn agent(host: &QemuHost, spec: &MachineSpec) -> Child {
    Command::new(agent_binary())
        .arg(&host.config.run_dir)
        .arg(&spec.disks[0].layers[0].path)
        .arg(spec.id.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the example 'agent' is built")
}

fn first_line(agent: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(agent.stdout.take().unwrap()).read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

fn kill(mut agent: Child) {
    agent.kill().unwrap();
    agent.wait().unwrap();
}

/// Processes that hold this machine's directory as their working directory.
fn processes_of(host: &QemuHost, spec: &MachineSpec) -> usize {
    let dir = host.machine_dir(spec.id);
    let pids =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    pids.filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == dir)).count()
}

#[tokio::test]
async fn an_agent_killed_after_the_start_leaves_a_machine_that_is_adopted() {
    let host = QemuHost::new();
    let spec = spec(&host.disk("boot.raw"));
    let mut first = agent(&host, &spec);
    assert_eq!(first_line(&mut first), "started");
    // A second agent is refused while the machine lives.
    let mut second = agent(&host, &spec);
    let said = first_line(&mut second);
    assert!(said.starts_with("failed: ") && said.contains("already runs as process"), "{said}");
    second.wait().unwrap();
    kill(first);

    let found = host.hypervisor.survey().await.unwrap();
    let [Survey::Running(machine)] = &found[..] else { panic!("{found:?}") };
    assert_eq!(machine.state().await.unwrap(), RunState::Running);
    assert_eq!(processes_of(&host, &spec), 1);
    host.hypervisor.kill(spec.id).await.unwrap();
    let report = tokio::time::timeout(PATIENCE, machine.exited()).await.unwrap();
    assert_eq!(report.reason, ExitReason::Unknown, "not our child");
    host.hypervisor.forget(spec.id).await.unwrap();
    assert_eq!(processes_of(&host, &spec), 0);
}

async fn time_one_start(host: &QemuHost, spec: &MachineSpec) -> Duration {
    let begun = Instant::now();
    let mut agent = agent(host, spec);
    assert_eq!(first_line(&mut agent), "started");
    let whole_start = begun.elapsed();
    kill(agent);
    host.hypervisor.kill(spec.id).await.unwrap();
    host.hypervisor.forget(spec.id).await.unwrap();
    whole_start
}

#[tokio::test]
async fn an_agent_killed_at_any_moment_leaves_nothing_that_cannot_be_told() {
    let mut host = QemuHost::new();
    let disk = host.disk("boot.raw");
    // Fills the cache, so that the agents spend their time on the start itself.
    assert!(host.hypervisor.probe().await.problems.is_empty());
    let whole_start = time_one_start(&host, &spec(&disk)).await;
    let mut seen = std::collections::BTreeMap::<&str, usize>::new();
    for step in 0..40u32 {
        let spec = spec(&disk);
        let agent = agent(&host, &spec);
        // From before its first instruction to after the machine runs.
        tokio::time::sleep(whole_start * step / 30).await;
        kill(agent);

        host.hypervisor = Arc::new(QemuHypervisor::new(host.config.clone()));
        let found = host.hypervisor.survey().await.unwrap();
        assert!(found.len() <= 1, "{found:?}");
        let what = match found.first() {
            None => "nothing",
            Some(Survey::Dead { .. }) => "dead",
            Some(Survey::HalfStarted { .. }) => "half started",
            Some(Survey::Running(machine)) => {
                // Killed between the last step and the news of it: complete, so it may just go on.
                machine.resume().await.unwrap();
                "running"
            }
            Some(Survey::Unresponsive { reason, .. }) => panic!("after {step}: {reason}"),
        };
        *seen.entry(what).or_default() += 1;
        if what != "running" {
            host.hypervisor.kill(spec.id).await.unwrap();
            host.hypervisor.start(spec.clone(), StartOptions::default()).await.unwrap();
        }
        assert_eq!(processes_of(&host, &spec), 1, "one machine, one QEMU; it was {what}");
        host.hypervisor.kill(spec.id).await.unwrap();
        host.hypervisor.forget(spec.id).await.unwrap();
        assert_eq!(processes_of(&host, &spec), 0);
    }
    eprintln!("{seen:?}");
}

#[tokio::test]
async fn an_ordinary_user_needs_nothing_else() {
    use std::os::unix::fs::{PermissionsExt, chown};
    use std::os::unix::process::CommandExt;
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: the other tests ran as an ordinary user already");
        return;
    }
    const NOBODY: u32 = 65_534;
    let host = QemuHost::with(|config| config.qmp_timeout = Duration::from_secs(1));
    let disk = host.disk("boot.raw");
    let spec = spec(&disk);
    // The binary may lie where only root may look.
    let binary = host.dir.path().join("agent");
    std::fs::copy(agent_binary(), &binary).unwrap();
    for path in [host.dir.path(), &disk] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o700)).unwrap();
    }
    let mut agent = Command::new(&binary)
        .arg(&host.config.run_dir)
        .arg(&disk)
        .arg(spec.id.to_string())
        .stdout(Stdio::piped())
        .uid(NOBODY)
        .gid(NOBODY)
        .spawn()
        .unwrap();
    assert_eq!(first_line(&mut agent), "started");
    let found = host.hypervisor.survey().await.unwrap();
    let [Survey::Unresponsive { pid, .. }] = &found[..] else {
        panic!("its agent holds the monitor: {found:?}")
    };
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1"), "{status}");
    kill(agent);
    host.hypervisor.kill(spec.id).await.unwrap();
}
