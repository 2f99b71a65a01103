//! Tells the host what a running machine reports.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kiln_control::{Adopted, Booted, Channel, ChannelError, Entered, Event, Happened, Ready, Resumed};
use kiln_memory::GuestMemory;
use kiln_virtio::VsockPorts;

use crate::clock::{Nanoseconds, monotonic};
use crate::devices::power;
use crate::layout::READY_PORT;
use crate::machine::{Notice, Observer};
use crate::mailbox::{self, Id};

/// The ear of a machine's vCPU threads.
pub(super) struct Reporter {
    channel: Arc<Channel>,
    pub(super) spawned: Nanoseconds,
    agent_started: AtomicU64,
    is_ready: AtomicBool,
    mail: Mutex<Mail>,
}

/// What the guest is to acknowledge.
#[derive(Default)]
struct Mail {
    memory: Option<GuestMemory>,
    stage: Stage,
    /// To be told with the acknowledgement.
    entered: Option<Entered>,
}

/// How far the guest has come in becoming another.
#[derive(Clone, Copy, Default)]
enum Stage {
    /// It has no mail.
    #[default]
    Done,
    /// It has mail, and does not run.
    Sent(Id),
    /// It runs, and has not taken it.
    Entered(Id),
    /// It knows who it is to be.
    Taken,
}

impl Reporter {
    pub(super) fn new(channel: &Arc<Channel>, spawned: Nanoseconds) -> Arc<Self> {
        Arc::new(Self {
            channel: Arc::clone(channel),
            spawned,
            agent_started: AtomicU64::new(0),
            is_ready: AtomicBool::new(false),
            mail: Mutex::default(),
        })
    }

    /// What a machine is given to report to.
    pub(super) fn observer(self: &Arc<Self>) -> Observer {
        let reporter = Arc::clone(self);
        Box::new(move |notice| reporter.report(notice))
    }

    /// Says where the machine's mailbox is.
    pub(super) fn watches(&self, memory: &GuestMemory) {
        self.lock().memory = Some(memory.clone());
    }

    /// Hears an agent without a doorbell knock when it listens. It is refused: that it tried is all there is to say.
    pub(super) fn listens(self: &Arc<Self>, ports: &VsockPorts) {
        let reporter = Arc::clone(self);
        let is_possible = ports.listen(
            READY_PORT,
            Box::new(move || {
                reporter.report(Notice::Doorbell(power::PHASE_READY, monotonic()));
                Err(io::ErrorKind::ConnectionRefused.into())
            }),
        );
        debug_assert!(is_possible, "nothing else listens");
    }

    /// Says which mail waits for the guest, which does not run.
    pub(super) fn expect(&self, id: Id) {
        self.lock().stage = Stage::Sent(id);
    }

    /// Tells that the guest is about to be entered: at once, or with its acknowledgement when it has mail to take.
    pub(super) fn enters(&self, entered: Entered) -> Result<(), ChannelError> {
        let mut mail = self.lock();
        if let Stage::Sent(id) = mail.stage {
            (mail.stage, mail.entered) = (Stage::Entered(id), Some(entered));
            return Ok(());
        }
        mail.entered = None;
        drop(mail);
        send(&self.channel, Happened::Entered(entered))
    }

    fn report(&self, notice: Notice) {
        let happened = match notice {
            Notice::Entered(at) => {
                Some(Happened::Booted(Booted { spawned_ns: self.spawned.0, entered_ns: at.0 }))
            }
            Notice::Doorbell(power::PHASE_STARTED, at) => {
                // The first ring counts.
                let _ = self.agent_started.compare_exchange(0, at.0, Ordering::Relaxed, Ordering::Relaxed);
                None
            }
            // Once: a guest that rings on and on must not fill the channel.
            Notice::Doorbell(power::PHASE_READY, at) if !self.is_ready.swap(true, Ordering::Relaxed) => {
                let agent_started_ns = self.agent_started.load(Ordering::Relaxed);
                Some(Happened::Ready(Ready { agent_started_ns, ready_ns: at.0 }))
            }
            Notice::Doorbell(power::PHASE_RESUMED, at) => self.taken(at),
            Notice::Doorbell(power::PHASE_ADOPTED, at) => self.adopted(at),
            Notice::Doorbell(..) => None,
        };
        if let Some(happened) = happened {
            let is_awaited = matches!(happened, Happened::Resumed(_));
            // A host that is gone is noticed by the thread that reads from it.
            let _ = send(&self.channel, happened);
            if is_awaited {
                // Who waits for it comes first where both have one processor.
                std::thread::yield_now();
            }
        }
    }

    /// The guest says that it has taken its mail, which counts when it says whose.
    fn taken(&self, at: Nanoseconds) -> Option<Happened> {
        let mut mail = self.lock();
        let (Stage::Entered(id), Some(memory)) = (mail.stage, &mail.memory) else { return None };
        if !mailbox::is_acknowledged(memory, id) {
            return None;
        }
        mail.stage = Stage::Taken;
        Some(Happened::Resumed(Resumed { at_ns: at.0, entered: mail.entered.take() }))
    }

    fn adopted(&self, at: Nanoseconds) -> Option<Happened> {
        let mut mail = self.lock();
        let Stage::Taken = mail.stage else { return None };
        mail.stage = Stage::Done;
        Some(Happened::Adopted(Adopted { at_ns: at.0 }))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn send(channel: &Channel, happened: Happened) -> Result<(), ChannelError> {
    channel.send(&Event { happened: Some(happened) }, &[])
}
