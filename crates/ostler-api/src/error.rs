//! Errors of the API: what the services return, and the RFC 9457 document a client gets.
//!
//! [`ApiError`] keeps two texts: one for the person who asked, one for the operator's log.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::resource::words;

words! {
    /// What went wrong, as a stable word for scripts.
    ErrorCode {
        /// The request is malformed or a field has a value that cannot be.
        Invalid => "invalid",
        /// No or no valid credentials.
        Unauthenticated => "unauthenticated",
        /// The caller may not do this.
        Forbidden => "forbidden",
        /// No such thing, or none that the caller may know of.
        NotFound => "not_found",
        /// A name that is taken.
        AlreadyExists => "already_exists",
        /// Its present state does not allow this.
        Conflict => "conflict",
        /// Something else still uses it.
        InUse => "in_use",
        /// `If-Match` named an older revision.
        RevisionMismatch => "revision_mismatch",
        /// The wished-for past is compacted away: list again and watch from there.
        RevisionTooOld => "revision_too_old",
        /// An idempotency key was used before with another request.
        IdempotencyMismatch => "idempotency_mismatch",
        /// The body is over the limit.
        TooLarge => "too_large",
        /// Waited for a phase in vain.
        TimedOut => "timed_out",
        /// No node fits.
        NoCapacity => "no_capacity",
        /// The disk of the control plane or a pool is full.
        NoSpace => "no_space",
        /// The node does not answer.
        NodeUnavailable => "node_unavailable",
        /// The control plane cannot serve at the moment; try again.
        Unavailable => "unavailable",
        /// A fault of ours.
        Internal => "internal",
    }
}

impl ErrorCode {
    pub const fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::AlreadyExists | Self::Conflict | Self::InUse => 409,
            Self::RevisionMismatch => 412,
            Self::RevisionTooOld => 410,
            Self::IdempotencyMismatch => 422,
            Self::TooLarge => 413,
            Self::TimedOut => 408,
            Self::NoCapacity | Self::NoSpace | Self::NodeUnavailable | Self::Unavailable => 503,
            Self::Internal => 500,
        }
    }

    /// A title that does not depend on the occurrence.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Invalid => "The request is not valid",
            Self::Unauthenticated => "Credentials are missing or not valid",
            Self::Forbidden => "Not permitted",
            Self::NotFound => "Not found",
            Self::AlreadyExists => "The name is taken",
            Self::Conflict => "The present state does not allow this",
            Self::InUse => "Still in use",
            Self::RevisionMismatch => "It has changed meanwhile",
            Self::RevisionTooOld => "The revision is no longer kept",
            Self::IdempotencyMismatch => "The idempotency key belongs to another request",
            Self::TooLarge => "The request is too large",
            Self::TimedOut => "Timed out",
            Self::NoCapacity => "No node has room",
            Self::NoSpace => "No space left",
            Self::NodeUnavailable => "The node does not answer",
            Self::Unavailable => "Not available at the moment",
            Self::Internal => "Internal error",
        }
    }
}

/// An error as an RFC 9457 problem document (`application/problem+json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// `urn:ostler:error:CODE`.
    #[serde(rename = "type")]
    pub type_uri: String,
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// Stable word for scripts.
    pub code: ErrorCode,
    /// What failed, with its values.
    pub detail: String,
    /// The field at fault, as a path such as `cpus` or `publish[0].host_port`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The request's id, as in the server's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

/// An error without HTTP: what services and the permission layer return.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{detail}")]
pub struct ApiError {
    pub code: ErrorCode,
    /// For the person who asked.
    pub detail: String,
    pub field: Option<String>,
    pub hint: Option<String>,
    /// For the operator's log only.
    pub internal: Option<String>,
}

impl ApiError {
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), field: None, hint: None, internal: None }
    }

    pub fn invalid(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { field: Some(field.into()), ..Self::new(ErrorCode::Invalid, detail) }
    }

    pub fn not_found(kind: crate::Kind, name: &str) -> Self {
        // A stranger's text goes back into our sentence: bounded.
        let name: String = name.chars().take(80).collect();
        let error = Self::new(ErrorCode::NotFound, format!("there is no {kind} {name:?} here"));
        match kind {
            crate::Kind::Project => error,
            crate::Kind::Event => error.hint("see what there is: ostler events"),
            crate::Kind::Node
            | crate::Kind::Image
            | crate::Kind::Volume
            | crate::Kind::Snapshot
            | crate::Kind::Vm
            | crate::Kind::Operation
            | crate::Kind::Token => error.hint(format!("see what there is: ostler {kind} list")),
        }
    }

    pub fn conflict(detail: impl Into<String>) -> Self {
        Self::new(ErrorCode::Conflict, detail)
    }

    /// A fault of ours: the client learns only that, the log gets `internal`.
    pub fn internal(internal: impl std::fmt::Display) -> Self {
        Self {
            internal: Some(internal.to_string()),
            ..Self::new(ErrorCode::Internal, "the server failed to do this; its log says why")
        }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn log(mut self, internal: impl std::fmt::Display) -> Self {
        self.internal = Some(internal.to_string());
        self
    }

    pub fn problem(&self, request_id: Option<String>) -> Problem {
        Problem {
            type_uri: format!("urn:ostler:error:{}", self.code),
            title: self.code.title().to_owned(),
            status: self.code.status(),
            code: self.code,
            detail: self.detail.clone(),
            field: self.field.clone(),
            hint: self.hint.clone(),
            request_id,
        }
    }
}

impl From<Problem> for ApiError {
    fn from(problem: Problem) -> Self {
        Self {
            code: problem.code,
            detail: problem.detail,
            field: problem.field,
            hint: problem.hint,
            internal: None,
        }
    }
}
