//! Rebuild, the node's half: the new disk is proven to open before the machine ends. The control plane then swaps the
//! disks and sends a start.

use std::sync::Arc;

use ostler_api::VolumeId;
use ostler_api::vm::EndCause;
use ostler_api::vm_action::VmTask as Task;

use crate::vm_task::{Outcome, Sight, VmTask};

impl VmTask {
    pub(crate) async fn rebuild(&mut self, task: &Task, volume: VolumeId) -> Outcome {
        let (host, handle) = (Arc::clone(&self.host), Arc::clone(&self.handle));
        let layers = tokio::select! {
            biased;
            () = Self::called_off(&host, &handle, task) => return Outcome::Superseded,
            layers = host.volume_ready(volume) => layers,
        };
        if let Err(fault) = layers {
            return fault.into();
        }
        if let Err(fault) = self.end(EndCause::Asked).await {
            return fault.into();
        }
        self.drop_saved().await;
        self.sight = Sight::absent(Some(EndCause::Asked), None);
        Outcome::Done
    }
}
