//! All streams of one guest: the table of connections, their sockets, and the packets to and from the guest.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use kiln_memory::{GuestMemory, Slices};
use rustix::event::{Timespec, epoll};

use super::connection::{Connection, Ports};
use super::packet::{
    HEADER_BYTES, HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST,
    OP_RW, OP_SHUTDOWN, TYPE_STREAM,
};
use super::{MAX_CONNECTIONS, RX, TX};
use crate::{Broken, Chain, Session};

/// The most refusals that wait for room at the guest; then its packets wait too.
const MAX_RESETS: usize = 256;
/// The most packets in one direction before the other has its turn.
const MAX_PACKETS_PER_TURN: usize = 64;
/// The most socket events taken at once.
const MAX_EVENTS: usize = 64;
/// What an event of the bell carries; connections carry less.
const BELL_EVENT: u64 = u64::MAX;
/// Host ports of connections from the host start here, above what people choose for listening.
pub(super) const FIRST_EPHEMERAL_PORT: u32 = 1 << 30;

/// Opens the host's end for a guest that connects to a port, or says why not.
pub(super) type Accept<'a> = &'a mut dyn FnMut(u32) -> Option<OwnedFd>;

/// The streams of one guest.
pub(super) struct Muxer {
    guest_cid: u64,
    epoll: OwnedFd,
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_ports: HashMap<Ports, u32>,
    /// Slots that may have something for the guest, in turn; each at most once.
    ready: VecDeque<u32>,
    /// Refusals of packets that belong to no connection.
    resets: VecDeque<Header>,
    next_port: u32,
}

/// A place for a connection, used again and again.
#[derive(Default)]
struct Slot {
    connection: Option<Connection>,
    /// Counts its connections, so that a late event of an earlier one is known as such.
    generation: u32,
    /// It is in `ready`.
    queued: bool,
}

impl Muxer {
    /// A muxer whose connections from the host begin at `first_port`, or at the first ephemeral one.
    pub(super) fn new(guest_cid: u64, first_port: u32) -> io::Result<Self> {
        Ok(Self {
            guest_cid,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            slots: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: first_port.max(FIRST_EPHEMERAL_PORT),
        })
    }

    /// Wakes [`wait`](Self::wait) when `bell` is readable, until it is closed.
    pub(super) fn watch_bell(&self, bell: impl AsFd) -> io::Result<()> {
        epoll::add(&self.epoll, bell, epoll::EventData::new_u64(BELL_EVENT), epoll::EventFlags::IN)?;
        Ok(())
    }

    /// Takes events of sockets in, waiting for the first unless `poll`; true when the bell rang.
    pub(super) fn wait(&mut self, poll: bool) -> io::Result<bool> {
        let mut events = [MaybeUninit::uninit(); MAX_EVENTS];
        let none = Timespec { tv_sec: 0, tv_nsec: 0 };
        let (events, _) = match epoll::wait(&self.epoll, &mut events, poll.then_some(&none)) {
            Err(rustix::io::Errno::INTR) => return Ok(false),
            other => other?,
        };
        let mut rung = false;
        for event in events {
            let (data, flags) = (event.data.u64(), event.flags);
            if data == BELL_EVENT {
                rung = true;
            } else {
                self.socket_event(data, flags);
            }
        }
        Ok(rung)
    }

    fn socket_event(&mut self, data: u64, flags: epoll::EventFlags) {
        use epoll::EventFlags;
        let index = data as u32;
        let slot = &mut self.slots[index as usize];
        let Some(connection) = slot.connection.as_mut().filter(|_| u64::from(slot.generation) == data >> 32)
        else {
            return;
        };
        let hung_up = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        let readable = flags.intersects(EventFlags::IN | EventFlags::RDHUP);
        connection.socket_changed(readable, flags.contains(EventFlags::OUT), hung_up);
        connection.flush();
        self.settle(index);
    }

    /// Asks the guest for a connection of `socket` to `guest_port`. The socket is closed when there is no place.
    pub(super) fn connect(&mut self, guest_port: u32, socket: OwnedFd) {
        let mut ports = Ports { host: self.next_port, guest: guest_port };
        // At most as many are taken as there are connections.
        while self.by_ports.contains_key(&ports) {
            ports.host = ports.host.wrapping_add(1).max(FIRST_EPHEMERAL_PORT);
        }
        self.next_port = ports.host.wrapping_add(1).max(FIRST_EPHEMERAL_PORT);
        self.insert(Connection::connecting(ports, socket));
    }

    /// Moves packets both ways as far as the queues allow, within a limit; true when there is more to do at once.
    pub(super) fn turn(&mut self, session: &mut Session, accept: Accept<'_>) -> Result<bool, Broken> {
        let memory = session.memory.clone();
        let more_from_guest = self.take_packets(session, &memory, accept)?;
        let stalled = self.resets.len() >= MAX_RESETS;
        let more_to_guest = self.give_packets(session, &memory)?;
        let unstalled = stalled && self.resets.len() < MAX_RESETS;
        session.interrupt_if_wanted()?;
        Ok(more_from_guest || more_to_guest || unstalled)
    }

    /// Panics when something grew past its limit.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn check_limits(&self) {
        assert!(self.slots.len() <= MAX_CONNECTIONS && self.ready.len() <= self.slots.len());
        assert!(self.resets.len() <= MAX_RESETS);
        let connections = || self.slots.iter().filter_map(|slot| slot.connection.as_ref());
        assert!(connections().all(Connection::is_within_limits));
        let known = connections().filter(|connection| !connection.is_draining()).count();
        assert_eq!(known, self.by_ports.len());
        assert_eq!(connections().count() + self.free.len(), self.slots.len());
    }

    /// Guest to host. While too many refusals wait, the guest's packets stay where they are.
    fn take_packets(
        &mut self,
        session: &mut Session,
        memory: &GuestMemory,
        accept: Accept<'_>,
    ) -> Result<bool, Broken> {
        let queue = &mut session.queues[TX];
        for _ in 0..MAX_PACKETS_PER_TURN {
            if self.resets.len() >= MAX_RESETS {
                return Ok(false);
            }
            let Some(chain) = queue.pop(memory)? else {
                return queue.enable_kicks(memory);
            };
            self.take_packet(memory, &chain, accept)?;
            queue.push(memory, chain, 0)?;
        }
        Ok(true)
    }

    /// Host to guest, one packet a connection in turn. When the guest has no room for more, its kick is awaited.
    fn give_packets(&mut self, session: &mut Session, memory: &GuestMemory) -> Result<bool, Broken> {
        let queue = &mut session.queues[RX];
        for _ in 0..MAX_PACKETS_PER_TURN {
            if self.resets.is_empty() && self.ready.is_empty() {
                queue.disable_kicks(memory)?;
                return Ok(false);
            }
            let Some(chain) = queue.pop(memory)? else {
                return queue.enable_kicks(memory);
            };
            match self.give_packet(memory, &chain)? {
                Some(written) => queue.push(memory, chain, written)?,
                None => queue.put_back(chain),
            }
        }
        Ok(true)
    }

    /// Writes one packet into `chain` and says how long it is; `None` when nobody had one after all.
    fn give_packet(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<Option<u32>, Broken> {
        let mut room = memory.slices(chain.writable())?;
        if room.len() <= HEADER_BYTES {
            return Err(Broken::RequestTooShort);
        }
        let header_room = room.take(HEADER_BYTES);
        let header = match self.resets.pop_front() {
            Some(reset) => reset,
            None => match self.next_packet(&room) {
                Some(header) => header,
                None => return Ok(None),
            },
        };
        header_room.copy_from(&header.encode());
        Ok(Some(HEADER_BYTES as u32 + header.len))
    }

    /// The packet of the first connection in line that has one.
    fn next_packet(&mut self, room: &Slices<'_>) -> Option<Header> {
        while let Some(index) = self.ready.pop_front() {
            let slot = &mut self.slots[index as usize];
            slot.queued = false;
            let Some(connection) = &mut slot.connection else { continue };
            let header = connection.next_packet(self.guest_cid, room);
            self.settle(index);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// Takes one packet of the guest apart and acts on it.
    fn take_packet(&mut self, memory: &GuestMemory, chain: &Chain, accept: Accept<'_>) -> Result<(), Broken> {
        let mut payload = memory.slices(chain.readable())?;
        if payload.len() < HEADER_BYTES {
            return Err(Broken::RequestTooShort);
        }
        let mut header = [0; HEADER_BYTES];
        payload.take(HEADER_BYTES).copy_to(&mut header);
        self.receive(&Header::decode(&header), payload, accept);
        Ok(())
    }

    /// Acts on a packet of the guest.
    fn receive(&mut self, header: &Header, payload: Slices<'_>, accept: Accept<'_>) {
        if header.src_cid != self.guest_cid {
            // Nobody to answer.
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let well_formed = header.dst_cid == HOST_CID
            && header.kind == TYPE_STREAM
            && header.len as usize == payload.len()
            && (header.len == 0 || header.op == OP_RW);
        let index = self.by_ports.get(&ports).copied().filter(|_| header.dst_cid == HOST_CID);
        let Some(index) = index else {
            let accepted =
                well_formed && header.op == OP_REQUEST && self.accept_connection(header, ports, accept);
            if !accepted && header.op != OP_RST {
                self.resets.push_back(header.reset());
            }
            return;
        };
        let Some(connection) = &mut self.slots[index as usize].connection else { return };
        connection.update_credit(header);
        let allowed = well_formed
            && match header.op {
                OP_RESPONSE => connection.accept(),
                OP_RW => connection.takes_data() && connection.receive(payload).is_ok(),
                OP_SHUTDOWN => {
                    connection.guest_shuts(header.flags);
                    true
                }
                OP_CREDIT_UPDATE => true,
                OP_CREDIT_REQUEST => {
                    connection.owe_credit();
                    true
                }
                // A reset needs no answer, and everything else breaks the rules.
                _ => false,
            };
        if !allowed || connection.guest_is_done() {
            // What the guest sent before an orderly end is delivered, even when it loses patience meanwhile.
            let orderly = allowed || (header.op == OP_RST && connection.guest_is_finished());
            if header.op != OP_RST {
                self.resets.push_back(header.reset());
            }
            self.close(index, orderly);
        } else {
            self.settle(index);
        }
    }

    fn accept_connection(&mut self, header: &Header, ports: Ports, accept: Accept<'_>) -> bool {
        if self.is_full() {
            return false;
        }
        let Some(socket) = accept(ports.host) else { return false };
        let mut connection = Connection::accepted(ports, socket);
        connection.update_credit(header);
        self.insert(connection)
    }

    /// Whether it holds nothing that the guest or the host would miss.
    pub(super) fn is_idle(&self) -> bool {
        self.resets.is_empty() && self.slots.iter().all(|slot| slot.connection.is_none())
    }

    fn is_full(&self) -> bool {
        self.free.is_empty() && self.slots.len() >= MAX_CONNECTIONS
    }

    /// Puts `connection` in the table; false when it is full or the socket cannot be watched.
    fn insert(&mut self, connection: Connection) -> bool {
        use epoll::EventFlags;
        if self.is_full() {
            return false;
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        let event = epoll::EventData::new_u64(u64::from(slot.generation) << 32 | u64::from(index));
        // Edges: one registration for the life of the connection.
        let edges = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        if epoll::add(&self.epoll, connection.socket(), event, edges).is_err() {
            self.free.push(index);
            return false;
        }
        self.by_ports.insert(connection.ports(), index);
        slot.connection = Some(connection);
        self.settle(index);
        true
    }

    /// The guest is done with a connection: forgets it, in an orderly end after all was delivered.
    fn close(&mut self, index: u32, orderly: bool) {
        let slot = &mut self.slots[index as usize];
        let Some(connection) = &mut slot.connection else { return };
        self.by_ports.remove(&connection.ports());
        if orderly && !connection.is_drained() {
            connection.drain();
        } else {
            self.release(index);
        }
    }

    /// Closes the socket of a slot and makes it free.
    fn release(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.connection = None;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
    }

    /// After a connection changed: puts it in line when it has something for the guest, forgets it when it is done.
    fn settle(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        let Some(connection) = &slot.connection else { return };
        if connection.is_draining() && connection.is_drained() {
            self.release(index);
        } else if connection.has_packet() && !slot.queued {
            slot.queued = true;
            self.ready.push_back(index);
        }
    }
}
