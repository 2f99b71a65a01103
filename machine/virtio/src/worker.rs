//! The thread a device works on while its driver has it.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crate::bell::Bell;
use crate::device::Session;

/// A device's own thread, which holds the session and gives it back at its end.
pub(crate) struct Worker {
    bell: Arc<Bell>,
    thread: JoinHandle<Session>,
}

impl Worker {
    /// Runs `work` on a thread of that name. `work` ends once `bell` rang [`Bell::STOP`].
    ///
    /// # Errors
    ///
    /// The host has no thread to give.
    pub(crate) fn start(
        name: &str,
        bell: Arc<Bell>,
        work: impl FnOnce() -> Session + Send + 'static,
    ) -> io::Result<Self> {
        let thread = thread::Builder::new().name(name.into()).spawn(work)?;
        Ok(Self { bell, thread })
    }

    /// Tells the thread that the driver has put something into `queue`.
    pub(crate) fn kick(&self, queue: u16) {
        self.bell.ring(Bell::queue(queue));
    }

    /// Tells the thread to end.
    pub(crate) fn begin_stop(&self) {
        self.bell.ring(Bell::STOP);
    }

    /// Ends the thread. `None` if it panicked.
    pub(crate) fn stop(self) -> Option<Session> {
        self.begin_stop();
        self.thread.join().ok()
    }
}
