//! How a vCPU thread wakes a device's thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// A set of reasons to wake, and an eventfd that becomes readable when the set stops being empty.
///
/// Ringing again before the thread has looked costs no system call.
pub(crate) struct Bell {
    reasons: AtomicU32,
    eventfd: OwnedFd,
}

impl Bell {
    /// The reason of a kick of `queue`.
    pub(crate) fn queue(queue: u16) -> u32 {
        1 << queue
    }

    /// The reason of a stop.
    pub(crate) const STOP: u32 = 1 << 31;
    /// The reason of a request from the host's side.
    pub(crate) const HOST: u32 = 1 << 30;

    pub(crate) fn new() -> io::Result<Self> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self { reasons: AtomicU32::new(0), eventfd })
    }

    /// Adds `reasons` and wakes the thread when it has none to look at yet.
    pub(crate) fn ring(&self, reasons: u32) {
        if self.reasons.fetch_or(reasons, Ordering::AcqRel) == 0 {
            // The counter is at most 1 here, so this neither blocks nor fails.
            let _ = rustix::io::write(&self.eventfd, &1_u64.to_ne_bytes());
        }
    }

    /// Whether any of `reasons` is there to be taken.
    pub(crate) fn is_rung_for(&self, reasons: u32) -> bool {
        self.reasons.load(Ordering::Acquire) & reasons != 0
    }

    /// Waits until there is a reason, and takes all there are.
    pub(crate) fn wait(&self) -> u32 {
        let mut count = [0; 8];
        while rustix::io::read(&self.eventfd, &mut count) == Err(rustix::io::Errno::INTR) {}
        self.reasons.swap(0, Ordering::AcqRel)
    }
}

impl AsFd for Bell {
    /// Readable when [`Bell::wait`] would not wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}
