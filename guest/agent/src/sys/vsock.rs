//! vsock addresses, which rustix does not know. Linux man page vsock(7).

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use kiln_protocol::HOST_CID;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Connections waiting to be accepted; the agent accepts at once, so this bounds one burst.
const BACKLOG: i32 = 32;

/// A listening vsock socket on `port`.
///
/// # Errors
/// When the kernel has no vsock, or the port is taken.
pub fn listen_on_vsock(port: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: `address` is a whole sockaddr_vm and the length says so; the kernel only reads it.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), address_bytes()) };
    if bound != 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// The next connection that waits on `listener`, or `None` when it did not come from the host and was closed.
///
/// The context id is the one thing a process in the guest cannot choose: whatever a connection from inside the guest
/// says, the kernel names it by the guest's own id.
///
/// # Errors
/// `WouldBlock` when none waits, and what accept(2) reports.
pub fn accept_from_host(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let mut peer = address(0, 0);
    let mut length = address_bytes();
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel writes at most `length` bytes into `peer`, which is that long, and the new length.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), (&raw mut peer).cast(), &raw mut length, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: accept4 has just made this descriptor for us alone.
    let connection = unsafe { OwnedFd::from_raw_fd(fd) };
    let from_host = length == address_bytes()
        && libc::c_int::from(peer.svm_family) == libc::AF_VSOCK
        && peer.svm_cid == HOST_CID;
    Ok(from_host.then_some(connection))
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    }
}

const fn address_bytes() -> libc::socklen_t {
    size_of::<libc::sockaddr_vm>() as libc::socklen_t
}
