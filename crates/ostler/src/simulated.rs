//! Simulated nodes: whole agents with pretended machines and disks, to try out and measure a control plane.

use std::path::Path;
use std::sync::Arc;

use ostler_api::Name;
use ostler_client::{Client, Credentials, LocalService, Target, body};
use ostler_control::Cloud;
use ostler_node::{Agent, AgentConfig, ClientPlane};
use ostler_qemu::{SimCapacity, SimHost, SimHypervisor};
use ostler_storage::SimPool;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::cli::error::CliError;
use crate::local_node::token_request;

/// What each of them pretends to have for disks.
const POOL_BYTES: u64 = 100 << 40;

/// Starts `count` agents, `sim-1` to `sim-COUNT`, in this process.
pub(crate) async fn spawn(
    cloud: &Arc<Cloud>,
    count: usize,
    dir: &Path,
    stop: &CancellationToken,
) -> Result<Vec<JoinHandle<()>>, CliError> {
    let mut agents = Vec::with_capacity(count);
    if count == 0 {
        return Ok(agents);
    }
    let service = service(cloud);
    let admin = cloud.caller_local();
    for index in 1..=count {
        let name = Name::new(&format!("sim-{index}")).map_err(|error| CliError::failed(error.to_string()))?;
        let request = token_request(&name);
        // What an earlier run left; its secret is not known any more.
        let _ = cloud.token_delete(&admin, request.name.as_str()).await;
        let token = cloud
            .token_create(&admin, request)
            .await
            .map_err(|error| CliError::failed("a simulated node gets no token").why(error.to_string()))?;
        let client = Client::connect(Target::Local(service.clone()), Credentials::token(token.secret))
            .map_err(|error| CliError::failed(error.to_string()))?;
        let agent = Agent::new(
            AgentConfig::simulated(name.clone(), dir.join(name.as_str())),
            Arc::new(SimHypervisor::new(SimHost::new(SimCapacity::default()))),
            Arc::new(SimPool::new(POOL_BYTES)),
            ClientPlane::new(client),
        );
        let stop = stop.clone();
        agents.push(tokio::spawn(async move {
            if let Err(error) = agent.run(stop).await {
                tracing::error!(error = &error as &dyn std::error::Error, "a simulated agent cannot run");
            }
        }));
    }
    Ok(agents)
}

/// The API as the clients in this process call it.
fn service(cloud: &Arc<Cloud>) -> LocalService {
    let router = ostler_server::router(Arc::clone(cloud));
    let service = router
        .map_request(|request: axum::http::Request<body::Body>| request.map(axum::body::Body::new))
        .map_response(|response: axum::http::Response<axum::body::Body>| response.map(body::boxed))
        .map_err(|never| match never {});
    LocalService::new(service)
}
