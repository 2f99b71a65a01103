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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Driver;
    use kiln_memory::Span;

    fn start() -> Driver {
        Driver::start(Box::new(Rng::new()), 4 << 20)
    }

    fn ask(driver: &mut Driver, bytes: usize) -> Vec<u8> {
        driver.queues[0].submit(&[], &[Span::new(Driver::FREE, bytes)]).expect("a free descriptor");
        driver.kick(0);
        let (_, written) = driver.queues[0].take_used().expect("answered before the kick returns");
        let mut data = vec![0; written as usize];
        driver.memory.read(Driver::FREE, &mut data).expect("RAM");
        data
    }

    #[test]
    fn answers_are_random_and_as_long_as_asked() {
        let mut driver = start();
        let (first, second) = (ask(&mut driver, 64), ask(&mut driver, 64));
        assert_eq!((first.len(), second.len()), (64, 64));
        assert_ne!(first, second);
        assert_ne!(first, [0; 64]);
        assert_eq!(driver.raised.count(), 2);
    }

    #[test]
    fn one_answer_is_never_long() {
        let mut driver = start();
        driver.memory.write(Driver::FREE, &[0; 4096]).expect("RAM");
        assert_eq!(ask(&mut driver, 1 << 20).len(), MAX_ANSWER_BYTES);
        let behind: [u8; 1024] = driver
            .memory
            .read_array(kiln_memory::Gpa(Driver::FREE.0 + MAX_ANSWER_BYTES as u64))
            .expect("RAM");
        assert_eq!(behind, [0; 1024]);
    }

    #[test]
    fn a_request_without_room_breaks_the_device() {
        let mut driver = start();
        driver.queues[0].submit(&[Span::new(Driver::FREE, 64)], &[]).expect("a free descriptor");
        driver.kick(0);
        assert!(driver.needs_reset());
        driver.kick(0);
        driver.bring_up(Driver::VERSION_1);
        assert_eq!(ask(&mut driver, 8).len(), 8);
    }

    #[test]
    fn requests_published_before_the_driver_was_ready_are_answered() {
        let mut driver = start();
        let session = {
            let mut device = Rng::new();
            driver.queues[0].submit(&[], &[Span::new(Driver::FREE, 16)]).expect("a free descriptor");
            let queue = crate::Queue::new(&driver.memory, driver.queues[0].layout(), 8, false).expect("sane");
            let signal = std::sync::Arc::new(crate::Signal::new(driver.raised.clone()));
            let session = Session {
                features: 0,
                memory: driver.memory.clone(),
                queues: vec![queue],
                signal,
                kept: None,
                restored: false,
                lost: false,
            };
            device.start(session).expect("started");
            device.stop().expect("was running")
        };
        assert_eq!(driver.queues[0].take_used().map(|(_, written)| written), Some(16));
        assert_eq!(session.queues[0].waiting(&driver.memory), Ok(0));
    }
}
