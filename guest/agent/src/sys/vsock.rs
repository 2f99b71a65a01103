//! vsock addresses, which rustix does not know. Linux man page vsock(7).

use core::mem::size_of;

use kiln_protocol::HOST_CID;
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::arch::{self, syscall};

/// Connections waiting to be accepted; the agent accepts at once, so this bounds one burst.
const BACKLOG: i32 = 32;
const CID_ANY: u32 = u32::MAX;

/// `struct sockaddr_vm`.
#[repr(C)]
#[derive(Default)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

/// A listening vsock socket on `port`.
///
/// # Errors
/// When the kernel has no vsock, or the port is taken.
pub fn listen_on_vsock(port: u32) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    let address = Address { family: AddressFamily::VSOCK.as_raw(), port, cid: CID_ANY, ..Address::default() };
    let arguments =
        [socket.as_raw_fd() as usize, (&raw const address).expose_provenance(), size_of::<Address>(), 0, 0];
    // SAFETY: the kernel reads a sockaddr_vm of the length given.
    unsafe { syscall(arch::BIND, arguments) }?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Knocks at a vsock port of the host's: connects, and lets go of what comes of it. The host has heard it when this returns.
pub fn knock(port: u32) {
    let flags = SocketFlags::CLOEXEC;
    let Ok(socket) = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None) else {
        return;
    };
    let address =
        Address { family: AddressFamily::VSOCK.as_raw(), port, cid: HOST_CID, ..Address::default() };
    let arguments =
        [socket.as_raw_fd() as usize, (&raw const address).expose_provenance(), size_of::<Address>(), 0, 0];
    // SAFETY: the kernel reads a sockaddr_vm of the length given.
    let _ = unsafe { syscall(arch::CONNECT, arguments) };
}

/// The next connection that waits on `listener`, or `None` when it did not come from the host and was closed.
///
/// The context id is the one thing a process in the guest cannot choose: whatever a connection from inside the guest
/// says, the kernel names it by the guest's own id.
///
/// # Errors
/// `AGAIN` when none waits, and what accept(2) reports.
pub fn accept_from_host(listener: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let mut peer = Address::default();
    let mut length = size_of::<Address>() as u32;
    let flags = (SocketFlags::CLOEXEC | SocketFlags::NONBLOCK).bits() as usize;
    let arguments = [
        listener.as_raw_fd() as usize,
        (&raw mut peer).expose_provenance(),
        (&raw mut length).expose_provenance(),
        flags,
        0,
    ];
    // SAFETY: the kernel writes at most `length` bytes into `peer`, which is that long, and the new length.
    let connection = unsafe { syscall(arch::ACCEPT4, arguments) }?;
    // SAFETY: accept4 has just made this descriptor for us alone.
    let connection = unsafe { OwnedFd::from_raw_fd(connection as i32) };
    let from_host = length as usize == size_of::<Address>()
        && peer.family == AddressFamily::VSOCK.as_raw()
        && peer.cid == HOST_CID;
    Ok(from_host.then_some(connection))
}
