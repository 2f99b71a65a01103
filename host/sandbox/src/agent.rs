//! The agent inside a guest, seen from the host: one stream, one request.
//!
//! What arrives on a stream comes from a guest and is believed in nothing: a frame out of place, above a limit or
//! beyond the credit granted ends the stream. A request is sent once. When its stream drops, the answer is
//! [`AgentError::Lost`] and never a second try, because nobody knows how far the first one came.

mod child;
mod flow;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::frame::{self, HEADER_BYTES, Kind, Malformed};
use kiln_protocol::{Call, Failed, MAX_PAYLOAD_BYTES, Outcome, Reason, Reply, Request};
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub(crate) use child::Streams;
pub use child::{Child, ChildStderr, ChildStdin, ChildStdout, ExitStatus};

use crate::Blame;
use crate::monitor::{EndWatch, MachineEnd};

/// How long the report of a machine's end may lag behind its streams: a panicking kernel writes its last words first.
const END_REPORT_LIMIT: Duration = Duration::from_secs(10);

/// Why the agent did not do what was asked, or can no longer be asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent refused, or tried and failed.
    #[error("{message}")]
    Refused {
        /// The kind of failure.
        reason: Reason,
        /// What was tried and what went wrong, in one line.
        message: String,
    },
    /// The request does not fit a message.
    #[error("the request takes {bytes} bytes where {MAX_PAYLOAD_BYTES} are allowed")]
    TooLarge {
        /// What it takes.
        bytes: usize,
    },
    /// The stream ended before the answer was complete.
    #[error("the connection to the agent in the guest was lost")]
    Lost(#[source] io::Error),
    /// The machine ended under the request.
    #[error(transparent)]
    MachineEnded(#[from] Arc<MachineEnd>),
    /// The guest sent what no agent sends.
    #[error("the guest broke the agent's protocol: {0}")]
    Broken(&'static str),
    /// The guest sent something that is no frame.
    #[error("the guest broke the agent's protocol")]
    Malformed(#[from] Malformed),
}

impl AgentError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Refused { reason: Reason::Internal, .. }
            | Self::Lost(_)
            | Self::Broken(_)
            | Self::Malformed(_) => Blame::Guest,
            Self::MachineEnded(end) => end.blame(),
            Self::Refused { .. } | Self::TooLarge { .. } => Blame::Caller,
        }
    }

    /// Finds the better reason behind a lost stream: a machine that ended took it along, and its report may still be
    /// on its way.
    pub(crate) async fn explained(self, end: &mut EndWatch) -> Self {
        match self {
            Self::Lost(error) => match tokio::time::timeout(END_REPORT_LIMIT, end.ended()).await {
                Ok(end) => Self::MachineEnded(end),
                Err(_) => Self::Lost(error),
            },
            other => other,
        }
    }

    /// An error a second owner can be given: an I/O error keeps its kind and words.
    fn duplicate(&self) -> Self {
        match self {
            Self::Refused { reason, message } => Self::Refused { reason: *reason, message: message.clone() },
            Self::TooLarge { bytes } => Self::TooLarge { bytes: *bytes },
            Self::Lost(error) => Self::Lost(io::Error::new(error.kind(), error.to_string())),
            Self::MachineEnded(end) => Self::MachineEnded(Arc::clone(end)),
            Self::Broken(what) => Self::Broken(what),
            Self::Malformed(malformed) => Self::Malformed(*malformed),
        }
    }
}

/// Asks for something that has one answer and no streams: set-up, power-off, hello.
///
/// # Errors
/// [`AgentError`]; a refusal is one too.
pub async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    call: Call,
) -> Result<Outcome, AgentError> {
    send_request(&mut stream, &Request { call: Some(call) }).await?;
    read_reply(&mut stream).await
}

pub(crate) async fn send_request(
    stream: &mut (impl AsyncWrite + Unpin),
    request: &Request,
) -> Result<(), AgentError> {
    let bytes = request.encoded_len();
    if bytes > MAX_PAYLOAD_BYTES {
        return Err(AgentError::TooLarge { bytes });
    }
    let mut packet = Vec::with_capacity(HEADER_BYTES + bytes);
    frame::append_message(&mut packet, Kind::Request, request);
    stream.write_all(&packet).await.map_err(AgentError::Lost)
}

pub(crate) async fn read_reply(stream: &mut (impl AsyncRead + Unpin)) -> Result<Outcome, AgentError> {
    decode_reply(&read_reply_payload(stream).await?)
}

/// Reads the frame that is a reply, and returns what it carries.
pub(crate) async fn read_reply_payload(stream: &mut (impl AsyncRead + Unpin)) -> Result<Vec<u8>, AgentError> {
    let mut payload = Vec::new();
    let kind = read_frame(stream, &mut payload).await?;
    if kind != Kind::Reply {
        return Err(AgentError::Broken("no reply to a request"));
    }
    Ok(payload)
}

/// What a reply says; a refusal is an error.
pub(crate) fn decode_reply(payload: &[u8]) -> Result<Outcome, AgentError> {
    let reply = Reply::decode(payload).map_err(|_| AgentError::Broken("a reply that does not decode"))?;
    match reply.outcome.ok_or(AgentError::Broken("an empty reply"))? {
        Outcome::Failed(Failed { reason, message }) => {
            Err(AgentError::Refused { reason: Reason::try_from(reason).unwrap_or(Reason::Internal), message })
        }
        outcome => Ok(outcome),
    }
}

/// Reads one frame into `payload`, which holds at most [`MAX_PAYLOAD_BYTES`] then.
async fn read_frame(
    stream: &mut (impl AsyncRead + Unpin),
    payload: &mut Vec<u8>,
) -> Result<Kind, AgentError> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.map_err(AgentError::Lost)?;
    let (kind, length) = frame::parse_header(header)?;
    payload.resize(length, 0);
    stream.read_exact(payload).await.map_err(AgentError::Lost)?;
    Ok(kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::Hello;

    #[tokio::test]
    async fn a_request_too_large_is_refused_before_a_byte_is_sent() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let exec = kiln_protocol::Exec { argv: vec![vec![b'x'; MAX_PAYLOAD_BYTES]], ..Default::default() };
        let outcome = ask(ours, Call::Exec(exec)).await;
        assert!(matches!(outcome, Err(AgentError::TooLarge { .. })), "{outcome:?}");
        let mut sent = Vec::new();
        theirs.read_to_end(&mut sent).await.expect("a pipe in memory reads");
        assert!(sent.is_empty());
    }

    #[tokio::test]
    async fn a_dropped_stream_is_lost() {
        let (ours, theirs) = tokio::io::duplex(64);
        drop(theirs);
        assert!(matches!(ask(ours, Call::Hello(Hello {})).await, Err(AgentError::Lost(_))));
    }

    #[tokio::test]
    async fn a_frame_longer_than_the_limit_is_not_waited_for() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let mut header = frame::header(Kind::Reply, 0);
        header[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        theirs.write_all(&header).await.expect("a pipe in memory takes 5 bytes");
        assert!(matches!(ask(ours, Call::Hello(Hello {})).await, Err(AgentError::Malformed(_))));
    }
}
