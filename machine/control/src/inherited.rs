//! The monitor's end of the channel, as its host left it.
#![expect(unsafe_code, reason = "taking over a descriptor by its number has no safe interface")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{SocketType, sockopt};

use crate::{CONTROL_FD, Channel};

impl Channel {
    /// The channel on descriptor [`CONTROL_FD`], and nothing else open but the standard streams.
    ///
    /// Whatever the host (or the shell it came from) leaked into this process is closed. To be called once, first thing
    /// in `main`, before any other thread or descriptor exists.
    ///
    /// # Errors
    /// When the descriptor is not a `SOCK_SEQPACKET` socket: the program was not started as a monitor.
    pub fn inherited() -> io::Result<Self> {
        // SAFETY: the borrow ends in this function, in which nothing closes the descriptor. That it may not be open is
        // what the next call finds out.
        let fd = unsafe { BorrowedFd::borrow_raw(CONTROL_FD) };
        if sockopt::socket_type(fd)? != SocketType::SEQPACKET {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "descriptor 3 is not a SOCK_SEQPACKET socket",
            ));
        }
        fcntl_setfd(fd, fcntl_getfd(fd)? | FdFlags::CLOEXEC)?;
        let first = CONTROL_FD as libc::c_uint + 1;
        // SAFETY: no descriptor above is owned by anything in this process: the caller promises that none was opened
        // since it started.
        if unsafe { libc::close_range(first, libc::c_uint::MAX, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is open (checked above) and owned by nothing else: it was left for us to take.
        Ok(Self::new(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) }))
    }
}
