//! The entropy device. VIRTIO 1.2 §5.4 "Entropy Device".

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::{Broken, Device, Session};

const DEVICE_TYPE: u32 = 4;
const QUEUE_ENTRIES: &[u16] = &[8];
/// The most bytes of one answer. A driver that wants more asks again, so the host works in small steps.
const MAX_ANSWER_BYTES: usize = 256;
/// The most answers to one kick: what an honest driver can have waiting is a queue of them.
const MAX_ANSWERS_PER_KICK: usize = 64;

/// Randomness from the host's kernel.
///
/// A request is answered on the vCPU thread that announces it: a few hundred random bytes
/// are less work than waking a thread, and a guest that asks without end spends its own time.
#[derive(Default)]
pub struct Rng {
    session: Mutex<Option<Session>>,
}

impl Rng {
    /// A device that is stopped.
    pub fn new() -> Self {
        Self::default()
    }

    fn session(&self) -> MutexGuard<'_, Option<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_entries(&self) -> &'static [u16] {
        QUEUE_ENTRIES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, session: Session) -> io::Result<()> {
        *self.session() = Some(session);
        // What was published before the session started was announced to nobody.
        self.kick(0);
        Ok(())
    }

    fn kick(&self, _queue: u16) {
        let mut slot = self.session();
        let Some(session) = slot.as_mut() else { return };
        if session.signal.fault().is_some() {
            return;
        }
        if let Err(broken) = answer(session) {
            session.signal.broken(broken);
        }
    }

    fn stop(&mut self) -> Option<Session> {
        self.session().take()
    }
}

/// Answers what waits, and what comes in meanwhile up to a limit: a driver that keeps publishing while this runs must
/// not keep the vCPU thread here.
fn answer(session: &mut Session) -> Result<(), Broken> {
    let Session { memory, queues, .. } = &mut *session;
    let queue = &mut queues[0];
    for _ in 0..MAX_ANSWERS_PER_KICK {
        let Some(chain) = queue.pop(memory)? else {
            if queue.enable_kicks(memory)? {
                continue;
            }
            break;
        };
        if chain.writable_bytes() == 0 {
            return Err(Broken::RequestTooShort);
        }
        let room = memory.slices(chain.writable())?;
        let mut bytes = [0; MAX_ANSWER_BYTES];
        let wanted = room.len().min(MAX_ANSWER_BYTES);
        let got = getrandom(&mut bytes[..wanted], GetRandomFlags::empty())
            .map_err(|errno| Broken::Host(io::Error::from(errno).kind()))?;
        room.copy_from(&bytes[..got]);
        queue.push(memory, chain, got as u32)?;
    }
    session.interrupt_if_wanted()
}
