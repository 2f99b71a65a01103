//! The host that calls at a parked guest's port, to say who the guest is now: what a doorbell and a mailbox are without the
//! guest kernel, by way of it.
//!
//! ```text
//! host                         agent, parked
//!  │ connects                   │
//!  │─────────────────────────▶  │ accepts; a moment is noted
//!  │ ◀───────────────── Parked  │
//!  │ Become, with the clock     │
//!  │─────────────────────────▶  │ another moment is noted: the clock was right half-way between the two
//!  │ ◀───────── Became or Done  │
//! ```
//! A machine's connections do not survive a restore (VIRTIO 1.2 §5.10.6.7 "Device Events"), so there is never one from before. A
//! caller that is not the host is not heard, and one that says anything else is closed and the next one waited for.

use kiln_protocol::frame::{self, HEADER_BYTES, Kind, ToAgent};
use kiln_protocol::mailbox::GENERATION_BYTES;
use kiln_protocol::{Become, Call, Outcome, Parked, Reply, Request};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd as _, OwnedFd};
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::listen::Listener;
use crate::power::Taken;
use crate::session::Violation;
use crate::sys;

/// The most bytes of a request that says who the guest is: a generation and the fields around it.
const REQUEST_BYTES_MAX: usize = GENERATION_BYTES + 32;

/// The host on the line.
pub(crate) struct Caller(OwnedFd);

/// What the host said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// The guest is the one it was.
    GoOn,
    /// The guest is another.
    Become,
}

/// Waits for the host to call at `listener` and say who the guest is; a generation is in `taken` then.
///
/// # Errors
/// What poll(2) reports, and accept(2) when the agent is out of descriptors or memory.
pub(crate) fn wait(listener: &Listener, taken: &mut Taken) -> Result<(Caller, Told), Errno> {
    loop {
        match listener.accept() {
            Ok(Some(socket)) => {
                let mut caller = Caller(socket);
                if let Ok(told) = caller.hear(taken) {
                    return Ok((caller, told));
                }
            }
            Ok(None) | Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(Errno::AGAIN) => readable(listener)?,
            Err(error) => return Err(error),
        }
    }
}

impl Caller {
    /// Asks who the guest is, and takes the answer.
    fn hear(&mut self, taken: &mut Taken) -> Result<Told, Violation> {
        rustix::io::ioctl_fionbio(&self.0, false).map_err(|_| Violation)?;
        let asked = sys::ticks();
        self.answer(Outcome::Parked(Parked {}))?;
        // On the stack, so that no secret is left in memory that was freed.
        let mut bytes = [0; REQUEST_BYTES_MAX];
        let told = self.read_request(&mut bytes).and_then(|request| take(request, taken));
        sys::wipe(&mut bytes);
        let heard = sys::ticks();
        taken.ticks = asked.wrapping_add(heard.wrapping_sub(asked) / 2);
        told
    }

    /// Sends a reply.
    pub(crate) fn answer(&mut self, outcome: Outcome) -> Result<(), Violation> {
        let mut packet = alloc::vec::Vec::new();
        frame::append_message(&mut packet, Kind::Reply, &Reply { outcome: Some(outcome) });
        let mut rest = &packet[..];
        while !rest.is_empty() {
            match rustix::net::send(&self.0, rest, SendFlags::NOSIGNAL) {
                Ok(bytes) => rest = &rest[bytes..],
                Err(Errno::INTR) => {}
                Err(_) => return Err(Violation),
            }
        }
        Ok(())
    }

    /// Reads one request into `bytes`.
    fn read_request(&mut self, bytes: &mut [u8; REQUEST_BYTES_MAX]) -> Result<Request, Violation> {
        let mut header = [0; HEADER_BYTES];
        self.read_exact(&mut header)?;
        let (kind, length) = frame::parse_header(header).map_err(|_| Violation)?;
        let payload = bytes.get_mut(..length).ok_or(Violation)?;
        self.read_exact(payload)?;
        match ToAgent::decode(kind, payload) {
            Ok(ToAgent::Request(request)) => Ok(request),
            _ => Err(Violation),
        }
    }

    fn read_exact(&mut self, mut bytes: &mut [u8]) -> Result<(), Violation> {
        while !bytes.is_empty() {
            match rustix::io::read(&self.0, &mut *bytes) {
                Ok(0) => return Err(Violation),
                Ok(read) => bytes = &mut bytes[read..],
                Err(Errno::INTR) => {}
                Err(_) => return Err(Violation),
            }
        }
        Ok(())
    }
}

/// Takes the generation out of a request; any other request breaks the rules.
fn take(request: Request, taken: &mut Taken) -> Result<Told, Violation> {
    let Some(Call::Become(Become { generation })) = request.call else { return Err(Violation) };
    let Some(mut generation) = generation else { return Ok(Told::GoOn) };
    let fits = generation.len() == GENERATION_BYTES;
    if fits {
        taken.mail.copy_from_slice(&generation);
    }
    sys::wipe(&mut generation);
    if fits { Ok(Told::Become) } else { Err(Violation) }
}

/// Waits until somebody calls.
fn readable(listener: &Listener) -> Result<(), Errno> {
    let listener = listener.as_fd();
    match rustix::event::poll(&mut [PollFd::new(&listener, PollFlags::IN)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}
