//! Channels of messages and descriptors on tokio.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use kiln_control::{Channel, ChannelError};
use prost::Message;
use tokio::io::Interest;

use crate::readiness::Readiness;

/// One end of a channel.
#[derive(Debug)]
pub(crate) struct AsyncChannel {
    channel: Channel,
    readiness: Readiness,
}

impl AsyncChannel {
    /// Takes a `SOCK_SEQPACKET` Unix socket.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let readiness = Readiness::of(socket.try_clone()?)?;
        Ok(Self { channel: Channel::new(socket), readiness })
    }

    pub(crate) async fn send(
        &self,
        message: &impl Message,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        self.when(Interest::WRITABLE, || self.channel.send(message, fds)).await
    }

    /// The next message, and the descriptors beside it.
    pub(crate) async fn receive<M: Message + Default>(&self) -> Result<(M, Vec<OwnedFd>), ChannelError> {
        self.when(Interest::READABLE, || self.channel.receive()).await
    }

    async fn when<T>(
        &self,
        interest: Interest,
        mut attempt: impl FnMut() -> Result<T, ChannelError>,
    ) -> Result<T, ChannelError> {
        let attempted = self.readiness.when(interest, || match attempt() {
            Err(ChannelError::Io(rustix::io::Errno::AGAIN)) => Err(io::ErrorKind::WouldBlock.into()),
            other => Ok(other),
        });
        // Only a runtime that is shutting down fails the wait itself.
        attempted.await.unwrap_or(Err(ChannelError::Closed))
    }
}
