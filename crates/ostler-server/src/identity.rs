//! Who is asking: every protected route goes through [`identify`] before anything of the request is read.
//!
//! What always holds: on the unix socket the kernel vouches for the user; everywhere else there is a bearer token.

use std::fmt;
use std::time::Duration;

use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use http::header::AUTHORIZATION;
use http::request::Parts;
use ostler_api::token::Token;
use ostler_api::{ApiError, ErrorCode, Time};
use ostler_control::{Caller, Cloud, Identity};

use crate::app::App;
use crate::problem::Failure;

/// The other end of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Peer {
    Tcp(std::net::SocketAddr),
    /// The user, as the kernel says.
    Unix {
        uid: u32,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => write!(f, "{addr}"),
            Self::Unix { uid } => write!(f, "unix:uid={uid}"),
        }
    }
}

/// The caller of a request; extracting it fails when nobody has been identified.
#[derive(Debug, Clone)]
pub(crate) struct As(pub(crate) Caller);

/// The caller's word for logs, in the extensions of the response.
#[derive(Debug, Clone)]
pub(crate) struct CallerTag(pub(crate) String);

impl<S: Sync> FromRequestParts<S> for As {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Failure> {
        parts.extensions.get::<Self>().cloned().ok_or_else(|| nobody().into())
    }
}

fn nobody() -> ApiError {
    ApiError::new(ErrorCode::Unauthenticated, "this needs a token")
        .hint("send 'Authorization: Bearer TOKEN'; make one on the server's host: ostler token create NAME")
}

/// Middleware over all protected routes.
pub(crate) async fn identify(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().copied();
    let authorization = request.headers().get(AUTHORIZATION).cloned();
    let caller = match caller(&app.cloud, peer, authorization.as_ref()).await {
        Ok(caller) => caller,
        Err(error) => return Failure::from(error).into_response(),
    };
    let tag = CallerTag(caller.tag());
    request.extensions_mut().insert(As(caller));
    let mut response = next.run(request).await;
    response.extensions_mut().insert(tag);
    response
}

async fn caller(
    cloud: &Cloud,
    peer: Option<Peer>,
    authorization: Option<&HeaderValue>,
) -> Result<Caller, ApiError> {
    // A token goes first, so that the local user can try one out through the socket.
    if let Some(header) = authorization {
        let secret = header.to_str().ok().and_then(bearer).ok_or_else(|| {
            ApiError::new(ErrorCode::Unauthenticated, "the Authorization header is not 'Bearer TOKEN'")
        })?;
        return cloud.caller_bearer(secret).await;
    }
    match peer {
        Some(Peer::Unix { uid }) if is_local_admin(uid, rustix::process::geteuid().as_raw()) => {
            Ok(cloud.caller_local())
        }
        Some(Peer::Unix { uid }) => {
            Err(ApiError::new(ErrorCode::Unauthenticated, format!("user {uid} does not own this server"))
                .hint("call it as the user that runs it, or send a token"))
        }
        Some(Peer::Tcp(_)) | None => Err(nobody()),
    }
}

/// The user that runs the server, and root.
fn is_local_admin(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

fn bearer(header: &str) -> Option<&str> {
    let (scheme, secret) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| secret.trim())
}

/// Whether a caller that was let in some time ago would still be: for streams that go on for days.
pub(crate) fn still_valid(cloud: &Cloud, caller: &Caller) -> Result<(), ApiError> {
    let id = match caller.identity() {
        Identity::Local => return Ok(()),
        Identity::Token { id, .. } => id.to_string(),
    };
    match cloud.get::<Token>(&cloud.caller_local(), None, &id) {
        Ok(token) if token.spec.expires.is_none_or(|at| at > Time::now()) => Ok(()),
        Ok(_) | Err(_) => {
            Err(ApiError::new(ErrorCode::Unauthenticated, "the token has expired or was revoked"))
        }
    }
}

/// How often the token behind an endless answer is looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Ends when the server stops, or soon after the caller's token is no longer good.
pub(crate) async fn let_go(app: App, caller: Caller) {
    let closing = app.shutdown.closing.clone();
    let revoked = async {
        while still_valid(&app.cloud, &caller).is_ok() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    };
    tokio::select! {
        () = closing.cancelled() => {}
        () = revoked => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_owner_and_root_are_local_admins() {
        assert!(is_local_admin(1000, 1000));
        assert!(is_local_admin(0, 1000));
        assert!(!is_local_admin(1001, 1000));
        assert!(!is_local_admin(1000, 0));
    }

    #[test]
    fn reads_bearer_headers() {
        assert_eq!(bearer("Bearer abc"), Some("abc"));
        assert_eq!(bearer("bearer  abc "), Some("abc"));
        assert_eq!(bearer("Basic abc"), None);
        assert_eq!(bearer("abc"), None);
    }
}
