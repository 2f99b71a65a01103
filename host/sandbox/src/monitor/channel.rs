//! The control channel on tokio.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram as StdDatagram;

use kiln_control::{Channel, ChannelError, Command, Event};
use tokio::io::Interest;
use tokio::net::UnixDatagram;

/// The host's end of a control channel.
#[derive(Debug)]
pub(super) struct AsyncChannel {
    channel: Channel,
    /// The same socket, for tokio's word on when it is ready; tokio has no type for `SOCK_SEQPACKET`, but neither
    /// does readiness differ between the packet types.
    readiness: UnixDatagram,
}

impl AsyncChannel {
    /// Takes a `SOCK_SEQPACKET` Unix socket.
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let readiness = UnixDatagram::from_std(StdDatagram::from(socket.try_clone()?))?;
        Ok(Self { channel: Channel::new(socket), readiness })
    }

    pub(super) async fn send(&self, command: &Command, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        self.when(Interest::WRITABLE, || self.channel.send(command, fds)).await
    }

    /// The next event. Its descriptors, of which there are none in this version, are closed.
    pub(super) async fn receive(&self) -> Result<Event, ChannelError> {
        Ok(self.when(Interest::READABLE, || self.channel.receive()).await?.0)
    }

    async fn when<T>(
        &self,
        interest: Interest,
        mut attempt: impl FnMut() -> Result<T, ChannelError>,
    ) -> Result<T, ChannelError> {
        let attempted = self.readiness.async_io(interest, || match attempt() {
            Err(ChannelError::Io(rustix::io::Errno::AGAIN)) => Err(io::ErrorKind::WouldBlock.into()),
            other => Ok(other),
        });
        // Only a runtime that is shutting down fails the wait itself.
        attempted.await.unwrap_or(Err(ChannelError::Closed))
    }
}
