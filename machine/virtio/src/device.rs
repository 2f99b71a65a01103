//! What a device is, and what it shares with its transport.

use std::any::Any;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_memory::GuestMemory;

use crate::{Broken, Queue};

/// The device's line to the guest's interrupt controller, as the machine supplies it.
pub trait Interrupt: Send + Sync {
    /// Raises one edge. Called from device threads and from vCPU threads; it must not wait for either.
    fn raise(&self);
}

/// A virtio device behind a [`Transport`](crate::Transport).
///
/// ```text
///            start(session)
///   stopped ───────────────▶ running ── kick(queue), as the driver publishes requests
///      ▲                       │
///      └───────────────────────┘
///         stop() → session
/// ```
///
/// The driver's "ready" is `start` with a fresh session. Its reset is `stop` with the session dropped. A pause is
/// `stop` with the session kept, a resume `start` with it again: what the queues held is in it. A device that finds its
/// driver broken says so by [`Signal::broken`], touches the queues no more, and waits to be stopped.
///
/// Methods are called on vCPU threads, one at a time. None may wait for the guest.
pub trait Device: Send {
    /// The device type, VIRTIO 1.2 §5 "Device Types".
    fn device_type(&self) -> u32;

    /// The device's own feature bits; those of queues and transport are the transport's affair.
    fn features(&self) -> u64;

    /// The most entries of each queue, powers of two up to [`MAX_QUEUE_ENTRIES`](crate::MAX_QUEUE_ENTRIES).
    fn queue_entries(&self) -> &'static [u16];

    /// Reads the configuration space at `offset` into `data`; what lies past its end reads as zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the configuration space; what cannot be written is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Serves the session's queues from now on.
    ///
    /// # Errors
    /// When the host lacks something the device needs, a thread for one; the device is stopped then.
    fn start(&mut self, session: Session) -> std::io::Result<()>;

    /// The driver published requests on `queue`, which is one of the session's.
    fn kick(&self, queue: u16);

    /// Begins what [`stop`](Self::stop) waits for, which must follow, so that several devices stop at the same time. Kicks between the two are lost
    /// unless the queues are looked at again, as by a start.
    fn begin_stop(&self) {}

    /// Ends all work, waits for what is in flight, and gives the session back; `None` when it was not running.
    fn stop(&mut self) -> Option<Session>;
}

/// What a running device works with: the driver's side of the contract between its "ready" and its reset.
pub struct Session {
    /// The feature bits device and driver agreed on.
    pub features: u64,
    /// Guest RAM.
    pub memory: GuestMemory,
    /// All queues of the device, in its order.
    pub queues: Vec<Queue>,
    /// How to tell the driver.
    pub signal: Arc<Signal>,
    /// What the device itself keeps while it is stopped, open connections for one; `None` in a fresh session.
    pub kept: Option<Box<dyn Any + Send>>,
    /// The driver worked with a device of another machine before.
    pub restored: bool,
    /// What that one kept is gone, and the driver has not been told.
    pub lost: bool,
}

impl Session {
    /// Interrupts the driver when it wants to know what was pushed to any of the queues since the last time.
    ///
    /// # Errors
    /// [`Broken`], as [`Queue::wants_interrupt`].
    pub fn interrupt_if_wanted(&mut self) -> Result<(), Broken> {
        let mut wanted = false;
        for queue in &mut self.queues {
            wanted |= queue.wants_interrupt(&self.memory)?;
        }
        if wanted {
            self.signal.used();
        }
        Ok(())
    }
}

/// A buffer was used. VIRTIO 1.2 §4.2.2 "MMIO Device Register Layout", `InterruptStatus`.
const INTERRUPT_USED: u32 = 1;
/// The configuration (or the device's status) changed.
const INTERRUPT_CONFIG: u32 = 2;

/// The part of a transport's registers that the device sets while the driver reads.
pub struct Signal {
    interrupt_status: AtomicU32,
    config_generation: AtomicU32,
    fault: Mutex<Option<Broken>>,
    interrupt: Arc<dyn Interrupt>,
}

impl Signal {
    pub(crate) fn new(interrupt: Arc<dyn Interrupt>) -> Self {
        Self {
            interrupt_status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            fault: Mutex::new(None),
            interrupt,
        }
    }

    /// Tells the driver that requests were answered.
    pub fn used(&self) {
        self.notify(INTERRUPT_USED);
    }

    /// Tells the driver that the configuration space changed.
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::Release);
        self.notify(INTERRUPT_CONFIG);
    }

    /// Tells the driver that the device stopped because of `why` and needs a reset. The first reason is kept.
    ///
    /// VIRTIO 1.2 §2.1.2 "Device Requirements: Device Status Field".
    pub fn broken(&self, why: Broken) {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
        self.notify(INTERRUPT_CONFIG);
    }

    /// Why the device needs a reset, when it does.
    pub fn fault(&self) -> Option<Broken> {
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::Acquire)
    }

    pub(crate) fn acknowledge(&self, bits: u32) {
        self.interrupt_status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(crate) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// As it was when it was saved. Why the driver had broken the device is not known any more.
    pub(crate) fn restore(&self, interrupt_status: u32, config_generation: u32, needs_reset: bool) {
        self.interrupt_status.store(interrupt_status, Ordering::Release);
        self.config_generation.store(config_generation, Ordering::Release);
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = needs_reset.then_some(Broken::Before);
    }

    /// Back to how it was before the driver; only while the device is stopped.
    pub(crate) fn reset(&self) {
        self.interrupt_status.store(0, Ordering::Release);
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn notify(&self, bit: u32) {
        self.interrupt_status.fetch_or(bit, Ordering::AcqRel);
        self.interrupt.raise();
    }
}

impl std::fmt::Debug for Signal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signal")
            .field("interrupt_status", &self.interrupt_status())
            .field("config_generation", &self.config_generation())
            .field("fault", &self.fault())
            .finish_non_exhaustive()
    }
}
