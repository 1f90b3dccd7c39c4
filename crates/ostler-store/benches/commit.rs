//! Durable commits per second of the SQLite back end with 1, 16 and 256 writers, against plain SQLite with the same
//! settings and one transaction a write, in the same run and on the same disk.
//!
//! `cargo bench -p ostler-store --bench commit -- [--rounds N] [--seconds S] [--value BYTES] [--keys N] [--dir DIR]`
//!
//! A round measures plain SQLite and then each number of writers, so that noise of the machine meets all of them. Printed
//! are the median over the rounds, the spread from the 10th to the 90th percentile, and the ratio of the medians.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use ostler_store::{SqliteOptions, SqliteStore, Store, Txn};
use rusqlite::Connection;

const WRITERS: [usize; 3] = [1, 16, 256];

struct Settings {
    rounds: usize,
    seconds: f64,
    value: usize,
    keys: u64,
    directory: PathBuf,
}

fn main() {
    let settings = match settings() {
        Ok(settings) => settings,
        Err(problem) => {
            eprintln!(
                "{problem}\nusage: commit [--rounds N] [--seconds S] [--value BYTES] [--keys N] [--dir DIR]"
            );
            std::process::exit(2);
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime starts");
    let mut plain = Vec::new();
    let mut ours = WRITERS.map(|_| Vec::new());
    for _ in 0..settings.rounds {
        let directory = tempfile::tempdir_in(&settings.directory).expect("the directory is writable");
        plain.push(measure_plain(&directory.path().join("plain.db"), &settings));
        let store =
            SqliteStore::open(SqliteOptions::new(directory.path().join("ours.db"))).expect("the store opens");
        for (writers, rates) in WRITERS.iter().zip(&mut ours) {
            rates.push(runtime.block_on(measure_store(store.clone(), *writers, &settings)));
        }
    }
    println!(
        "durable commits/s, values of {} bytes over {} keys, {} rounds of {} s each",
        settings.value, settings.keys, settings.rounds, settings.seconds
    );
    println!("{:<28} {:>10} {:>21} {:>8}", "", "median", "p10-p90", "ratio");
    let base = report("plain SQLite, 1 writer", plain, None);
    for (writers, rates) in WRITERS.iter().zip(ours) {
        report(&format!("store, {writers} writers"), rates, Some(base));
    }
}

fn settings() -> Result<Settings, String> {
    let mut settings =
        Settings { rounds: 5, seconds: 0.4, value: 2048, keys: 30_000, directory: std::env::temp_dir() };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--bench" {
            // From cargo.
            continue;
        }
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        let number = || value.parse::<f64>().ok().filter(|number| *number > 0.0);
        let number = || number().ok_or_else(|| format!("{argument} {value}: not a number above 0"));
        match argument.as_str() {
            "--rounds" => settings.rounds = number()? as usize,
            "--seconds" => settings.seconds = number()?,
            "--value" => settings.value = number()? as usize,
            "--keys" => settings.keys = number()? as u64,
            "--dir" => settings.directory = value.into(),
            _ => return Err(format!("{argument} is not known")),
        }
    }
    Ok(settings)
}

/// The nth key to write: all keys in a fixed scattered order.
fn key(n: u64, keys: u64) -> String {
    format!("/ostler/default/vms/{:08}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % keys)
}

/// What one would write without this crate: a table of keys and values.
fn measure_plain(path: &Path, settings: &Settings) -> f64 {
    let connection = Connection::open(path).expect("SQLite opens");
    connection
        .execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 4000;
             PRAGMA cache_size = -4000;
             CREATE TABLE kv(key TEXT PRIMARY KEY, value BLOB NOT NULL);",
        )
        .expect("the table is made");
    let value = vec![b'v'; settings.value];
    let (start, limit) = (Instant::now(), Duration::from_secs_f64(settings.seconds));
    let mut count = 0;
    while start.elapsed() < limit {
        connection
            .prepare_cached("INSERT OR REPLACE INTO kv(key, value) VALUES (?1, ?2)")
            .and_then(|mut statement| statement.execute((key(count, settings.keys), &value)))
            .expect("the write is durable");
        count += 1;
    }
    count as f64 / start.elapsed().as_secs_f64()
}

async fn measure_store(store: Arc<SqliteStore>, writers: usize, settings: &Settings) -> f64 {
    let value = Bytes::from(vec![b'v'; settings.value]);
    let (next, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let start = Instant::now();
    let tasks: Vec<_> = (0..writers)
        .map(|_| {
            let (store, value, next, stop) = (store.clone(), value.clone(), next.clone(), stop.clone());
            let keys = settings.keys;
            tokio::spawn(async move {
                let mut count = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    let key = key(next.fetch_add(1, Ordering::Relaxed), keys);
                    let outcome =
                        store.txn(Txn::new().put(key, value.clone())).await.expect("the write is durable");
                    drop(outcome);
                    count += 1;
                }
                count
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs_f64(settings.seconds)).await;
    stop.store(true, Ordering::Relaxed);
    let mut total = 0;
    for task in tasks {
        total += task.await.expect("no writer fails");
    }
    total as f64 / start.elapsed().as_secs_f64()
}

fn report(what: &str, mut rates: Vec<f64>, base: Option<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    let at = |share: f64| rates[((rates.len() - 1) as f64 * share).round() as usize];
    let median = at(0.5);
    let ratio = base.map_or_else(|| "1.00x".to_owned(), |base| format!("{:.2}x", median / base));
    println!("{what:<28} {median:>10.0} {:>10.0} {:>10.0} {ratio:>8}", at(0.1), at(0.9));
    median
}
