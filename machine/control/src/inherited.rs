//! The monitor's end of the channel, as its host left it.
#![expect(unsafe_code, reason = "taking over a descriptor by its number has no safe interface")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{SocketType, sockopt};

use crate::Channel;

/// Standard input.
const CHANNEL_FD: i32 = 0;
/// The first descriptor that is no standard stream.
const FIRST_OTHER_FD: libc::c_uint = 3;

impl Channel {
    /// The channel on standard input, and nothing else open but the other standard streams.
    ///
    /// Whatever the host (or the shell it came from) leaked into this process is closed. To be called once, first thing
    /// in `main`, before any other thread or descriptor exists.
    ///
    /// # Errors
    /// When the descriptor is not a `SOCK_SEQPACKET` socket: the program was not started as a monitor.
    pub fn inherited() -> io::Result<Self> {
        // SAFETY: the borrow ends in this function, in which nothing closes the descriptor. That it may not be open is
        // what the next call finds out.
        let fd = unsafe { BorrowedFd::borrow_raw(CHANNEL_FD) };
        if sockopt::socket_type(fd)? != SocketType::SEQPACKET {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "standard input is not a SOCK_SEQPACKET socket",
            ));
        }
        fcntl_setfd(fd, fcntl_getfd(fd)? | FdFlags::CLOEXEC)?;
        // SAFETY: no descriptor above is owned by anything in this process: the caller promises that none was opened
        // since it started.
        if unsafe { libc::close_range(FIRST_OTHER_FD, libc::c_uint::MAX, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is open (checked above) and owned by nothing else: it was left for us to take.
        Ok(Self::new(unsafe { OwnedFd::from_raw_fd(CHANNEL_FD) }))
    }
}
