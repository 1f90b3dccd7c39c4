//! A large simulated cloud in one process: how fast VMs are created, listed and placed, what they cost in memory and
//! processor time, and how long the server takes to start with and without them.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ostler_api::ByteSize;
use ostler_api::list::{ListParams, WatchLine};
use ostler_api::vm::{Vm, VmCreate};
use ostler_api::vm_phase::VmPhase;
use ostler_client::Client;
use support::{Samples, Served, import, line, measuring, ms};

/// Requests under way at one time.
const CONCURRENT: usize = 64;

fn main() {
    let (nodes, vms) = if measuring() { (1_000, 10_000) } else { (20, 50) };
    // One thread for the load: the server is what is measured, on the cores that are left.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run(nodes, vms));
}

async fn run(nodes: usize, vms: usize) {
    let dir = tempfile::tempdir().unwrap();
    let empty = Served::start(dir.path(), &["--no-node"]).await;
    let starts = Samples::new(restarts(empty, dir.path(), &["--no-node"], 7).await);
    line("start to ready, empty", &starts.text("ms"), "-", "-", "under 200 ms");
    let idle = Served::start(dir.path(), &[]).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    line(
        "resident memory, idle, with a node",
        &format!("{:.1} MiB", idle.rss_mib()),
        "-",
        "-",
        "under 40 MiB",
    );
    idle.stop();

    let count = nodes.to_string();
    let args = ["--no-node", "--simulated-nodes", &count];
    let served = Served::start(dir.path(), &args).await;
    let client = served.client();
    import(&client, "img", vec![0u8; 1 << 20]).await;
    while ready_nodes(&client).await < nodes {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    line(
        &format!("resident memory, {nodes} simulated nodes"),
        &format!("{:.0} MiB", served.rss_mib()),
        "-",
        "-",
        "-",
    );
    // The cost of one VM at a tenth and at the whole.
    let tenth = vms / 10;
    // The first ones also bring the image to every node.
    create(&served, &client, 0, tenth).await;
    let first = create(&served, &client, tenth, tenth).await;
    create(&served, &client, 2 * tenth, vms - 3 * tenth).await;
    let whole = create(&served, &client, vms - tenth, tenth).await;
    line(
        &format!("create to running, last {tenth} of {vms}"),
        &format!("{:.0} VMs/s", whole.rate),
        "3.0 VMs/s (OpenStack, fake driver, measured earlier)",
        &format!("{:.0}x", whole.rate / 3.0),
        "at least 300/s",
    );
    line(
        &format!("processor time of a VM, at {vms} and at {tenth}"),
        &format!("{:.2} ms", whole.cpu_ms),
        &format!("{:.2} ms", first.cpu_ms),
        &format!("{:.2}x", whole.cpu_ms / first.cpu_ms),
        "the same",
    );
    let metrics = client.metrics().await.unwrap();
    let value = |name: &str| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let decision = value("ostler_scheduler_seconds_total") / value("ostler_scheduler_placements_total") * 1e6;
    line(
        &format!("one scheduling decision, {nodes} nodes"),
        &format!("{decision:.0} µs"),
        "-",
        "-",
        "under 1 ms",
    );
    let mut lists = Vec::new();
    for _ in 0..9 {
        let begun = Instant::now();
        let bytes = get(dir.path(), "/v1/vms?limit=10000");
        lists.push(ms(begun.elapsed()));
        assert!(bytes > vms * 100, "{bytes} bytes");
    }
    line(&format!("list of {vms}"), &Samples::new(lists).text("ms"), "-", "-", "under 150 ms");
    tokio::time::sleep(Duration::from_secs(2)).await;
    line(
        &format!("resident memory, {nodes} nodes, {vms} VMs"),
        &format!("{:.0} MiB", served.rss_mib()),
        "-",
        "-",
        "under 400 MiB",
    );
    let full = Samples::new(restarts(served, dir.path(), &["--no-node"], 3).await);
    line(&format!("start to ready, {vms} VMs"), &full.text("ms"), "-", "-", "under 3000 ms");
}

/// Ends and starts the server some times; how long each start took.
async fn restarts(first: Served, dir: &std::path::Path, args: &[&str], times: usize) -> Vec<f64> {
    first.stop();
    let mut starts = Vec::new();
    for _ in 0..times {
        let served = Served::start(dir, args).await;
        starts.push(ms(served.ready));
        served.stop();
    }
    starts
}

/// The bytes of an answer, read and not parsed: the server's time alone.
fn get(dir: &std::path::Path, path: &str) -> usize {
    use std::io::{Read, Write};
    let mut socket = std::os::unix::net::UnixStream::connect(dir.join("ostler.sock")).unwrap();
    write!(socket, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer[..200]));
    answer.len()
}

async fn ready_nodes(client: &Client) -> usize {
    let params = ListParams { phase: Some("ready".into()), ..ListParams::default() };
    client.list_all::<ostler_api::node::Node>(&params).await.unwrap().0.len()
}

struct Created {
    rate: f64,
    cpu_ms: f64,
}

/// Creates `count` VMs and waits until all of them run.
async fn create(served: &Served, client: &Client, from: usize, count: usize) -> Created {
    let params = ListParams::default();
    let mut watch = client.watch::<Vm>(&params).await.unwrap();
    while !matches!(watch.next().await.unwrap().unwrap(), WatchLine::Synced { .. }) {}
    let cpu = served.cpu_secs();
    let begun = Instant::now();
    let next = Arc::new(AtomicUsize::new(from));
    let makers = (0..CONCURRENT).map(|_| {
        let (client, next) = (client.clone(), Arc::clone(&next));
        async move {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= from + count {
                    return;
                }
                let create = VmCreate {
                    image: Some("img".into()),
                    memory: ByteSize::mib(512),
                    ..VmCreate::named(format!("vm-{index}").parse().unwrap())
                };
                client.vm_create(&create, None).await.unwrap();
            }
        }
    });
    let made = futures::future::join_all(makers);
    let run = async {
        let mut running = std::collections::HashSet::new();
        while running.len() < count {
            match watch.next().await.unwrap().unwrap() {
                WatchLine::Added { object } | WatchLine::Modified { object } => {
                    assert_ne!(object.status.phase, VmPhase::Error, "{:?}", object.status.reason);
                    if object.status.phase == VmPhase::Running {
                        running.insert(object.metadata.id);
                    }
                }
                WatchLine::Error { problem } => panic!("{}", problem.detail),
                WatchLine::Deleted { .. } | WatchLine::Synced { .. } | WatchLine::Bookmark { .. } => {}
            }
        }
    };
    tokio::join!(made, run);
    let secs = begun.elapsed().as_secs_f64();
    let cpu = served.cpu_secs() - cpu;
    println!(
        "created {count} VMs from {from} on: {:.0}/s, {:.1} s of processor time",
        count as f64 / secs,
        cpu
    );
    Created { rate: count as f64 / secs, cpu_ms: cpu / count as f64 * 1e3 }
}
