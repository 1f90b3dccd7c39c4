//! What the benches share: a server of the built binary, numbers, and lines for the table of `scripts/bench`.

#![allow(dead_code, reason = "each bench uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ostler_client::{Client, Credentials, Target, body};

/// Whether this is a measurement or one round that shows that it works (`cargo test` runs benches too).
pub(crate) fn measuring() -> bool {
    std::env::args().any(|arg| arg == "--bench")
}

/// Sorted samples.
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    pub(crate) fn at(&self, share: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * share).round() as usize]
    }

    pub(crate) fn median(&self) -> f64 {
        self.at(0.5)
    }

    /// `36.1 ms (34.0–40.2)`: median, 10th and 90th percentile.
    pub(crate) fn text(&self, unit: &str) -> String {
        format!("{:.1} {unit} ({:.1}–{:.1})", self.median(), self.at(0.1), self.at(0.9))
    }
}

pub(crate) fn line(figure: &str, ours: &str, other: &str, ratio: &str, goal: &str) {
    println!("BENCH {figure} | {ours} | {other} | {ratio} | {goal}");
}

pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A server of the built binary on a directory, ended with this value. Its machines must be ended before.
pub(crate) struct Served {
    child: Child,
    pub(crate) dir: PathBuf,
    /// From the spawn to the first answer of the API.
    pub(crate) ready: Duration,
}

impl Served {
    pub(crate) async fn start(dir: &Path, args: &[&str]) -> Self {
        let log = std::fs::File::options().create(true).append(true).open(dir.join("serve.log")).unwrap();
        let begun = Instant::now();
        let child = Command::new(env!("CARGO_BIN_EXE_ostler"))
            .args(["serve", "--data-dir"])
            .arg(dir)
            .args(args)
            .env("OSTLER_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut served = Self { child, dir: dir.to_owned(), ready: Duration::ZERO };
        loop {
            if let Ok(client) = served.try_client()
                && client.version().await.is_ok()
            {
                break;
            }
            if let Ok(Some(status)) = served.child.try_wait() {
                panic!("the server ended ({status}); see {}", dir.join("serve.log").display());
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "the server does not get ready");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        served.ready = begun.elapsed();
        served
    }

    fn try_client(&self) -> Result<Client, ostler_client::ClientError> {
        Client::connect(Target::Unix(self.dir.join("ostler.sock")), Credentials::none())
    }

    pub(crate) fn client(&self) -> Client {
        self.try_client().unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn proc_file(&self, name: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{name}", self.pid())).unwrap()
    }

    /// Resident memory in MiB.
    pub(crate) fn rss_mib(&self) -> f64 {
        let status = self.proc_file("status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    }

    /// Processor time used so far, in seconds.
    pub(crate) fn cpu_secs(&self) -> f64 {
        let stat = self.proc_file("stat");
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
        ticks / 100.0
    }

    /// Ends it in order and waits.
    pub(crate) fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.end();
    }
}

/// Imports `bytes` as an image and waits until it is active.
pub(crate) async fn import(client: &Client, name: &str, bytes: Vec<u8>) {
    let create = ostler_api::image::ImageCreate {
        name: name.parse().unwrap(),
        labels: Default::default(),
        url: None,
        expected_sha256: None,
    };
    client.image_create(&create, None).await.unwrap();
    client.image_upload(name, 0, true, body::full(bytes)).await.unwrap();
    let active = ostler_client::Wait::phases(["active"], Duration::from_secs(60));
    let image: ostler_api::image::Image = client.get_when(name, &active).await.unwrap();
    assert_eq!(image.status.phase.as_str(), "active", "{:?}", image.status.reason);
}
