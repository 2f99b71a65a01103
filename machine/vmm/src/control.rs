//! The control word of a running machine: what its vCPU threads are to do.
//!
//! ```text
//!         resume()
//! paused ──────────▶ running ──end()──▶ ended
//!   ▲                  │ │                ▲
//!   └──────────────────┘ └────────────────┘
//!         pause()          end(), from anywhere
//! ```
//!
//! A vCPU thread looks at the word after each exit. Whoever changes it kicks every vCPU, so nothing waits in a poll.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use kiln_control::EndReason;
use kiln_hypervisor::Kick;
use rustix::event::{EventfdFlags, eventfd};

const PAUSED: u32 = 0;
const RUNNING: u32 = 1;
const ENDED: u32 = 2;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: EndReason,
    /// The particulars, or empty.
    pub detail: String,
}

/// The control word, and what is needed to make a change of it felt.
pub(crate) struct Control<K> {
    word: AtomicU32,
    end: Mutex<Option<End>>,
    kicks: Vec<K>,
    /// Readable once the machine has ended.
    ended: OwnedFd,
    /// Readable when the guest has paused the machine.
    parked: OwnedFd,
}

impl<K: Kick> Control<K> {
    /// A paused machine's control word; `kicks` are those of all its vCPUs.
    pub(crate) fn new(kicks: Vec<K>) -> std::io::Result<Self> {
        let ended = eventfd(0, EventfdFlags::CLOEXEC)?;
        let parked = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { word: AtomicU32::new(PAUSED), end: Mutex::new(None), kicks, ended, parked })
    }

    /// Whether the machine has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.word.load(Ordering::Acquire) == ENDED
    }

    /// Whether vCPUs are to rest.
    pub(crate) fn is_paused(&self) -> bool {
        self.word.load(Ordering::Acquire) == PAUSED
    }

    /// Tells every vCPU to rest; false when the machine does not run.
    pub(crate) fn pause(&self) -> bool {
        let paused = self.word.compare_exchange(RUNNING, PAUSED, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if paused {
            self.kick();
        }
        paused
    }

    /// The same, because the guest asks for it.
    pub(crate) fn park(&self) {
        // Paused by the host a moment before, it is parked all the same.
        self.pause();
        // The counter is small, so this neither blocks nor fails.
        let _ = rustix::io::write(&self.parked, &1_u64.to_ne_bytes());
    }

    /// Whether the guest has paused the machine since this was last asked.
    pub(crate) fn take_parked(&self) -> bool {
        rustix::io::read(&self.parked, &mut [0; 8]).is_ok()
    }

    /// Readable when the guest has paused the machine.
    pub(crate) fn parked_fd(&self) -> BorrowedFd<'_> {
        self.parked.as_fd()
    }

    /// Has every vCPU look at what it is to do.
    pub(crate) fn kick(&self) {
        self.kicks.iter().for_each(Kick::kick);
    }

    /// Lets vCPUs run. One that has ended stays so.
    pub(crate) fn resume(&self) {
        let _ = self.word.compare_exchange(PAUSED, RUNNING, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Ends the machine. The first end counts.
    pub(crate) fn end(&self, reason: EndReason, detail: impl Into<String>) {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        if end.is_some() {
            return;
        }
        *end = Some(End { reason, detail: detail.into() });
        drop(end);
        self.word.store(ENDED, Ordering::SeqCst);
        self.kick();
        // The counter is 0 here, so this neither blocks nor fails.
        let _ = rustix::io::write(&self.ended, &1_u64.to_ne_bytes());
    }

    /// How it ended, once it has.
    pub(crate) fn ended(&self) -> Option<End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Readable once the machine has ended.
    pub(crate) fn ended_fd(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }
}
