//! A time by which this process must have come further.
#![expect(unsafe_code, reason = "the timer of a process is set by a system call without a safe interface")]

use std::ffi::c_int;
use std::io;
use std::ptr;
use std::time::Duration;

/// What a process ends with that did not come further.
pub const EXIT_OVERDUE: c_int = 124;
const MESSAGE: &[u8] = b"ended by its own deadline\n";

/// Ends this process when so much time has passed, whatever its threads are doing, unless it is told otherwise before; `None` for no end.
/// What was said last counts.
///
/// # Errors
/// What the system says of a time it cannot count.
pub fn deadline(limit: Option<Duration>) -> io::Result<()> {
    // A timer of nothing would be none.
    let limit = limit.map_or(Duration::ZERO, |limit| limit.max(Duration::from_micros(1)));
    let value = libc::timeval {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_usec: limit.subsec_micros().into(),
    };
    let timer = libc::itimerval { it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 }, it_value: value };
    // SAFETY: a timer of ours is read, for this process.
    let set = unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Has the timer's signal end this process. As the first of its namespace it would be kept from it otherwise.
pub(crate) fn arm() -> io::Result<()> {
    // SAFETY: all zeros is a valid action, with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = overdue as *const () as usize;
    // SAFETY: the action is valid, and its handler calls nothing but system calls.
    let set = unsafe { libc::sigaction(libc::SIGALRM, &raw const action, ptr::null_mut()) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

extern "C" fn overdue(_: c_int) {
    // SAFETY: so many bytes of a constant. Whether anybody reads them does not matter any more.
    unsafe { libc::write(2, MESSAGE.as_ptr().cast(), MESSAGE.len()) };
    // SAFETY: it does not return.
    unsafe { libc::_exit(EXIT_OVERDUE) }
}
