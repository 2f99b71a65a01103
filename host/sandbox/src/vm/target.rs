//! The machine that something is asked of: this process's own, or one that another process keeps.

use std::sync::Arc;

use kiln_protocol::{AGENT_PORT, Call, Outcome, Reason, Request};
use tokio::net::UnixStream;
use tokio::sync::OwnedRwLockReadGuard;

use crate::Blame;
use crate::agent::{AgentError, decode_reply, read_reply_payload, send_request};
use crate::detached::{DetachedError, Kept};
use crate::monitor::{EndWatch, MachineEnd, Monitor, MonitorError};

/// The machine that something is asked of. What is asked is written once, and works for both.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'vm> {
    /// This process's own.
    Own(&'vm Monitor),
    /// One that another process keeps.
    Kept(&'vm Kept),
}

/// Why nothing came of what a guest was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The agent could not be reached: nothing was done.
    #[error(transparent)]
    Connect(#[from] MonitorError),
    /// The agent refused, or the stream to it broke.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The machine is another process's, which could not pass it on.
    #[error(transparent)]
    Kept(#[from] DetachedError),
}

impl AskError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Connect(error) => error.blame(),
            Self::Agent(error) => error.blame(),
            Self::Kept(error) => error.blame(),
        }
    }

    /// The agent's reason, when it refused.
    pub fn refusal(&self) -> Option<Reason> {
        match self {
            Self::Agent(AgentError::Refused { reason, .. }) => Some(*reason),
            _ => None,
        }
    }

    /// How the machine ended, when that is what went wrong.
    pub fn machine_end(&self) -> Option<&MachineEnd> {
        match self {
            Self::Connect(MonitorError::Ended(end)) | Self::Agent(AgentError::MachineEnded(end)) => Some(end),
            _ => None,
        }
    }
}

impl Target<'_> {
    /// Asks the agent over a connection of its own, and returns its answer and the connection, of which nothing else has been
    /// read.
    ///
    /// # Errors
    /// [`AskError`]; a refusal is one too.
    pub(crate) async fn ask(self, call: Call) -> Result<(Outcome, UnixStream), AskError> {
        let request = Request { call: Some(call) };
        let (reply, stream) = match self {
            Self::Own(monitor) => pass_on(monitor, &request).await?,
            Self::Kept(machine) => machine.pass_on(request).await?,
        };
        Ok((decode_reply(&reply)?, stream))
    }

    /// Connects to a vsock port of the guest, which has not answered yet.
    ///
    /// # Errors
    /// [`AskError`]
    pub(crate) async fn connect(self, port: u32) -> Result<UnixStream, AskError> {
        Ok(match self {
            Self::Own(monitor) => monitor.connect(port).await?,
            Self::Kept(machine) => machine.connect_to(port).await?,
        })
    }

    /// A view of the machine's end, if it is this process's own.
    pub(crate) fn end_watch(self) -> Option<EndWatch> {
        match self {
            Self::Own(monitor) => Some(monitor.end_watch()),
            Self::Kept(_) => None,
        }
    }
}

impl<'vm> From<&'vm Monitor> for Target<'vm> {
    fn from(monitor: &'vm Monitor) -> Self {
        Self::Own(monitor)
    }
}

impl<'vm> From<&'vm Kept> for Target<'vm> {
    fn from(machine: &'vm Kept) -> Self {
        Self::Kept(machine)
    }
}

/// A connection to the agent over which nothing has been asked yet. The machine need not be held for it.
pub(crate) struct Asking {
    /// Until there is an answer: a guest that parks forgets what it has not answered.
    turn: OwnedRwLockReadGuard<()>,
    stream: UnixStream,
    end: EndWatch,
}

impl Asking {
    pub(crate) async fn begin(monitor: &Monitor) -> Result<Self, MonitorError> {
        let turn = Arc::clone(&monitor.requests).read_owned().await;
        let stream = monitor.connect(AGENT_PORT).await?;
        Ok(Self { turn, stream, end: monitor.end_watch() })
    }

    /// As [`Target::ask`].
    pub(crate) async fn ask(self, call: Call) -> Result<(Outcome, UnixStream), AskError> {
        let (reply, stream) = self.pass_on(&Request { call: Some(call) }).await?;
        Ok((decode_reply(&reply)?, stream))
    }

    /// Sends a request, and returns the payload of the agent's answer and the connection.
    async fn pass_on(mut self, request: &Request) -> Result<(Vec<u8>, UnixStream), AskError> {
        let answered = async {
            send_request(&mut self.stream, request).await?;
            read_reply_payload(&mut self.stream).await
        };
        let answered = answered.await;
        drop(self.turn);
        match answered {
            Ok(reply) => Ok((reply, self.stream)),
            Err(error) => Err(error.explained(&mut self.end).await.into()),
        }
    }
}

/// Sends a request, and returns the payload of the agent's answer and the connection.
pub(crate) async fn pass_on(monitor: &Monitor, request: &Request) -> Result<(Vec<u8>, UnixStream), AskError> {
    Asking::begin(monitor).await?.pass_on(request).await
}
