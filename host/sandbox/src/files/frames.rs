//! The frames of a transfer, as they come from the guest.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use kiln_protocol::frame::Kind;
use kiln_protocol::{Entry, Outcome, Reader};
use prost::Message as _;
use tokio::io::{AsyncRead, ReadBuf};

use crate::agent::{AgentError, decode_reply};

/// Takes what a guest sends apart; holds one frame at most.
#[derive(Debug)]
pub(super) struct Frames<S> {
    stream: S,
    reader: Reader,
    /// Contents that came and have not been read.
    data: Vec<u8>,
    taken: usize,
}

/// What comes of a tree.
#[derive(Debug)]
pub(super) enum Frame {
    Entry(Entry),
    /// Contents are there to be [read](Frames::data).
    Data,
    /// The guest says that it has sent all.
    End,
}

impl<S: AsyncRead + Unpin> Frames<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, reader: Reader::default(), data: Vec::new(), taken: 0 }
    }

    /// The next frame. Nothing is lost when this is dropped.
    pub(super) async fn next(&mut self) -> Result<Frame, AgentError> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// Contents that came last and have not been taken.
    pub(super) fn data(&self) -> &[u8] {
        &self.data[self.taken..]
    }

    /// Says that so many bytes of [`data`](Self::data) are taken.
    pub(super) fn take(&mut self, bytes: usize) {
        self.taken += bytes;
    }

    /// The contents that came last, to be kept.
    pub(super) fn keep_data(&mut self) -> Vec<u8> {
        self.taken = 0;
        std::mem::take(&mut self.data)
    }

    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Frame, AgentError>> {
        loop {
            match self.reader.next_frame() {
                Ok(Some((kind, payload))) => {
                    if kind == Kind::Data {
                        self.data.clear();
                        self.data.extend_from_slice(payload);
                        self.taken = 0;
                    }
                    return Poll::Ready(frame(kind, payload));
                }
                Ok(None) => {}
                Err(malformed) => return Poll::Ready(Err(malformed.into())),
            }
            let mut space = ReadBuf::new(self.reader.space());
            let read = ready!(Pin::new(&mut self.stream).poll_read(context, &mut space));
            let bytes = space.filled().len();
            match read {
                Ok(()) if bytes > 0 => self.reader.filled(bytes),
                Ok(()) => {
                    return Poll::Ready(Err(AgentError::Lost(io::ErrorKind::UnexpectedEof.into())));
                }
                Err(error) => return Poll::Ready(Err(AgentError::Lost(error))),
            }
        }
    }
}

fn frame(kind: Kind, payload: &[u8]) -> Result<Frame, AgentError> {
    match kind {
        Kind::Entry => {
            let entry = Entry::decode(payload);
            Ok(Frame::Entry(entry.map_err(|_| AgentError::Broken("an entry that does not decode"))?))
        }
        Kind::Data => Ok(Frame::Data),
        Kind::Reply => match decode_reply(payload)? {
            Outcome::Done(_) => Ok(Frame::End),
            _ => Err(AgentError::Broken("a reply that does not end a transfer")),
        },
        _ => Err(AgentError::Broken("a frame out of place")),
    }
}
