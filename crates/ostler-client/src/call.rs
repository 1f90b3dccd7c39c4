//! One request from its parts to its checked answer: headers, time limit, repetition, errors.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, IF_MATCH, RANGE, USER_AGENT};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, uri};
use http_body_util::BodyExt;
use ostler_api::Problem;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::body::{self, Body};
use crate::query::{Query, path};
use crate::{Client, ClientError, Result, Wait};

/// Largest answer that is read into memory.
const ANSWER_MAX: usize = 256 << 20;
/// Largest error document.
const PROBLEM_MAX: usize = 256 << 10;

const AGENT: &str = concat!("ostler/", env!("CARGO_PKG_VERSION"));

/// A request with a small body, or none, that can be sent again.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    method: Method,
    path: String,
    query: Query,
    body: Option<Bytes>,
    key: Option<String>,
    if_match: Option<u64>,
    waits: Duration,
    again: bool,
}

impl Call {
    fn new(method: Method, segments: &[&str]) -> Self {
        Self {
            method,
            path: path(segments),
            query: Query::default(),
            body: None,
            key: None,
            if_match: None,
            waits: Duration::ZERO,
            again: true,
        }
    }

    pub(crate) fn get(segments: &[&str]) -> Self {
        Self::new(Method::GET, segments)
    }

    pub(crate) fn delete(segments: &[&str]) -> Self {
        Self::new(Method::DELETE, segments)
    }

    /// Begins or makes something: carries a fresh idempotency key, so that a repetition does nothing new.
    pub(crate) fn post(segments: &[&str], body: &impl Serialize) -> Result<Self> {
        let mut call = Self::new(Method::POST, segments).json(body)?;
        call.key = Some(Uuid::new_v4().simple().to_string());
        Ok(call)
    }

    pub(crate) fn put(segments: &[&str], body: &impl Serialize) -> Result<Self> {
        Self::new(Method::PUT, segments).json(body)
    }

    pub(crate) fn patch(segments: &[&str], body: &impl Serialize, if_match: Option<u64>) -> Result<Self> {
        Ok(Self::new(Method::PATCH, segments).json(body)?.if_match(if_match))
    }

    /// A stream of unknown length goes with it, so that it cannot be repeated.
    pub(crate) fn upload(segments: &[&str]) -> Self {
        Self::new(Method::PUT, segments).once()
    }

    fn json(mut self, body: &impl Serialize) -> Result<Self> {
        let bytes = serde_json::to_vec(body)
            .map_err(|e| ClientError::Protocol(format!("cannot write the request: {e}")))?;
        self.body = Some(bytes.into());
        Ok(self)
    }

    #[must_use]
    pub(crate) fn query(mut self, query: Query) -> Self {
        self.query = query;
        self
    }

    #[must_use]
    pub(crate) fn with(mut self, key: &str, value: &str) -> Self {
        self.query.set(key, value);
        self
    }

    /// Never again, whatever becomes of the connection.
    #[must_use]
    pub(crate) fn once(mut self) -> Self {
        self.again = false;
        self.key = None;
        self
    }

    /// At a path outside the versioned API.
    #[must_use]
    pub(crate) fn at(mut self, path: &str) -> Self {
        path.clone_into(&mut self.path);
        self
    }

    /// Changes only the revision given. A repetition would find its own change, so there is none.
    #[must_use]
    pub(crate) fn if_match(mut self, revision: Option<u64>) -> Self {
        self.if_match = revision;
        self.again &= revision.is_none();
        self
    }

    #[must_use]
    pub(crate) fn wait(mut self, wait: Option<&Wait>) -> Self {
        if let Some(wait) = wait {
            self.query.set("wait", &wait.phases);
            self.query.set("timeout", &wait.timeout.as_secs().max(1).to_string());
            self.waits = wait.timeout;
        }
        self
    }

    #[must_use]
    pub(crate) fn in_project_of(self, client: &Client) -> Self {
        match client.project() {
            Some(project) => self.with("project", project),
            None => self,
        }
    }

    fn what(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

impl Client {
    /// The answer's JSON.
    pub(crate) async fn json<T: DeserializeOwned>(&self, call: Call) -> Result<T> {
        let what = call.what();
        let bytes = self.bytes(call).await?;
        serde_json::from_slice(&bytes)
            .map_err(|e| ClientError::Protocol(format!("{what}: the answer is not understood: {e}")))
    }

    /// Sends until it is answered or the retries are used up.
    pub(crate) async fn bytes(&self, call: Call) -> Result<Bytes> {
        let options = &self.shared.options;
        let mut attempt = 1;
        loop {
            let after = options.request_timeout + call.waits;
            let error = match tokio::time::timeout(after, self.attempt(&call)).await {
                Ok(Ok(bytes)) => return Ok(bytes),
                Ok(Err(error)) => error,
                Err(_) => ClientError::Timeout { what: call.what(), after },
            };
            let Some(pause) = options.retry.pause(attempt, &error).filter(|_| call.again) else {
                return Err(error);
            };
            tracing::debug!(%error, call = call.what(), attempt, "trying again");
            tokio::time::sleep(pause).await;
            attempt += 1;
        }
    }

    async fn attempt(&self, call: &Call) -> Result<Bytes> {
        let body = call.body.clone().map_or_else(body::empty, body::full);
        let answer = self.checked(self.request(call, body)?).await?;
        self.collect(answer.into_body(), ANSWER_MAX).await
    }

    /// Sends a stream, however long it takes, and reads a small JSON answer.
    pub(crate) async fn json_of_stream<T: DeserializeOwned>(&self, call: Call, body: Body) -> Result<T> {
        let what = call.what();
        let answer = self.checked(self.request(&call, body)?).await?;
        let bytes = self.collect(answer.into_body(), ANSWER_MAX).await?;
        serde_json::from_slice(&bytes)
            .map_err(|e| ClientError::Protocol(format!("{what}: the answer is not understood: {e}")))
    }

    /// An answer whose body is a stream; the time limit is for its head.
    pub(crate) async fn stream(&self, call: Call) -> Result<Response<Body>> {
        self.stream_from(call, 0).await
    }

    /// The same from a byte on.
    pub(crate) async fn stream_from(&self, call: Call, from: u64) -> Result<Response<Body>> {
        let after = self.shared.options.request_timeout;
        let mut request = self.request(&call, body::empty())?;
        if let Some(range) =
            (from > 0).then(|| HeaderValue::from_str(&format!("bytes={from}-")).ok()).flatten()
        {
            request.headers_mut().insert(RANGE, range);
        }
        let answer = tokio::time::timeout(after, self.checked(request))
            .await
            .map_err(|_| ClientError::Timeout { what: call.what(), after })??;
        if from > 0 && answer.status() != StatusCode::PARTIAL_CONTENT {
            return Err(ClientError::Protocol(format!("{}: the server does not send parts", call.what())));
        }
        Ok(answer)
    }

    /// The same for a head that may take any time.
    pub(crate) async fn stream_unhurried(&self, call: Call) -> Result<Response<Body>> {
        self.checked(self.request(&call, body::empty())?).await
    }

    pub(crate) fn uri(&self, scheme: uri::Scheme, call: &Call) -> Result<Uri> {
        Uri::builder()
            .scheme(scheme)
            .authority(self.shared.link.authority.clone())
            .path_and_query(format!("{}{}", call.path, call.query.as_str()))
            .build()
            .map_err(|e| ClientError::Protocol(format!("{}: cannot write the address: {e}", call.what())))
    }

    fn request(&self, call: &Call, body: Body) -> Result<Request<Body>> {
        let uri = self.uri(self.shared.link.scheme.clone(), call)?;
        let mut request = Request::new(body);
        *request.method_mut() = call.method.clone();
        *request.uri_mut() = uri;
        let headers = request.headers_mut();
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        if let Some(value) = &self.shared.authorization {
            headers.insert(AUTHORIZATION, value.clone());
        }
        if call.body.is_some() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        if let Some(value) = call.key.as_deref().and_then(|key| HeaderValue::from_str(key).ok()) {
            headers.insert("idempotency-key", value);
        }
        if let Some(value) = call.if_match.and_then(|rev| HeaderValue::from_str(&format!("\"{rev}\"")).ok()) {
            headers.insert(IF_MATCH, value);
        }
        Ok(request)
    }

    /// An answer that is a success; any other becomes an error.
    async fn checked(&self, request: Request<Body>) -> Result<Response<Body>> {
        let what = format!("{} {}", request.method(), request.uri().path());
        let answer = self.shared.link.send(request).await?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let bytes = self.collect(answer.into_body(), PROBLEM_MAX).await?;
        Err(problem(&what, status, &bytes))
    }

    async fn collect(&self, mut body: Body, max: usize) -> Result<Bytes> {
        let mut whole = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| self.shared.link.broken(e))?;
            if let Ok(data) = frame.into_data() {
                if whole.len() + data.len() > max {
                    return Err(ClientError::Protocol(format!("the answer is larger than {max} bytes")));
                }
                whole.extend_from_slice(&data);
            }
        }
        Ok(whole.freeze())
    }
}

/// The error in an answer that is none of ours says at least its status and how it begins.
pub(crate) fn problem(what: &str, status: StatusCode, bytes: &[u8]) -> ClientError {
    match serde_json::from_slice::<Problem>(bytes) {
        Ok(problem) => ClientError::Api(Box::new(problem)),
        Err(_) => {
            let begin: String = String::from_utf8_lossy(&bytes[..bytes.len().min(200)])
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect();
            ClientError::Protocol(format!("{what}: answered {status} without saying why: {:?}", begin.trim()))
        }
    }
}
