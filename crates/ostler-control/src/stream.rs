//! Rendezvous of the two ends of a console, display or log: the user's and the agent's.
//!
//! Nodes are never dialled. The server tells the agent through its work stream that somebody waits; the agent connects
//! with the stream's id, which is good once, for ten seconds, for that node alone.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use ostler_api::vm::Vm;
use ostler_api::work::{StreamKind, StreamRequest};
use ostler_api::{ApiError, ErrorCode, Kind, Name, StreamId};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::cache::NodeChange;
use crate::caller::Caller;
use crate::cloud::Cloud;
use crate::permission::{Owner, Verb};

/// How long an agent may take to connect.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Chunks under way in one direction; more makes the faster end wait.
const BUFFER: usize = 32;
/// Streams that may wait for their agent at one time.
const WAITING_MAX: usize = 1024;

/// One end of a stream. It is closed by dropping `tx`.
#[derive(Debug)]
pub struct StreamEnd {
    pub tx: mpsc::Sender<Bytes>,
    pub rx: mpsc::Receiver<Bytes>,
}

fn pair() -> (StreamEnd, StreamEnd) {
    let (a_tx, a_rx) = mpsc::channel(BUFFER);
    let (b_tx, b_rx) = mpsc::channel(BUFFER);
    (StreamEnd { tx: a_tx, rx: b_rx }, StreamEnd { tx: b_tx, rx: a_rx })
}

#[derive(Debug)]
struct Waiting {
    node: Name,
    joined: oneshot::Sender<StreamEnd>,
}

/// The streams that wait for their agent.
#[derive(Debug, Default)]
pub(crate) struct Streams(Mutex<HashMap<StreamId, Waiting>>);

/// Takes the entry away when the one who waits gives up.
struct Entry<'a>(&'a Streams, StreamId);

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.0.0.lock().remove(&self.1);
    }
}

impl Cloud {
    /// Asks the VM's node for a stream and waits until its agent is there.
    pub async fn stream_open(
        &self,
        caller: &Caller,
        project: Option<&str>,
        vm: &str,
        what: StreamKind,
    ) -> Result<StreamEnd, ApiError> {
        let verb = match what {
            StreamKind::Log { .. } => Verb::Read,
            StreamKind::Console { .. } | StreamKind::Vnc => Verb::Console,
        };
        let vm = self.find::<Vm>(&self.cache.read(), caller, verb, project, vm)?;
        let Some(node) = vm.status.node.clone() else {
            return Err(ApiError::conflict(format!(
                "VM {} has not been placed on a node yet",
                vm.metadata.name
            ))
            .hint("see what it waits for: ostler vm show"));
        };
        let silent = || {
            ApiError::new(ErrorCode::NodeUnavailable, format!("node {node} does not answer"))
                .hint("see its state: ostler node show")
        };
        let id = StreamId::new();
        let (joined, wait) = oneshot::channel();
        {
            let mut waiting = self.streams.0.lock();
            if waiting.len() >= WAITING_MAX {
                return Err(ApiError::new(ErrorCode::Unavailable, "too many streams wait for their nodes"));
            }
            waiting.insert(id, Waiting { node: node.clone(), joined });
        }
        let _entry = Entry(&self.streams, id);
        let request = StreamRequest { id, vm: vm.metadata.id.into(), what };
        if !self.cache.tell_node(&node, NodeChange::Stream(request)) {
            return Err(silent());
        }
        match tokio::time::timeout(JOIN_TIMEOUT, wait).await {
            Ok(Ok(end)) => Ok(end),
            Ok(Err(_)) | Err(_) => Err(silent()),
        }
    }

    /// The agent's side.
    pub async fn stream_join(
        &self,
        caller: &Caller,
        node: &str,
        id: StreamId,
    ) -> Result<StreamEnd, ApiError> {
        caller.may(Verb::Serve, Kind::Node, Owner::Node(node), node)?;
        let gone = || ApiError::new(ErrorCode::NotFound, "nobody waits for this stream (any more)");
        let waiting = {
            let mut streams = self.streams.0.lock();
            match streams.get(&id) {
                Some(waiting) if waiting.node == *node => streams.remove(&id),
                Some(_) | None => None,
            }
        };
        let (theirs, ours) = pair();
        waiting.ok_or_else(gone)?.joined.send(theirs).map_err(|_| gone())?;
        Ok(ours)
    }
}
