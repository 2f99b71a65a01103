//! A TCP connection inside the guest, carried over a connection from the host.
//!
//! Each way has one buffer that is filled when it is empty and emptied as far as the other side takes it, so a slow reader
//! holds up its own writer and nothing else, and each turn moves one buffer's worth at most. What ends on one side is ended
//! on the other, each way for itself.

use alloc::format;
use alloc::vec::Vec;
use core::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use kiln_protocol::{Failed, Reason};
use rustix::event::epoll::EventFlags;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, sockopt};

use crate::connection::Next;
use crate::failure::{failed, internal, invalid};
use crate::session::{Registrar, Source};
use crate::sys;

/// What is moved at a time, each way.
const BUFFER_BYTES: usize = 32 << 10;

/// A TCP connection of the guest's, and what is on its way.
pub(crate) struct Relay {
    tcp: OwnedFd,
    port: u16,
    /// How many of the addresses have been tried.
    tried: usize,
    connected: bool,
    readable: bool,
    writable: bool,
    inward: Way,
    outward: Way,
}

/// One way of a connection.
#[derive(Default)]
struct Way {
    buffer: Vec<u8>,
    /// How much of `buffer` has been passed on.
    sent: usize,
    /// Nothing more comes.
    ended: bool,
    /// And that has been passed on.
    closed: bool,
}

impl Relay {
    /// Begins to connect to a port of the guest's own.
    pub(crate) fn dial(port: u32, registrar: &Registrar<'_>) -> Result<Self, Failed> {
        let port = u16::try_from(port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| invalid("a port is a number from 1 to 65535".into()))?;
        let (tcp, tried) = reach(port, 0, registrar)?;
        Ok(Self {
            tcp,
            port,
            tried,
            connected: false,
            readable: false,
            writable: false,
            inward: Way::default(),
            outward: Way::default(),
        })
    }

    /// Takes note of an event of the TCP connection.
    pub(crate) fn happened(&mut self, flags: EventFlags) {
        self.readable |= flags.intersects(!EventFlags::OUT);
        self.writable |= flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR);
    }

    /// Whether it is connected; said once.
    pub(crate) fn settle(&mut self, registrar: &Registrar<'_>) -> Option<Result<(), Failed>> {
        if self.connected || !self.writable {
            return None;
        }
        match sockopt::socket_error(&self.tcp) {
            Ok(Ok(())) => {
                self.connected = true;
                Some(Ok(()))
            }
            Ok(Err(error)) | Err(error) if is_refusal(error) => match reach(self.port, self.tried, registrar)
            {
                Ok((tcp, tried)) => {
                    (self.tcp, self.tried) = (tcp, tried);
                    (self.readable, self.writable) = (false, false);
                    None
                }
                Err(failed) => Some(Err(failed)),
            },
            Ok(Err(error)) | Err(error) => Some(Err(internal("connect", error))),
        }
    }

    /// Whether it is connected, and has been.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected
    }

    /// Moves what can be moved between the TCP connection and the host's `socket`, of which may be known that it is `readable`
    /// and `writable`.
    pub(crate) fn advance(&mut self, socket: &OwnedFd, readable: &mut bool, writable: &mut bool) -> Next {
        let inward = self.inward.advance(socket, readable, &self.tcp, &mut self.writable);
        // A host that has gone altogether takes no answer; of one that has only ended its side, this is taken.
        if self.inward.ended && rustix::net::send(socket, &[], SendFlags::NOSIGNAL).is_err() {
            return Next::Close;
        }
        let outward = self.outward.advance(&self.tcp, &mut self.readable, socket, writable);
        match (inward, outward) {
            (Ok(_), Ok(_)) if self.inward.closed && self.outward.closed => Next::Close,
            (Ok(false), Ok(false)) => Next::Wait,
            (Ok(_), Ok(_)) => Next::Again,
            (Err(_), _) | (_, Err(_)) => Next::Close,
        }
    }
}

impl Way {
    /// Moves one buffer's worth; returns whether more could be moved at once.
    fn advance(
        &mut self,
        from: &OwnedFd,
        readable: &mut bool,
        to: &OwnedFd,
        writable: &mut bool,
    ) -> Result<bool, Errno> {
        if self.buffer.is_empty() && !self.ended && *readable {
            match sys::read_onto(from, &mut self.buffer, BUFFER_BYTES) {
                Ok(0) => self.ended = true,
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => *readable = false,
                Err(error) => return Err(error),
            }
        }
        while self.sent < self.buffer.len() && *writable {
            match rustix::net::send(to, &self.buffer[self.sent..], SendFlags::NOSIGNAL) {
                Ok(bytes) => self.sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => *writable = false,
                Err(error) => return Err(error),
            }
        }
        if self.sent == self.buffer.len() {
            // An idle connection takes no memory.
            self.buffer = Vec::new();
            self.sent = 0;
            if self.ended && !self.closed {
                self.closed = true;
                rustix::net::shutdown(to, Shutdown::Write)?;
            }
            return Ok(!self.ended && *readable);
        }
        Ok(*writable)
    }
}

/// Begins to connect to one of the loopback addresses, of which the first `tried` have been; returns how many have been then.
fn reach(port: u16, tried: usize, registrar: &Registrar<'_>) -> Result<(OwnedFd, usize), Failed> {
    let addresses =
        [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))];
    for (index, address) in addresses.iter().enumerate().skip(tried) {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let connecting = rustix::net::socket_with(family, SocketType::STREAM, flags, None).and_then(|tcp| {
            match rustix::net::connect(&tcp, address) {
                Ok(()) | Err(Errno::INPROGRESS) => {}
                Err(error) => return Err(error),
            }
            registrar.add(Source::Dialed, &tcp, EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP)?;
            Ok(tcp)
        });
        match connecting {
            Ok(tcp) => return Ok((tcp, index + 1)),
            Err(error) if is_refusal(error) => {}
            Err(error) => return Err(internal("connect", error)),
        }
    }
    Err(failed(
        Reason::NotListening,
        format!("nothing in the guest listens on port {port} of its own addresses"),
    ))
}

/// Nothing is there to connect to, or what was has gone before it took the connection, or no such address.
fn is_refusal(error: Errno) -> bool {
    matches!(
        error,
        Errno::CONNREFUSED | Errno::CONNRESET | Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL | Errno::NETUNREACH
    )
}
