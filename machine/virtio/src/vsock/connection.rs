//! One stream between a guest port and a host socket, and its flow control.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use kiln_memory::Slices;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};

use super::packet::{
    HOST_CID, Header, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RW, OP_SHUTDOWN, SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND, TYPE_STREAM,
};

/// What the guest may send on one connection before the host's reader has taken any of it: all the memory one
/// connection can cost the host.
pub(super) const CONNECTION_BUFFER_BYTES: u32 = 128 << 10;
/// The most payload of a packet to the guest.
const MAX_PAYLOAD_BYTES: usize = 64 << 10;

/// The two ports that name a connection; the context ids are always the guest's and the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest was asked and has not answered.
    Connecting,
    /// Both sides may speak.
    Open,
    /// The guest is done with it; what it sent last is still on its way to the host's reader.
    Draining,
}

/// What the guest is to be told besides data.
#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    credit: bool,
    /// `SHUTDOWN_*` bits, 0 for none.
    shutdown: u32,
}

/// A stream between the guest and a host socket.
///
/// ```text
///  host connects ─▶ Connecting ── RESPONSE ──▶ Open ◀── REQUEST (accepted) ─ guest connects
///                       │                       │ guest shuts both directions
///                      RST                      ├─────▶ Draining ── all delivered ─▶ gone
///                       ▼                       ▼
///                      gone                RST, or a packet that breaks the rules: gone
/// ```
pub(super) struct Connection {
    ports: Ports,
    socket: OwnedFd,
    state: State,
    owed: Owed,

    /// Bytes from the guest which the socket did not take yet.
    buffer: VecDeque<u8>,
    /// Bytes the guest sent in all, modulo 2^32.
    received: u32,
    /// Bytes that left for the socket, modulo 2^32; what the guest was told of them last.
    forwarded: u32,
    forwarded_told: u32,
    /// The socket may take bytes; it is asked until it says otherwise, and then tells when it may again.
    writable: bool,
    /// The guest sends no more.
    guest_finished: bool,
    /// The socket was told so.
    finish_passed_on: bool,
    /// Nobody reads on the host's side: what the guest sends is dropped.
    deaf: bool,

    /// Bytes sent to the guest in all, modulo 2^32.
    sent: u32,
    /// What the guest said last of its buffer, and of what it took out of it.
    guest_buffer: u32,
    guest_forwarded: u32,
    /// The socket may have bytes; as `writable`.
    readable: bool,
    /// The guest receives no more.
    guest_deaf: bool,
    /// The host sends no more.
    finished: bool,
    /// The host's end is closed altogether.
    hung_up: bool,
}

/// The guest sent more than it was allowed to.
pub(super) struct Overrun;

impl Connection {
    /// A connection the host asks the guest for.
    pub(super) fn connecting(ports: Ports, socket: OwnedFd) -> Self {
        Self::new(ports, socket, State::Connecting, Owed { request: true, ..Owed::default() })
    }

    /// A connection the guest asked for.
    pub(super) fn accepted(ports: Ports, socket: OwnedFd) -> Self {
        Self::new(ports, socket, State::Open, Owed { response: true, ..Owed::default() })
    }

    fn new(ports: Ports, socket: OwnedFd, state: State, owed: Owed) -> Self {
        Self {
            ports,
            socket,
            state,
            owed,
            buffer: VecDeque::new(),
            received: 0,
            forwarded: 0,
            forwarded_told: 0,
            writable: true,
            guest_finished: false,
            finish_passed_on: false,
            deaf: false,
            sent: 0,
            guest_buffer: 0,
            guest_forwarded: 0,
            readable: true,
            guest_deaf: false,
            finished: false,
            hung_up: false,
        }
    }

    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    pub(super) fn socket(&self) -> impl AsFd + '_ {
        self.socket.as_fd()
    }

    /// The socket has bytes, room, or was closed.
    pub(super) fn socket_changed(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        self.writable |= writable || hung_up;
        if hung_up && !self.hung_up && (self.finished || self.guest_deaf) {
            // The end of the data was seen, or will not be looked for: now it is known to be the end of all.
            self.finish(SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
        }
        self.hung_up |= hung_up;
    }

    /// Notes what the guest says of its buffer, as every packet does.
    pub(super) fn update_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
    }

    /// The guest accepts; false when it was not asked.
    pub(super) fn accept(&mut self) -> bool {
        let asked = self.state == State::Connecting && !self.owed.request;
        if asked {
            self.state = State::Open;
        }
        asked
    }

    /// The guest wants to know its credit.
    pub(super) fn owe_credit(&mut self) {
        self.owed.credit = true;
    }

    /// Whether the guest may send data now.
    pub(super) fn takes_data(&self) -> bool {
        self.state == State::Open && !self.guest_finished
    }

    /// Takes the payload of a packet: what the socket takes at once goes there from guest memory, the rest is kept.
    pub(super) fn receive(&mut self, mut payload: Slices<'_>) -> Result<(), Overrun> {
        let length = u32::try_from(payload.len()).map_err(|_| Overrun)?;
        if length > CONNECTION_BUFFER_BYTES - self.received.wrapping_sub(self.forwarded) {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(length);
        while self.writable && !self.deaf && self.buffer.is_empty() && !payload.is_empty() {
            match payload.send(&self.socket) {
                Ok(count) => {
                    payload.take(count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(error) => self.write_failed(&error),
            }
        }
        if self.deaf {
            self.forwarded = self.received;
        } else if !payload.is_empty() {
            let mut rest = vec![0; payload.len()];
            payload.copy_to(&mut rest);
            self.buffer.extend(rest);
        }
        self.settle();
        Ok(())
    }

    /// The guest ends one direction or both.
    pub(super) fn guest_shuts(&mut self, flags: u32) {
        self.guest_finished |= flags & SHUTDOWN_SEND != 0;
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            // Writers on the host's side are told at once; a socket that is gone needs no telling.
            let _ = shutdown(&self.socket, Shutdown::Read);
        }
        self.settle();
    }

    /// Whether the guest has ended both directions.
    pub(super) fn guest_is_done(&self) -> bool {
        self.guest_finished && self.guest_deaf
    }

    /// Whether the guest has sent all it wanted to.
    pub(super) fn guest_is_finished(&self) -> bool {
        self.guest_finished
    }

    /// The guest knows the connection no more; what it sent is still to be delivered.
    pub(super) fn drain(&mut self) {
        self.state = State::Draining;
        self.owed = Owed::default();
    }

    pub(super) fn is_draining(&self) -> bool {
        self.state == State::Draining
    }

    /// Whether all the guest sent is delivered or will never be.
    pub(super) fn is_drained(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Gives the socket what it takes now of what was kept.
    pub(super) fn flush(&mut self) {
        while self.writable && !self.deaf && !self.buffer.is_empty() {
            match send(&self.socket, self.buffer.as_slices().0, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.buffer.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(Errno::INTR) => {}
                Err(errno) => self.write_failed(&errno.into()),
            }
        }
        self.settle();
    }

    /// Whether there is something for the guest, as far as is known without asking the socket.
    pub(super) fn has_packet(&self) -> bool {
        let owed = self.owed;
        let data = self.can_send() && self.credit() > 0;
        owed.request || owed.response || owed.credit || owed.shutdown != 0 || data
    }

    /// Makes the next packet for the guest; its payload goes to the start of `room`. `None` when the socket had
    /// nothing after all.
    pub(super) fn next_packet(&mut self, guest_cid: u64, room: &Slices<'_>) -> Option<Header> {
        let (op, len, flags) = self.next_operation(room)?;
        // Every packet tells the guest its credit.
        self.forwarded_told = self.forwarded;
        self.owed.credit = false;
        Some(Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: CONNECTION_BUFFER_BYTES,
            fwd_cnt: self.forwarded,
        })
    }

    fn next_operation(&mut self, room: &Slices<'_>) -> Option<(u16, u32, u32)> {
        if std::mem::take(&mut self.owed.request) {
            return Some((OP_REQUEST, 0, 0));
        }
        if std::mem::take(&mut self.owed.response) {
            return Some((OP_RESPONSE, 0, 0));
        }
        if let Some(count) = self.read_socket(room) {
            return Some((OP_RW, count, 0));
        }
        let shutdown = std::mem::take(&mut self.owed.shutdown);
        if shutdown != 0 {
            return Some((OP_SHUTDOWN, 0, shutdown));
        }
        std::mem::take(&mut self.owed.credit).then_some((OP_CREDIT_UPDATE, 0, 0))
    }

    /// Reads from the socket into guest memory, as much as fits and the guest has credit for.
    fn read_socket(&mut self, room: &Slices<'_>) -> Option<u32> {
        let wanted = room.len().min(self.credit() as usize).min(MAX_PAYLOAD_BYTES);
        if !self.can_send() || wanted == 0 {
            return None;
        }
        match room.front(wanted).receive(&self.socket) {
            Ok(0) => {
                // A closed peer takes nothing any more either; a half-closed one may.
                self.finish(if self.hung_up { SHUTDOWN_RECEIVE | SHUTDOWN_SEND } else { SHUTDOWN_SEND });
                None
            }
            Ok(count) => {
                self.sent = self.sent.wrapping_add(count as u32);
                Some(count as u32)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            Err(_) => {
                self.finish(SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
                None
            }
        }
    }

    fn can_send(&self) -> bool {
        self.state == State::Open && self.readable && !self.finished && !self.guest_deaf
    }

    /// How many bytes the guest can take. It may claim anything; nonsense is no credit.
    fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// The host's side ends, in the directions of `flags`.
    fn finish(&mut self, flags: u32) {
        self.finished = true;
        if self.state == State::Open {
            self.owed.shutdown |= flags;
        }
    }

    fn write_failed(&mut self, error: &io::Error) {
        if error.kind() == io::ErrorKind::WouldBlock {
            self.writable = false;
        } else {
            self.deaf = true;
            if self.state == State::Open {
                self.owed.shutdown |= SHUTDOWN_RECEIVE;
            }
        }
    }

    /// Whether the buffer is what the counters say, and no more than the guest was allowed.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn is_within_limits(&self) -> bool {
        let held = self.received.wrapping_sub(self.forwarded);
        self.buffer.len() == held as usize && held <= CONNECTION_BUFFER_BYTES
    }

    /// After bytes moved: forgets what nobody will read, passes the guest's end on, and sees whether the guest should
    /// hear of its credit.
    fn settle(&mut self) {
        if self.deaf {
            self.buffer.clear();
            self.forwarded = self.received;
        }
        if self.buffer.is_empty() {
            // An idle connection holds no memory.
            self.buffer.shrink_to_fit();
            if self.guest_finished && !self.finish_passed_on {
                self.finish_passed_on = true;
                let _ = shutdown(&self.socket, Shutdown::Write);
            }
        }
        let untold = self.forwarded.wrapping_sub(self.forwarded_told);
        // Half a buffer at a time: the guest never waits for a reader that took something, and not every packet of
        // its costs one of ours.
        if untold >= CONNECTION_BUFFER_BYTES / 2 && self.takes_data() {
            self.owed.credit = true;
        }
    }
}
