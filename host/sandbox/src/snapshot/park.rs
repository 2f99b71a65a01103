//! Having a guest park, and naming what is saved of it.

use std::time::Duration;

use kiln_control::SaveState;
use kiln_protocol::{AGENT_PORT, Call, Park};
use kiln_store::ObjectId;
use kiln_support::digest::Digest;

use super::BakeError;
use crate::agent::{self, AgentError};
use crate::monitor::{Monitor, MonitorError};

/// Has the agent park, for the first time since it had parked `before` times, and says when it did. The ring is the answer; a
/// reply says why there will be none. `None` when neither came within `limit`.
pub(crate) async fn park(monitor: &Monitor, before: u64, limit: Duration) -> Option<Result<u64, BakeError>> {
    let refusal = async {
        let stream = monitor.connect(AGENT_PORT).await?;
        match agent::ask(stream, Call::Park(Park {})).await {
            Err(error @ (AgentError::Refused { .. } | AgentError::Broken(_))) => Ok(error),
            Ok(_) => Ok(AgentError::Broken("a reply to one who asked it to park")),
            // The connection goes when the agent parks, and when the machine ends.
            Err(_) => std::future::pending().await,
        }
    };
    let parking = async {
        tokio::select! {
            biased;
            parked = monitor.parked_again(before) => parked.map_err(|error| match error {
                MonitorError::Ended(end) => BakeError::NotParked(end),
                other => BakeError::Save(other),
            }),
            refusal = refusal => Err(refusal.map_or_else(BakeError::Save, BakeError::Park)),
        }
    };
    tokio::time::timeout(limit, parking).await.ok()
}

/// The order to write a machine's state, which names the guest it is of and the memory that goes with it.
pub(crate) fn state_order(kernel: &Digest, initramfs: &Digest, memory: ObjectId) -> SaveState {
    let [kernel, initramfs, memory] = [kernel, initramfs, &memory.0].map(|digest| digest.as_bytes().to_vec());
    SaveState { kernel, initramfs, memory }
}
