//! One end of the control channel: packets with descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use prost::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketType, sockopt,
};

use crate::{MAX_PACKET_BYTES, MAX_PACKET_FDS};

/// One end of the channel. Blocking; a host that is asynchronous waits for readability on [`AsFd`] and then calls.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// What can go wrong on a channel.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The peer is gone.
    #[error("the other side closed the control channel")]
    Closed,
    /// A packet was cut off, too large, or not a message.
    #[error("malformed packet on the control channel: {0}")]
    Malformed(&'static str),
    /// The socket failed.
    #[error("control channel")]
    Io(#[from] rustix::io::Errno),
}

impl Channel {
    /// Takes a `SOCK_SEQPACKET` Unix socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// The same of a descriptor that somebody else left to this program.
    ///
    /// # Errors
    /// When it is no such socket: the program was not started as a monitor.
    pub fn inherited(descriptor: OwnedFd) -> io::Result<Self> {
        if sockopt::socket_type(&descriptor)? == SocketType::SEQPACKET {
            return Ok(Self::new(descriptor));
        }
        Err(io::Error::new(io::ErrorKind::InvalidInput, "standard input is not a SOCK_SEQPACKET socket"))
    }

    /// Sends `message` with `fds` as one packet.
    ///
    /// # Errors
    /// [`ChannelError::Malformed`] when the message or its descriptors exceed the limits, [`ChannelError::Closed`]
    /// when the peer is gone.
    pub fn send(&self, message: &impl Message, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = message.encode_to_vec();
        if bytes.len() > MAX_PACKET_BYTES || fds.len() > MAX_PACKET_FDS {
            return Err(ChannelError::Malformed("more bytes or descriptors than a packet may have"));
        }
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PACKET_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        loop {
            match rustix::net::sendmsg(
                &self.socket,
                &[IoSlice::new(&bytes)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            ) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(ChannelError::Closed);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits for one packet: the message and the descriptors beside it, which close on exec.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] at the end of the stream; [`ChannelError::Malformed`] when a packet was cut off or is
    /// no message of this type.
    pub fn receive<M: Message + Default>(&self) -> Result<(M, Vec<OwnedFd>), ChannelError> {
        let mut bytes = vec![0; MAX_PACKET_BYTES];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PACKET_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.socket, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.flags.intersects(rustix::net::ReturnFlags::TRUNC | rustix::net::ReturnFlags::CTRUNC) {
            return Err(ChannelError::Malformed("cut off"));
        }
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        let message = M::decode(&bytes[..received.bytes])
            .map_err(|_| ChannelError::Malformed("not the expected message"))?;
        Ok((message, fds))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Command, Connect, Do};
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (Channel, Channel) {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("a socket pair");
        (Channel::new(a), Channel::new(b))
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (a, b) = pair();
        let command = Command { call: Some(Do::Connect(Connect { port: 7 })) };
        a.send(&command, &[a.as_fd(), b.as_fd()]).expect("sent");
        let (received, fds) = b.receive::<Command>().expect("received");
        assert_eq!(received, command);
        assert_eq!(fds.len(), 2);
    }

    #[test]
    fn a_dropped_peer_reads_as_closed() {
        let (a, b) = pair();
        drop(a);
        assert!(matches!(b.receive::<Command>(), Err(ChannelError::Closed)));
    }
}
