//! Where requests come from.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::sys;

/// A socket on which the host asks; everything behind it is the same whatever kind it is.
pub enum Listener {
    /// vsock: what a guest has. Connections from inside the guest are closed unheard.
    Vsock(OwnedFd),
    /// A Unix socket: the agent as an ordinary program, for tests on a host. Whoever may connect is believed.
    Unix(OwnedFd),
}

impl Listener {
    /// The next connection that waits, or `None` when it was not the host's and has been closed.
    ///
    /// # Errors
    /// `AGAIN` when none waits, and what accept(2) reports.
    pub fn accept(&self) -> Result<Option<OwnedFd>, Errno> {
        match self {
            Self::Vsock(socket) => sys::accept_from_host(socket.as_fd()),
            Self::Unix(socket) => {
                rustix::net::accept_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).map(Some)
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Vsock(socket) | Self::Unix(socket) => socket.as_fd(),
        }
    }
}
