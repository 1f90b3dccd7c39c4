//! This machine as a node: its token, its drivers, its agent.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ostler_api::token::{Role, TokenCreate};
use ostler_api::{ErrorCode, Name};
use ostler_client::{Client, Credentials, Target};
use ostler_control::Cloud;
use ostler_node::{Agent, AgentConfig, ClientPlane};
use ostler_qemu::{QemuConfig, QemuHypervisor, QemuUser};
use ostler_storage::DirPool;
use rustix::fs::{FlockOperation, flock};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cli::error::CliError;
use crate::data_dir;
use crate::serve::private_dir;
use crate::settings::{NodeSettings, Settings};

/// Everything of the node is below this.
pub(crate) fn node_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("node")
}

fn token_path(data_dir: &Path) -> PathBuf {
    node_dir(data_dir).join("token")
}

/// What the node's token is called.
pub(crate) fn token_request(node: &Name) -> TokenCreate {
    let short: String = node.as_str().chars().take(58).collect();
    let name = Name::new(&format!("node-{}", short.trim_end_matches('-'))).unwrap_or_else(|_| node.clone());
    TokenCreate { name, role: Role::Node, project: None, node: Some(node.clone()), ttl: None }
}

/// The node's token: the one on its disk while it is good, else a new one.
pub(crate) async fn token_of(cloud: &Arc<Cloud>, data_dir: &Path, node: &Name) -> Result<String, CliError> {
    if let Some(secret) = saved_token(data_dir)
        && let Ok(caller) = cloud.caller_bearer(&secret).await
        && matches!(
            caller.identity(),
            ostler_control::Identity::Token { node: Some(of), role: Role::Node, .. } if of == node
        )
    {
        return Ok(secret);
    }
    let failed =
        |error: ostler_api::ApiError| CliError::failed("the node gets no token").why(error.to_string());
    let admin = cloud.caller_local();
    let request = token_request(node);
    match cloud.token_delete(&admin, request.name.as_str()).await {
        Ok(()) => {}
        Err(error) if error.code == ErrorCode::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let made = cloud.token_create(&admin, request).await.map_err(failed)?;
    save_token(data_dir, &made.secret)?;
    Ok(made.secret)
}

pub(crate) fn saved_token(data_dir: &Path) -> Option<String> {
    let text = fs::read_to_string(token_path(data_dir)).ok()?;
    Some(text.trim().to_owned())
}

pub(crate) fn save_token(data_dir: &Path, secret: &str) -> Result<(), CliError> {
    private_dir(&node_dir(data_dir))?;
    let path = token_path(data_dir);
    let new = path.with_extension("new");
    let write = || {
        let mut file =
            fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
        file.write_all(secret.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &path)
    };
    write().map_err(|error: std::io::Error| {
        CliError::failed(format!("the node's token cannot be written to {}", path.display()))
            .why(error.to_string())
    })
}

/// How long a held lock is asked for again. An agent that was killed while it started a QEMU leaves its lock to that
/// child until the child executes its program, which is soon.
const HANDOVER: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);

/// Keeps a second agent off the same machines for as long as it lives.
async fn lock(dir: &Path) -> Result<fs::File, CliError> {
    let path = dir.join("agent.lock");
    let open = || fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let file = open().map_err(|error| {
        CliError::failed(format!("{} cannot be opened", path.display())).why(error.to_string())
    })?;
    let began = Instant::now();
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if began.elapsed() >= HANDOVER {
            return Err(CliError::failed(format!("another agent runs on {}", dir.display()))
                .hint("one agent serves a data directory; stop the other, or serve with --no-node"));
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(file)
}

/// Starts the agent. It speaks with the server through its unix socket, with the node's own rights.
pub(crate) async fn spawn(
    settings: &Settings,
    node: &NodeSettings,
    token: String,
    images: Option<PathBuf>,
    stop: CancellationToken,
) -> Result<JoinHandle<()>, CliError> {
    let socket = settings.data_dir.join(data_dir::SOCKET);
    spawn_for(settings, node, Target::Unix(socket), token, images, stop).await
}

/// The same for a server that is elsewhere.
pub(crate) async fn spawn_for(
    settings: &Settings,
    node: &NodeSettings,
    target: Target,
    token: String,
    images: Option<PathBuf>,
    stop: CancellationToken,
) -> Result<JoinHandle<()>, CliError> {
    let dir = node_dir(&settings.data_dir);
    private_dir(&dir)?;
    let lock = lock(&dir).await?;
    let client = Client::connect(target, Credentials::token(token))
        .map_err(|error| CliError::failed("the agent cannot reach the server").why(error.to_string()))?;
    let pool = DirPool::open(dir.join("pool"))
        .map_err(|error| CliError::failed("the storage pool cannot be used").why(error.to_string()))?;
    let mut qemu = QemuConfig::new(dir.join("run"));
    qemu.qemu_binary.clone_from(&node.qemu);
    if let Some(dirs) = &node.firmware_dirs {
        qemu.firmware_dirs.clone_from(dirs);
    }
    if let Some((first_uid, count)) = node.uids {
        qemu.user = QemuUser::PerMachine { first_uid, count };
    }
    let hypervisor = QemuHypervisor::new(qemu);
    let mut config = AgentConfig::new(node.name.clone(), dir);
    config.image_source = images;
    config.labels = node.labels.clone();
    let agent = Agent::new(config, Arc::new(hypervisor), Arc::new(pool), ClientPlane::new(client));
    Ok(tokio::spawn(async move {
        let _lock = lock;
        if let Err(error) = agent.run(stop).await {
            tracing::error!(error = &error as &dyn std::error::Error, "the node agent cannot run");
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_agent_at_a_time_and_a_dying_one_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).await.unwrap();
        assert!(lock(dir.path()).await.unwrap_err().text().contains("another agent runs on"));
        // What a child of a killed agent still holds.
        let (second, ()) = tokio::join!(lock(dir.path()), async {
            tokio::time::sleep(PAUSE * 5).await;
            drop(first);
        });
        second.unwrap();
    }
}
