//! `ostler node run`: the agent alone, beside a server on the same machine that runs without one.
//!
//! It is the same agent as in `ostler serve`, in a process of its own: either can be restarted or upgraded without the
//! other. The local administrator's socket gives it a node's token once; from then on it has a node's rights only.

use ostler_client::{Client, Credentials, Delete, Target};

use crate::cli::error::CliError;
use crate::local_node;
use crate::settings::{NodeSettings, Overrides, Settings};
use crate::signals;

#[derive(Debug, clap::Args)]
pub(crate) struct NodeRunArgs {
    #[command(flatten)]
    pub(crate) settings: Overrides,
}

pub(crate) fn run(args: NodeRunArgs) -> Result<(), CliError> {
    let settings = Settings::load(&args.settings)?;
    crate::logging::init(&settings.log, settings.log_format)?;
    let Some(node) = settings.node.clone() else {
        return Err(CliError::usage("the settings say that this machine is no node")
            .hint("leave out --no-node, or set node.enabled = true"));
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("ostler-node")
        .build()
        .map_err(|error| CliError::failed("the runtime cannot be started").why(error.to_string()))?;
    let result = runtime.block_on(agent(settings, node));
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    result
}

async fn agent(settings: Settings, node: NodeSettings) -> Result<(), CliError> {
    let shutdown = signals::shutdown()?;
    let socket = settings.data_dir.join(crate::data_dir::SOCKET);
    let token = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        token = token(&settings, &node, &socket) => token?,
    };
    let images = settings.data_dir.join("images");
    let agent = local_node::spawn(&settings, &node, token, Some(images), shutdown).await?;
    let _ = agent.await;
    Ok(())
}

/// The node's token: the one on its disk while the server takes it, else a new one from the server.
async fn token(
    settings: &Settings,
    node: &NodeSettings,
    socket: &std::path::Path,
) -> Result<String, CliError> {
    let connect = |credentials| {
        Client::connect(Target::Unix(socket.to_owned()), credentials)
            .map_err(|error| CliError::failed("the server cannot be reached").why(error.to_string()))
    };
    if let Some(saved) = local_node::saved_token(&settings.data_dir) {
        let client = connect(Credentials::token(saved.clone()))?;
        match client.node_get(node.name.as_str()).await {
            Ok(_) => return Ok(saved),
            // Not registered yet, and the token is good; or no server at the moment: the agent tries on.
            Err(error) if error.code() == Some(ostler_api::ErrorCode::NotFound) || error.code().is_none() => {
                return Ok(saved);
            }
            Err(_) => {}
        }
    }
    let admin = connect(Credentials::none())?;
    let request = local_node::token_request(&node.name);
    let failed = |error: ostler_client::ClientError| {
        CliError::from(error).doing("the node gets no token from the server")
    };
    match admin.token_delete(request.name.as_str(), &Delete::default()).await {
        Ok(()) => {}
        Err(error) if error.code() == Some(ostler_api::ErrorCode::NotFound) => {}
        Err(error) => return Err(failed(error)),
    }
    let made = admin.token_create(&request).await.map_err(failed)?;
    local_node::save_token(&settings.data_dir, &made.secret)?;
    Ok(made.secret)
}
