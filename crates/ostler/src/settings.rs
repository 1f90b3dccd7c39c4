//! What an operator can set: from flags and the environment, then a TOML file, then defaults.
//!
//! Read once at the start. `ostler config check` reads it the same way and says what would be used.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ostler_api::{ByteSize, Name};
use ostler_control::CloudConfig;
use ostler_server::{Limits, ServerConfig, TlsIdentity, TlsListen};
use serde::{Deserialize, Deserializer};

use crate::cli::error::CliError;
use crate::data_dir;

/// Looked for when no file is named, in this order; `DATA_DIR/ostler.toml` comes before both.
const SYSTEM_FILE: &str = "/etc/ostler/ostler.toml";

/// A setting that cannot be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SettingsError {
    #[error("the settings file {} cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the settings file {} is not valid:\n{source}", path.display())]
    Parse { path: PathBuf, source: Box<toml::de::Error> },
    #[error("{setting}: {why}")]
    Value { setting: &'static str, why: String },
}

/// The file as it is written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    data_dir: Option<PathBuf>,
    listen: Option<SocketAddr>,
    plain_http: Option<SocketAddr>,
    log: Option<String>,
    log_format: Option<LogFormat>,
    tls: Tls,
    node: Node,
    scheduler: Scheduler,
    images: Images,
    store: StoreFile,
    retention: Retention,
    limits: LimitsFile,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Tls {
    names: Vec<String>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Node {
    enabled: Option<bool>,
    name: Option<Name>,
    labels: BTreeMap<String, String>,
    qemu: Option<PathBuf>,
    firmware_dirs: Option<Vec<PathBuf>>,
    /// First of the user ids that machines run as, one each, when the agent is root. 0: as the agent itself.
    first_uid: Option<u32>,
    uid_count: Option<u32>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Scheduler {
    cpu_ratio: Option<f64>,
    memory_ratio: Option<f64>,
    disk_ratio: Option<f64>,
    spread: Option<f64>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Images {
    max_size: Option<Size>,
    fetch_private: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StoreFile {
    history: Option<Span>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Retention {
    operations: Option<Span>,
    events: Option<Span>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LimitsFile {
    connections: Option<usize>,
    body: Option<Size>,
    request_timeout: Option<Span>,
    shutdown_grace: Option<Span>,
    node_lease: Option<Span>,
}

/// `"20G"`, or a number of bytes.
#[derive(Debug, Clone, Copy)]
struct Size(ByteSize);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Given {
            Bytes(u64),
            Text(String),
        }
        match Given::deserialize(from)? {
            Given::Bytes(bytes) => Ok(Self(ByteSize(bytes))),
            Given::Text(text) => text.parse().map(Self).map_err(serde::de::Error::custom),
        }
    }
}

/// `"90s"`, `"5m"`, `"1h30m"`.
#[derive(Debug, Clone, Copy)]
struct Span(Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        crate::cli::duration(&text).map(Self).map_err(serde::de::Error::custom)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    #[default]
    Text,
    Json,
}

/// What the command line and the environment say.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Overrides {
    /// Directory for the database, images, disks and the socket [default: /var/lib/ostler as root, else
    /// ~/.local/share/ostler]
    #[arg(long, value_name = "DIR", env = "OSTLER_DATA_DIR", hide_env_values = true)]
    pub(crate) data_dir: Option<PathBuf>,

    /// Address for the API over TLS; without, it answers on the unix socket only
    #[arg(long, value_name = "ADDR:PORT", env = "OSTLER_LISTEN", hide_env_values = true)]
    pub(crate) listen: Option<SocketAddr>,

    /// Loopback address for the API without TLS, for tests and for proxies on this machine
    #[arg(long, value_name = "ADDR:PORT", env = "OSTLER_PLAIN_HTTP", hide_env_values = true)]
    pub(crate) plain_http: Option<SocketAddr>,

    /// Settings file [default: DATA_DIR/ostler.toml, else /etc/ostler/ostler.toml, where they exist]
    #[arg(long, value_name = "FILE", env = "OSTLER_CONFIG", hide_env_values = true)]
    pub(crate) config: Option<PathBuf>,

    /// Name of this machine's node [default: its host name]
    #[arg(long, value_name = "NAME", env = "OSTLER_NODE_NAME", hide_env_values = true)]
    pub(crate) node_name: Option<Name>,

    /// Run no node agent: control plane only
    #[arg(long)]
    pub(crate) no_node: bool,

    /// What is logged: error, warn, info, debug or trace, also by module
    #[arg(long, value_name = "FILTER", env = "OSTLER_LOG", hide_env_values = true)]
    pub(crate) log: Option<String>,

    /// How the log is written
    #[arg(long, value_enum, value_name = "FORMAT", env = "OSTLER_LOG_FORMAT", hide_env_values = true)]
    pub(crate) log_format: Option<LogFormat>,
}

/// What is used.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The file that was read.
    pub(crate) file: Option<PathBuf>,
    pub(crate) data_dir: PathBuf,
    pub(crate) log: String,
    pub(crate) log_format: LogFormat,
    pub(crate) history: Duration,
    pub(crate) cloud: CloudConfig,
    pub(crate) server: ServerConfig,
    /// None: no node on this machine.
    pub(crate) node: Option<NodeSettings>,
}

#[derive(Debug, Clone)]
pub(crate) struct NodeSettings {
    pub(crate) name: Name,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) qemu: Option<PathBuf>,
    pub(crate) firmware_dirs: Option<Vec<PathBuf>>,
    pub(crate) uids: Option<(u32, u32)>,
}

/// Above every range that distributions, systemd and container tools hand out.
const FIRST_UID: u32 = 1_900_000_000;
const UID_COUNT: u32 = 65_536;

impl Settings {
    pub(crate) fn load(given: &Overrides) -> Result<Self, CliError> {
        let (path, file) = read(given).map_err(refused)?;
        Self::merge(given, path, file).map_err(refused)
    }

    fn merge(given: &Overrides, path: Option<PathBuf>, file: File) -> Result<Self, SettingsError> {
        let data_dir = given.data_dir.clone().or(file.data_dir).or_else(data_dir::default_data_dir);
        let data_dir = data_dir.ok_or(SettingsError::Value {
            setting: "data_dir",
            why: "there is no home directory to put it in; name one with --data-dir".to_owned(),
        })?;
        let data_dir = std::path::absolute(&data_dir)
            .map_err(|source| SettingsError::Read { path: data_dir.clone(), source })?;
        let cloud = cloud(&file.scheduler, &file.images, &file.retention, &file.limits)?;
        let server = ServerConfig {
            unix_socket: Some(data_dir.join(data_dir::SOCKET)),
            tls: tls(given.listen.or(file.listen), &file.tls, &data_dir)?,
            plain_http: loopback(given.plain_http.or(file.plain_http))?,
            limits: limits(&file.limits)?,
        };
        let node = (!given.no_node && file.node.enabled.unwrap_or(true))
            .then(|| node(given.node_name.clone(), &file.node))
            .transpose()?;
        Ok(Self {
            file: path,
            log: given.log.clone().or(file.log).unwrap_or_else(|| "info".to_owned()),
            log_format: given.log_format.or(file.log_format).unwrap_or_default(),
            history: file.store.history.map_or(Duration::from_secs(3600), |span| span.0),
            cloud,
            server,
            node,
            data_dir,
        })
    }
}

fn refused(error: SettingsError) -> CliError {
    CliError::usage(error.to_string())
        .hint("see docs/operations.md for all settings; ostler config check tries them")
}

/// The file that is named, else the first that exists.
fn read(given: &Overrides) -> Result<(Option<PathBuf>, File), SettingsError> {
    let parse = |path: PathBuf, text: &str| match toml::from_str(text) {
        Ok(file) => Ok((Some(path), file)),
        Err(source) => Err(SettingsError::Parse { path, source: Box::new(source) }),
    };
    if let Some(path) = &given.config {
        let text = std::fs::read_to_string(path)
            .map_err(|source| SettingsError::Read { path: path.clone(), source })?;
        return parse(path.clone(), &text);
    }
    let dir = given.data_dir.clone().or_else(data_dir::default_data_dir);
    for path in dir.map(|dir| dir.join("ostler.toml")).into_iter().chain([PathBuf::from(SYSTEM_FILE)]) {
        match std::fs::read_to_string(&path) {
            Ok(text) => return parse(path, &text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(SettingsError::Read { path, source }),
        }
    }
    Ok((None, File::default()))
}

fn cloud(
    scheduler: &Scheduler,
    images: &Images,
    retention: &Retention,
    limits: &LimitsFile,
) -> Result<CloudConfig, SettingsError> {
    let mut config = CloudConfig::default();
    let ratio = |setting: &'static str, given: Option<f64>, default: f64| match given {
        None => Ok(default),
        Some(ratio) if ratio.is_finite() && ratio > 0.0 && ratio <= 1000.0 => Ok(ratio),
        Some(ratio) => Err(SettingsError::Value {
            setting,
            why: format!("{ratio} is not a ratio above 0 and up to 1000"),
        }),
    };
    config.scheduler.cpu_ratio =
        ratio("scheduler.cpu_ratio", scheduler.cpu_ratio, config.scheduler.cpu_ratio)?;
    config.scheduler.memory_ratio =
        ratio("scheduler.memory_ratio", scheduler.memory_ratio, config.scheduler.memory_ratio)?;
    config.scheduler.disk_ratio =
        ratio("scheduler.disk_ratio", scheduler.disk_ratio, config.scheduler.disk_ratio)?;
    if let Some(spread) = scheduler.spread {
        if !spread.is_finite() {
            return Err(SettingsError::Value {
                setting: "scheduler.spread",
                why: format!("{spread} is no number"),
            });
        }
        config.scheduler.spread = spread;
    }
    if let Some(Size(size)) = images.max_size {
        config.image_max = size;
    }
    config.fetch_private = images.fetch_private.unwrap_or(config.fetch_private);
    config.operations_kept = retention.operations.map_or(config.operations_kept, |span| span.0);
    config.events_kept = retention.events.map_or(config.events_kept, |span| span.0);
    if let Some(Span(lease)) = limits.node_lease {
        if lease < Duration::from_secs(2) {
            return Err(SettingsError::Value { setting: "limits.node_lease", why: "at least 2s".to_owned() });
        }
        config.node_lease = lease;
    }
    Ok(config)
}

fn limits(file: &LimitsFile) -> Result<Limits, SettingsError> {
    let mut limits = Limits::default();
    if let Some(connections) = file.connections {
        if connections == 0 {
            return Err(SettingsError::Value { setting: "limits.connections", why: "at least 1".to_owned() });
        }
        limits.max_connections = connections;
    }
    if let Some(Size(size)) = file.body {
        limits.body_bytes = usize::try_from(size.0)
            .ok()
            .filter(|bytes| (1024..=64 << 20).contains(bytes))
            .ok_or(SettingsError::Value { setting: "limits.body", why: "between 1K and 64M".to_owned() })?;
    }
    limits.request_timeout = file.request_timeout.map_or(limits.request_timeout, |span| span.0);
    limits.grace = file.shutdown_grace.map_or(limits.grace, |span| span.0);
    Ok(limits)
}

fn loopback(addr: Option<SocketAddr>) -> Result<Option<SocketAddr>, SettingsError> {
    match addr {
        Some(addr) if !addr.ip().is_loopback() => Err(SettingsError::Value {
            setting: "plain_http",
            why: format!(
                "{addr} is not a loopback address, and HTTP without TLS can be read on the way; use listen"
            ),
        }),
        Some(_) | None => Ok(addr),
    }
}

fn tls(listen: Option<SocketAddr>, file: &Tls, data_dir: &Path) -> Result<Option<TlsListen>, SettingsError> {
    let identity = match (&file.certificate, &file.key) {
        (None, None) => TlsIdentity::Own { dir: data_dir.join("tls"), names: file.names.clone() },
        (Some(certificate), Some(key)) => {
            TlsIdentity::Files { certificate: certificate.clone(), key: key.clone() }
        }
        (Some(_), None) | (None, Some(_)) => {
            return Err(SettingsError::Value {
                setting: "tls",
                why: "certificate and key belong together: give both or neither".to_owned(),
            });
        }
    };
    Ok(listen.map(|addr| TlsListen { addr, identity }))
}

fn node(name: Option<Name>, file: &Node) -> Result<NodeSettings, SettingsError> {
    let name = name.or_else(|| file.name.clone()).unwrap_or_else(host_name);
    ostler_api::metadata::labels_check(&file.labels)
        .map_err(|why| SettingsError::Value { setting: "node.labels", why })?;
    let first = file.first_uid.unwrap_or(FIRST_UID);
    let count = file.uid_count.unwrap_or(UID_COUNT);
    let uids = match first {
        0 => None,
        first if count > 0 && first >= 1000 && first.checked_add(count).is_some() => Some((first, count)),
        first => {
            return Err(SettingsError::Value {
                setting: "node.first_uid",
                why: format!(
                    "{count} user ids from {first} on are not free for machines; 0 switches this off"
                ),
            });
        }
    };
    Ok(NodeSettings {
        name,
        labels: file.labels.clone(),
        qemu: file.qemu.clone(),
        firmware_dirs: file.firmware_dirs.clone(),
        uids,
    })
}

/// The host's name as a label: what is before the first dot, in lower case, other characters as `-`.
fn host_name() -> Name {
    let uname = rustix::system::uname();
    let host = uname.nodename().to_string_lossy().to_lowercase();
    let short: String = host
        .split('.')
        .next()
        .unwrap_or_default()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .take(63)
        .collect();
    Name::new(short.trim_matches('-')).unwrap_or_else(|_| match Name::new("node") {
        Ok(name) => name,
        Err(error) => unreachable!("a constant label is a name: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(text: &str, given: &Overrides) -> Result<Settings, String> {
        let file = toml::from_str(text).map_err(|error| error.to_string())?;
        Settings::merge(given, None, file).map_err(|error| error.to_string())
    }

    #[test]
    fn the_command_line_comes_before_the_file() {
        let given = Overrides { data_dir: Some("/a".into()), ..Overrides::default() };
        let settings =
            merged("data_dir = \"/b\"\nlog = \"debug\"\n[limits]\nnode_lease = \"1m\"", &given).unwrap();
        assert_eq!(settings.data_dir, PathBuf::from("/a"));
        assert_eq!(settings.log, "debug");
        assert_eq!(settings.cloud.node_lease, Duration::from_secs(60));
        assert_eq!(settings.server.unix_socket, Some("/a/ostler.sock".into()));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_setting() {
        let given = Overrides { data_dir: Some("/a".into()), ..Overrides::default() };
        for (text, words) in [
            ("plain_http = \"0.0.0.0:80\"", "loopback"),
            ("nope = 1", "unknown field"),
            ("[scheduler]\ncpu_ratio = 0.0", "scheduler.cpu_ratio"),
            ("[scheduler]\nmemory_ratio = nan", "scheduler.memory_ratio"),
            ("[tls]\nkey = \"/k\"", "belong together"),
            ("[limits]\nnode_lease = \"1s\"", "at least 2s"),
            ("[limits]\nbody = \"1\"", "limits.body"),
            ("[node]\nfirst_uid = 5", "node.first_uid"),
            ("[node]\nname = \"Not_A_Name\"", "name"),
            ("[images]\nmax_size = \"big\"", "is not a size"),
            ("[store]\nhistory = \"soon\"", "is not a time"),
        ] {
            let error = merged(text, &given).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn the_example_in_the_documentation_is_valid() {
        let page = include_str!("../../../docs/operations.md");
        let example =
            page.split("```toml").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
        let given = Overrides::default();
        merged(example, &given).unwrap();
    }
}
