//! `ostler serve`: the control plane and this host's node agent, in one process.

use std::path::Path;
use std::sync::Arc;

use ostler_control::Cloud;
use ostler_server::{BindError, Server, TlsIdentity};
use ostler_storage::ImageStore;
use ostler_store::{SqliteOptions, SqliteStore};
use tokio_util::sync::CancellationToken;

use crate::cli::error::CliError;
use crate::local_node;
use crate::settings::{Overrides, Settings};
use crate::signals;

#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) settings: Overrides,

    /// Also run this many simulated nodes: no QEMU, no disks; to try out and measure the control plane
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub(crate) simulated_nodes: usize,
}

pub(crate) fn run(args: ServeArgs) -> Result<(), CliError> {
    let settings = Settings::load(&args.settings)?;
    crate::logging::init(&settings.log, settings.log_format)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("ostler")
        .build()
        .map_err(|error| CliError::failed("the runtime cannot be started").why(error.to_string()))?;
    let result = runtime.block_on(serve(settings, args.simulated_nodes));
    // What still blocks a thread must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    result
}

async fn serve(settings: Settings, simulated: usize) -> Result<(), CliError> {
    let shutdown = signals::shutdown()?;
    let dir = &settings.data_dir;
    private_dir(dir)?;
    let cloud = open(&settings).await?;
    let server = Server::bind(Arc::clone(&cloud), settings.server.clone()).await.map_err(bind_error)?;
    let stop = CancellationToken::new();
    let controllers = cloud.run_controllers(stop.clone());
    let serving = tokio::spawn(server_run(server, stop.clone(), &settings));
    let mut agents = Vec::new();
    if let Some(node) = &settings.node {
        let token = local_node::token_of(&cloud, dir, &node.name).await?;
        agents.push(local_node::spawn(&settings, node, token, Some(dir.join("images")), stop.clone()).await?);
    }
    for agent in crate::simulated::spawn(&cloud, simulated, &dir.join("simulated"), &stop).await? {
        agents.push(agent);
    }
    shutdown.cancelled().await;
    tracing::info!("stopping; VMs run on");
    // First the agents, so that what they still have to say is taken.
    stop.cancel();
    for agent in agents {
        let _ = agent.await;
    }
    let _ = serving.await;
    let _ = controllers.await;
    Ok(())
}

/// Opens the database and the images, and what the cloud was.
async fn open(settings: &Settings) -> Result<Arc<Cloud>, CliError> {
    let dir = &settings.data_dir;
    let mut options = SqliteOptions::new(dir.join("ostler.db"));
    options.history = settings.history;
    let store = tokio::task::spawn_blocking(move || SqliteStore::open(options))
        .await
        .map_err(|error| CliError::failed(error.to_string()))?
        .map_err(|error| CliError::failed(error.to_string()))?;
    let images = ImageStore::open(dir.join("images"))
        .map_err(|error| CliError::failed("the image directory cannot be used").why(error.to_string()))?;
    // The database is ours alone for as long as it is open.
    let config = ostler_control::CloudConfig { sole_server: true, ..settings.cloud.clone() };
    Cloud::open(store, Arc::new(images), config)
        .await
        .map_err(|error| CliError::failed("the cloud's state cannot be opened").why(error.to_string()))
}

fn server_run(
    server: Server,
    stop: CancellationToken,
    settings: &Settings,
) -> impl Future<Output = ()> + Send + 'static {
    let addrs = server.local_addrs().clone();
    if let Some(path) = &addrs.unix_socket {
        tracing::info!(socket = %path.display(), "serving the local administrator");
    }
    if let Some(addr) = addrs.tls {
        let own = settings.server.tls.as_ref().map(|listen| &listen.identity);
        if let Some(TlsIdentity::Own { dir, .. }) = own
            && let Ok(fingerprint) = ostler_server::ca_fingerprint(dir)
        {
            let ca = ostler_server::ca_path(dir);
            tracing::info!(%addr, ca = %ca.display(), %fingerprint, "serving the API over TLS with its own CA");
        } else {
            tracing::info!(%addr, "serving the API over TLS");
        }
    }
    if let Some(addr) = addrs.plain_http {
        tracing::warn!(%addr, "serving the API without TLS, on loopback");
    }
    server.run(stop)
}

fn bind_error(error: BindError) -> CliError {
    use std::error::Error;
    let mut result = CliError::failed(error.to_string());
    let mut source = error.source();
    while let Some(cause) = source {
        result = result.why(cause.to_string());
        source = cause.source();
    }
    result
}

/// Makes a directory that only its owner may enter.
pub(crate) fn private_dir(dir: &Path) -> Result<(), CliError> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| {
        CliError::failed(format!("the directory {} cannot be made", dir.display()))
            .why(error.to_string())
            .hint("choose another one with --data-dir")
    })
}
