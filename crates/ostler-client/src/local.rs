//! A server in the same process: requests are plain calls, without sockets or connections.

use futures::FutureExt;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{DuplexStream, duplex};
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use crate::body::{self, Body, BodyError};

/// The server's side of [`crate::Target::Local`]. What it knows of the caller it must put in itself.
pub type LocalService = BoxCloneSyncService<Request<Body>, Response<Body>, BodyError>;

const PIPE_SIZE: usize = 64 * 1024;

pub(crate) async fn call(
    service: &LocalService,
    request: Request<Body>,
) -> Result<Response<Body>, BodyError> {
    service.clone().oneshot(request).await
}

/// An HTTP/1 connection in memory, for what needs an upgrade. The server's side ends with the returned one.
pub(crate) fn connect(service: &LocalService) -> DuplexStream {
    let (ours, theirs) = duplex(PIPE_SIZE);
    let service = service.clone();
    let answer =
        service_fn(move |request: Request<Incoming>| service.clone().oneshot(request.map(body::incoming)));
    let serve = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(theirs), answer)
        .with_upgrades();
    tokio::spawn(serve.map(|end| {
        if let Err(error) = end {
            tracing::debug!(%error, "in-process connection ended");
        }
    }));
    ours
}
