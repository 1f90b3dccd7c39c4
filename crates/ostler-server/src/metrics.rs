//! What the server counts of itself, as Prometheus text.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::Method;
use parking_lot::Mutex;

use crate::app::App;

/// Upper bounds of the buckets, in seconds. Watches and waits fall in the last.
const BUCKETS: [f64; 9] = [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0, 300.0];

/// Requests by route template, method and status. Few series: none of the three comes from a client's free text.
#[derive(Debug, Default)]
pub(crate) struct HttpMetrics {
    series: Mutex<BTreeMap<Key, Series>>,
    in_progress: AtomicUsize,
}

/// A request whose answer has not begun; also one whose client has gone counts no longer than it lives.
#[derive(Debug)]
pub(crate) struct InProgress<'a>(&'a AtomicUsize);

impl Drop for InProgress<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    route: String,
    method: &'static str,
    status: u16,
}

#[derive(Debug, Default)]
struct Series {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    seconds: f64,
}

impl HttpMetrics {
    pub(crate) fn begin(&self) -> InProgress<'_> {
        self.in_progress.fetch_add(1, Ordering::Relaxed);
        InProgress(&self.in_progress)
    }

    pub(crate) fn request(&self, method: &Method, route: &str, status: u16, took: Duration) {
        let key = Key { route: route.to_owned(), method: method_word(method), status };
        let seconds = took.as_secs_f64();
        let mut series = self.series.lock();
        let series = series.entry(key).or_default();
        series.count += 1;
        series.seconds += seconds;
        for (bucket, bound) in series.buckets.iter_mut().zip(BUCKETS) {
            if seconds <= bound {
                *bucket += 1;
            }
        }
    }

    fn write(&self, out: &mut String) -> fmt::Result {
        head(out, "ostler_http_requests_in_progress", "gauge", "Requests whose answer has not begun.")?;
        writeln!(out, "ostler_http_requests_in_progress {}", self.in_progress.load(Ordering::Relaxed))?;
        let series = self.series.lock();
        head(out, "ostler_http_requests_total", "counter", "Requests answered.")?;
        for (key, series) in series.iter() {
            writeln!(out, "ostler_http_requests_total{{{key}}} {}", series.count)?;
        }
        head(out, "ostler_http_request_duration_seconds", "histogram", "Time until the head of the answer.")?;
        for (key, series) in series.iter() {
            for (count, bound) in series.buckets.iter().zip(BUCKETS) {
                writeln!(out, "ostler_http_request_duration_seconds_bucket{{{key},le=\"{bound}\"}} {count}")?;
            }
            let count = series.count;
            writeln!(out, "ostler_http_request_duration_seconds_bucket{{{key},le=\"+Inf\"}} {count}")?;
            writeln!(out, "ostler_http_request_duration_seconds_sum{{{key}}} {}", series.seconds)?;
            writeln!(out, "ostler_http_request_duration_seconds_count{{{key}}} {count}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "route=\"{}\",method=\"{}\",status=\"{}\"", self.route, self.method, self.status)
    }
}

fn method_word(method: &Method) -> &'static str {
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        .into_iter()
        .find(|word| *word == method.as_str())
        .unwrap_or("other")
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) -> fmt::Result {
    writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}")
}

/// The whole text of `/metrics`: the cloud's part and the server's.
pub(crate) fn text(app: &App) -> Result<String, fmt::Error> {
    let mut out = app.cloud.metrics();
    if !out.is_empty() && !out.ends_with('\n') {
        out.push('\n');
    }
    app.metrics.write(&mut out)?;
    head(&mut out, "ostler_connections", "gauge", "Open connections.")?;
    for (listener, connections) in &app.connections {
        writeln!(out, "ostler_connections{{listener=\"{listener}\"}} {}", connections.open())?;
    }
    head(&mut out, "ostler_connections_refused_total", "counter", "Connections that were one too many.")?;
    for (listener, connections) in &app.connections {
        writeln!(
            out,
            "ostler_connections_refused_total{{listener=\"{listener}\"}} {}",
            connections.refused()
        )?;
    }
    head(&mut out, "ostler_uptime_seconds", "gauge", "Time since the server started.")?;
    writeln!(out, "ostler_uptime_seconds {}", app.started.elapsed().as_secs())?;
    if let Some(bytes) = resident_bytes() {
        head(&mut out, "process_resident_memory_bytes", "gauge", "Resident memory of the process.")?;
        writeln!(out, "process_resident_memory_bytes {bytes}")?;
    }
    if let Some(fds) = open_descriptors() {
        head(&mut out, "process_open_fds", "gauge", "Open file descriptors of the process.")?;
        writeln!(out, "process_open_fds {fds}")?;
    }
    Ok(out)
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(kib.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

fn open_descriptors() -> Option<usize> {
    // Less the one that reads the directory.
    Some(std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_route_method_and_status() {
        let metrics = HttpMetrics::default();
        metrics.request(&Method::GET, "/v1/vms/{vm}", 200, Duration::from_millis(3));
        metrics.request(&Method::GET, "/v1/vms/{vm}", 200, Duration::from_secs(2));
        metrics.request(&Method::from_bytes(b"BREW").unwrap(), "unmatched", 404, Duration::ZERO);
        let mut out = String::new();
        metrics.write(&mut out).unwrap();
        for line in [
            "ostler_http_requests_total{route=\"/v1/vms/{vm}\",method=\"GET\",status=\"200\"} 2",
            "ostler_http_request_duration_seconds_bucket{route=\"/v1/vms/{vm}\",method=\"GET\",status=\"200\",le=\"0.005\"} 1",
            "ostler_http_request_duration_seconds_bucket{route=\"/v1/vms/{vm}\",method=\"GET\",status=\"200\",le=\"+Inf\"} 2",
            "ostler_http_requests_total{route=\"unmatched\",method=\"other\",status=\"404\"} 1",
        ] {
            assert!(out.lines().any(|l| l == line), "{line}\n{out}");
        }
    }
}
