//! One connection: what comes in on it, what waits to be sent, and how far its request has come.

use alloc::vec::Vec;

use kiln_protocol::frame::{self, Kind};
use kiln_protocol::{Outcome, Reader, Reply};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::awaited::Wait;
use crate::relay::Relay;
use crate::session::{Session, Source, Violation};
use crate::transfer::{Receiving, Sending};

/// What a buffer may keep between uses.
const KEPT_BYTES: usize = 80 << 10;

/// A connection from the host.
pub(crate) struct Connection {
    pub(crate) socket: OwnedFd,
    pub(crate) reader: Reader,
    /// There may be something to read.
    pub(crate) readable: bool,
    /// The peer has closed its side: what is left ends with an end of file.
    pub(crate) hung_up: bool,
    /// The socket took all it was last given.
    pub(crate) writable: bool,
    /// The event loop tells when it takes more again.
    pub(crate) watched: bool,
    pub(crate) out: Vec<u8>,
    /// How much of `out` has been sent.
    pub(crate) sent: usize,
    pub(crate) stage: Stage,
    /// How often the guest had been restored when the command started.
    pub(crate) restores: u64,
}

pub(crate) enum Stage {
    /// The request has not come yet, or its answer is not known yet.
    Asking,
    /// What the peer waits for has not come about.
    Waiting(Wait),
    /// A command runs.
    Running(Session),
    /// The peer is gone; the command has been killed and is to be reaped.
    Abandoned(Session),
    /// The peer was another guest's; the command runs on.
    Detached(Session),
    /// A tree comes in. Once that has failed, what was under way is let come, until the peer has heard of it and goes.
    Receiving(Receiving),
    /// A tree goes out.
    Sending(Sending),
    /// A TCP connection in the guest is carried, or made.
    Relaying(Relay),
    /// Everything is said; the connection closes when it is sent.
    Answered,
}

/// What a connection does next.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Waits for an event.
    Wait,
    /// Could go on at once.
    Again,
    /// Is over.
    Close,
}

impl Connection {
    /// A connection whose request is still to come.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            reader: Reader::default(),
            readable: false,
            hung_up: false,
            writable: true,
            watched: false,
            out: Vec::new(),
            sent: 0,
            stage: Stage::Asking,
            restores: 0,
        }
    }

    /// Reads once, as much as there is room for.
    pub(crate) fn receive(&mut self) -> Result<(), Violation> {
        if !self.readable {
            return Ok(());
        }
        let space = self.reader.space();
        let room = space.len();
        match rustix::io::read(&self.socket, space) {
            Ok(0) => Err(Violation),
            Ok(bytes) => {
                self.reader.filled(bytes);
                // A short read emptied the socket; epoll(7), question 9.
                self.readable = bytes == room || self.hung_up;
                Ok(())
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                Ok(())
            }
            Err(Errno::INTR) => Ok(()),
            Err(_) => Err(Violation),
        }
    }

    /// Answers the request.
    pub(crate) fn answer(&mut self, outcome: Outcome) {
        if !matches!(outcome, Outcome::Started(_)) {
            self.stage = Stage::Answered;
        }
        self.say(outcome);
    }

    /// Says what has come of something, with more to come.
    pub(crate) fn say(&mut self, outcome: Outcome) {
        frame::append_message(&mut self.out, Kind::Reply, &Reply { outcome: Some(outcome) });
    }

    /// Sends what waits, as far as the socket takes it.
    pub(crate) fn send(&mut self, epoll: impl AsFd, slot: usize) -> Result<(), Violation> {
        while self.writable && self.sent < self.out.len() {
            match rustix::net::send(&self.socket, &self.out[self.sent..], SendFlags::NOSIGNAL) {
                Ok(bytes) => self.sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.writable = false;
                    self.watch(&epoll, slot)?;
                }
                Err(_) => return Err(Violation),
            }
        }
        if self.sent == self.out.len() {
            self.sent = 0;
            self.out.clear();
            self.out.shrink_to(KEPT_BYTES);
        }
        Ok(())
    }
}

impl Connection {
    /// Has the event loop tell when the socket takes more.
    pub(crate) fn watch(&mut self, epoll: impl AsFd, slot: usize) -> Result<(), Violation> {
        if !self.watched {
            let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            epoll::modify(&epoll, &self.socket, data(slot, None), flags).map_err(|_| Violation)?;
            self.watched = true;
        }
        Ok(())
    }
}

/// The event data of a connection's socket, or of a file of its command.
pub(crate) fn data(slot: usize, source: Option<Source>) -> EventData {
    let source = match source {
        None => 0,
        Some(Source::Child) => 1,
        Some(Source::Timer) => 2,
        Some(Source::Stdin) => 3,
        Some(Source::Stdout) => 4,
        Some(Source::Stderr) => 5,
        Some(Source::Awaited) => 6,
        Some(Source::Dialed) => 7,
        Some(Source::Signal) => 8,
    };
    EventData::new_u64((slot as u64) << 8 | source)
}

/// Which file of its command or wait an event is about, if it is not the connection's socket.
pub(crate) fn source(data: u64) -> Option<Source> {
    Some(match data & 0xff {
        1 => Source::Child,
        2 => Source::Timer,
        3 => Source::Stdin,
        4 => Source::Stdout,
        5 => Source::Stderr,
        6 => Source::Awaited,
        7 => Source::Dialed,
        8 => Source::Signal,
        _ => return None,
    })
}
