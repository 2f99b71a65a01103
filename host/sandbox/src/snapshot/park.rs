//! Having a guest park, letting it go on, and naming what is saved of it.
//!
//! A guest parks at its doorbell, which its monitor hears, or at its port when its kernel gives it no doorbell. Of the latter the
//! host hears by the answer to its request, and tells the monitor; when such a guest is to go on, the host calls at its port and
//! says who it is. Until it has, the guest hears nothing else and lets no process run.

use std::io;
use std::time::Duration;

use kiln_control::{Entered, SaveState};
use kiln_protocol::mailbox::Generation;
use kiln_protocol::{AGENT_PORT, Became, Become, Call, Outcome, Park};
use kiln_store::ObjectId;
use kiln_support::digest::Digest;
use rustix::time::ClockId;

use super::BakeError;
use crate::agent::{self, AgentError};
use crate::monitor::{Monitor, MonitorError};
use crate::vm::boot::clock_ns;

/// How long a guest that is parked at its port may take to hear that it is the one it was.
const GO_ON_LIMIT: Duration = Duration::from_mins(2);

/// Has the agent park, for the first time since it had parked `before` times, and says when it did.
pub(crate) async fn park(monitor: &Monitor, before: u64) -> Result<u64, BakeError> {
    let asking = async {
        let stream = monitor.connect(AGENT_PORT).await?;
        match agent::ask(stream, Call::Park(Park {})).await {
            Ok(Outcome::Parked(_)) => {
                monitor.park_at_port().await?;
                // The monitor has said that it is parked, and then that it stands still.
                std::future::pending().await
            }
            Err(error @ (AgentError::Refused { .. } | AgentError::Broken(_))) => Ok(error),
            Ok(_) => Ok(AgentError::Broken("a reply to one who asked it to park")),
            // The connection goes when the agent parks, and when the machine ends.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        parked = monitor.parked_again(before) => parked.map_err(|error| match error {
            MonitorError::Ended(end) => BakeError::NotParked(end),
            other => BakeError::Save(other),
        }),
        refusal = asking => Err(refusal.map_or_else(BakeError::Save, BakeError::Park)),
    }
}

/// Lets a parked guest go on as the one it was.
pub(crate) async fn go_on(monitor: &Monitor) -> Result<Entered, BakeError> {
    let entered = monitor.resume(None).await.map_err(BakeError::Save)?;
    if entered.at_port {
        let told = tokio::time::timeout(GO_ON_LIMIT, tell(monitor, None, || {})).await;
        let overdue = |_| Err(AgentError::Lost(io::ErrorKind::TimedOut.into()));
        told.unwrap_or_else(overdue).map_err(BakeError::NotGoneOn)?;
    }
    Ok(entered)
}

/// Calls at the port of a guest that is parked there, says who it is (`None`: the one it was), and waits until it is. `asked` is
/// called when it asks.
pub(super) async fn tell(
    monitor: &Monitor,
    generation: Option<Generation>,
    asked: impl FnOnce(),
) -> Result<(), AgentError> {
    let told = async {
        let mut stream = monitor.connect(AGENT_PORT).await.map_err(|error| match error {
            MonitorError::Ended(end) => AgentError::MachineEnded(end),
            other => AgentError::Lost(io::Error::other(other)),
        })?;
        if !matches!(agent::read_reply(&mut stream).await?, Outcome::Parked(_)) {
            return Err(AgentError::Broken("a parked guest that does not say so"));
        }
        asked();
        let id = generation.as_ref().map(|generation| generation.id);
        // The guest takes it that this is the time half-way between its question and the answer.
        let generation = generation
            .map(|generation| Generation { realtime_ns: clock_ns(ClockId::Realtime), ..generation })
            .map(|generation| generation.encode().to_vec());
        match (agent::ask(stream, Call::Become(Become { generation })).await?, id) {
            (Outcome::Done(_), None) => Ok(()),
            (Outcome::Became(Became { id: heard }), Some(id)) if heard == id => Ok(()),
            _ => Err(AgentError::Broken("a reply that does not acknowledge who the guest is")),
        }
    };
    match told.await {
        Ok(()) => Ok(()),
        Err(error) => Err(error.explained(&mut monitor.end_watch()).await),
    }
}

/// The order to write a machine's state, which names the guest it is of and the memory that goes with it.
pub(crate) fn state_order(kernel: &Digest, initramfs: &Digest, memory: ObjectId) -> SaveState {
    let [kernel, initramfs, memory] = [kernel, initramfs, &memory.0].map(|digest| digest.as_bytes().to_vec());
    SaveState { kernel, initramfs, memory }
}
