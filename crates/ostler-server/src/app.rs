//! What every handler can reach.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use ostler_control::Cloud;

use crate::config::Limits;
use crate::listen::{Connections, Shutdown};
use crate::metrics::HttpMetrics;

/// The handlers' shared state.
#[derive(Debug, Clone)]
pub(crate) struct App {
    pub(crate) cloud: Arc<Cloud>,
    pub(crate) limits: Limits,
    pub(crate) shutdown: Shutdown,
    pub(crate) metrics: Arc<HttpMetrics>,
    /// Over TCP, and over the unix socket.
    pub(crate) connections: [(&'static str, Arc<Connections>); 2],
    pub(crate) started: Instant,
    /// The OpenAPI document.
    pub(crate) openapi: Bytes,
}

impl App {
    pub(crate) fn new(cloud: Arc<Cloud>, limits: Limits, openapi: Bytes) -> Self {
        let max = limits.max_connections;
        Self {
            cloud,
            limits,
            shutdown: Shutdown::default(),
            metrics: Arc::default(),
            connections: [("tcp", Connections::new(max)), ("unix", Connections::new(max))],
            started: Instant::now(),
            openapi,
        }
    }
}
