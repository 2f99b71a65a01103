//! When a descriptor is ready that tokio has no type for.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram as StdDatagram;

use tokio::io::Interest;
use tokio::net::UnixDatagram;

/// Says when a descriptor is ready to be read or written: packet sockets, processes, watches. tokio has no type for these that safe
/// code can make, but readiness does not differ from that of a socket it has one for.
#[derive(Debug)]
pub(crate) struct Readiness(UnixDatagram);

impl Readiness {
    /// Of `descriptor`, a duplicate of one that does not block. Must be called within a tokio runtime.
    pub(crate) fn of(descriptor: OwnedFd) -> io::Result<Self> {
        UnixDatagram::from_std(StdDatagram::from(descriptor)).map(Self)
    }

    /// Makes `attempt` when the descriptor is ready, and again for as long as it says [`io::ErrorKind::WouldBlock`]. Safe to cancel.
    pub(crate) async fn when<T>(
        &self,
        interest: Interest,
        attempt: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        self.0.async_io(interest, attempt).await
    }
}
