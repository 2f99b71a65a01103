//! The socket device: streams between guest ports and host sockets. VIRTIO 1.2 §5.10 "Socket Device".

mod connection;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::rand::{GetRandomFlags, getrandom};

use self::muxer::{FIRST_EPHEMERAL_PORT, Muxer};
use crate::bell::Bell;
use crate::worker::Worker;
use crate::{Broken, Device, Session};

const DEVICE_TYPE: u32 = 19;
const QUEUE_ENTRIES: &[u16] = &[256, 256, 8];
/// Behind those for packets, one each way.
const EVENT_QUEUE: usize = 2;
const EVENT_TRANSPORT_RESET: u32 = 0;
/// The queues, in the device's order. The third carries events to the guest, of which there is one: that a restore cut
/// all its connections.
const RX: usize = 0;
const TX: usize = 1;

/// The most connections of one guest, both directions together.
pub(crate) const MAX_CONNECTIONS: usize = 512;
/// The most host ports a guest can be given to connect to.
const MAX_LISTENERS: usize = 64;

/// Opens the host's end of a connection from the guest: a connected stream socket. Called on the device's thread, with
/// the table of ports locked; it must not block.
pub type OpenStream = Box<dyn FnMut() -> io::Result<OwnedFd> + Send>;

/// The vsock device.
///
/// One thread moves all streams, awake only when a queue or a socket has something. Payload goes between guest memory
/// and sockets without a copy of ours; a reader on the host's side that is slow costs one bounded buffer
/// and stops its own writer in the guest, by the credit the protocol has for that, and nobody else.
pub struct Vsock {
    guest_cid: u64,
    host: Arc<Mutex<HostSide>>,
    worker: Option<Worker>,
}

/// What the host asks of the device, while it runs and before.
#[derive(Default)]
struct HostSide {
    /// The running device's.
    bell: Option<Arc<Bell>>,
    connects: VecDeque<(u32, OwnedFd)>,
    listeners: HashMap<u32, OpenStream>,
}

/// The host's side of a [`Vsock`]: connects to guest ports, and says where the guest may connect to.
#[derive(Clone)]
pub struct VsockPorts {
    host: Arc<Mutex<HostSide>>,
}

/// A connection cannot be tried. Its socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The guest's driver has not set the device up, or broke it.
    #[error("the guest has no working vsock device")]
    NotRunning,
    /// Too many were asked for at once.
    #[error("more than {MAX_CONNECTIONS} vsock connections")]
    TooMany,
}

impl VsockPorts {
    /// Connects `socket`, a connected stream socket, to `guest_port`.
    ///
    /// What the host writes waits in the socket until the guest accepts. A guest that refuses closes the socket.
    ///
    /// # Errors
    /// [`ConnectError`]
    pub fn connect(&self, guest_port: u32, socket: OwnedFd) -> Result<(), ConnectError> {
        let mut host = lock(&self.host);
        let Some(bell) = host.bell.clone() else { return Err(ConnectError::NotRunning) };
        if host.connects.len() >= MAX_CONNECTIONS {
            return Err(ConnectError::TooMany);
        }
        host.connects.push_back((guest_port, socket));
        bell.ring(Bell::HOST);
        Ok(())
    }

    /// Lets the guest connect to `host_port`, each time by a socket from `open`; false when there are 64 such ports
    /// already. All other ports refuse.
    pub fn listen(&self, host_port: u32, open: OpenStream) -> bool {
        let mut host = lock(&self.host);
        let possible = host.listeners.len() < MAX_LISTENERS || host.listeners.contains_key(&host_port);
        if possible {
            host.listeners.insert(host_port, open);
        }
        possible
    }
}

/// Connects to the Unix socket at `path` for each connection of the guest; one whose backlog is full refuses.
///
/// # Errors
/// When the path is too long for a socket address.
pub fn unix_connector(path: &Path) -> io::Result<OpenStream> {
    let address = SocketAddrUnix::new(path)?;
    Ok(Box::new(move || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)?;
        Ok(socket)
    }))
}

impl Vsock {
    /// A device for the guest with context id `guest_cid`, 3 or more, and the host's side of it.
    pub fn new(guest_cid: u64) -> (Self, VsockPorts) {
        let host = Arc::new(Mutex::new(HostSide::default()));
        (Self { guest_cid, host: Arc::clone(&host), worker: None }, VsockPorts { host })
    }
}

impl Device for Vsock {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_entries(&self) -> &'static [u16] {
        QUEUE_ENTRIES
    }

    /// The configuration space is the guest's context id. VIRTIO 1.2 §5.10.4 "Device configuration layout".
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.guest_cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        let length = data.len().min(config.len() - start);
        data[..length].copy_from_slice(&config[start..start + length]);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, mut session: Session) -> io::Result<()> {
        // A session that was stopped and kept has its connections still.
        let muxer = match session.kept.take().and_then(|kept| kept.downcast::<Muxer>().ok()) {
            Some(muxer) => muxer,
            None => Box::new(Muxer::new(self.guest_cid, if session.restored { any_port()? } else { 0 })?),
        };
        let bell = Arc::new(Bell::new()?);
        muxer.watch_bell(&*bell)?;
        // Before the thread runs: one that finds its driver broken takes it away again.
        lock(&self.host).bell = Some(Arc::clone(&bell));
        let (ring, host) = (Arc::clone(&bell), Arc::clone(&self.host));
        let worker = Worker::start("virtio-vsock", bell, move || run(session, muxer, &ring, &host))
            .inspect_err(|_| lock(&self.host).close())?;
        self.worker = Some(worker);
        Ok(())
    }

    fn kick(&self, queue: u16) {
        if let Some(worker) = &self.worker {
            worker.kick(queue);
        }
    }

    fn begin_stop(&self) {
        if let Some(worker) = &self.worker {
            worker.begin_stop();
        }
    }

    fn stop(&mut self) -> Option<Session> {
        let worker = self.worker.take()?;
        lock(&self.host).close();
        worker.stop()
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Where the ports of a restored guest's device begin. It may still know a connection of the machine it was saved in, closed
/// but not forgotten, and refuses another between the same ports.
fn any_port() -> io::Result<u32> {
    let mut bytes = [0; 4];
    getrandom(&mut bytes[..], GetRandomFlags::empty())?;
    // The first is a power of two, so any number with its bit is an ephemeral port.
    Ok(u32::from_le_bytes(bytes) | FIRST_EPHEMERAL_PORT)
}

impl HostSide {
    /// Refuses connections from now on, and those that were not looked at.
    fn close(&mut self) {
        self.bell = None;
        self.connects.clear();
    }
}

fn lock(host: &Mutex<HostSide>) -> MutexGuard<'_, HostSide> {
    host.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(mut session: Session, mut muxer: Box<Muxer>, bell: &Bell, host: &Mutex<HostSide>) -> Session {
    match serve(&mut session, &mut muxer, bell, host) {
        Ok(()) => session.kept = (!muxer.is_idle()).then_some(muxer),
        Err(broken) => {
            lock(host).close();
            session.signal.broken(broken);
        }
    }
    session
}

/// The device without its thread, a step at a time, for fuzzing.
#[cfg(any(test, feature = "testing"))]
pub(crate) struct Stepped(Muxer);

#[cfg(any(test, feature = "testing"))]
impl Stepped {
    pub(crate) fn new(guest_cid: u64) -> io::Result<Self> {
        Muxer::new(guest_cid, 0).map(Self)
    }

    pub(crate) fn connect(&mut self, guest_port: u32, socket: OwnedFd) {
        self.0.connect(guest_port, socket);
    }

    /// Everything that can be done now.
    pub(crate) fn step(
        &mut self,
        session: &mut Session,
        accept: &mut dyn FnMut(u32) -> Option<OwnedFd>,
    ) -> Result<(), Broken> {
        loop {
            self.0.wait(true).map_err(|error| Broken::Host(error.kind()))?;
            let more = self.0.turn(session, accept)?;
            self.0.check_limits();
            if !more {
                return Ok(());
            }
        }
    }
}

/// Tells the driver that all its connections are gone. VIRTIO 1.2 §5.10.6.7 "Device Events".
///
/// It resets every connection it then has, so there must be no new one before it has heard. That is when it gives the
/// event's buffer back: when more of them wait than the number returned. `None` when it gave none to tell it by.
fn tell_reset(session: &mut Session) -> Result<Option<u16>, Broken> {
    let Session { memory, queues, .. } = &mut *session;
    let events = &mut queues[EVENT_QUEUE];
    let Some(chain) = events.pop(memory)? else { return Ok(None) };
    let written = memory.slices(chain.writable())?.copy_from(&EVENT_TRANSPORT_RESET.to_le_bytes());
    let waiting = events.enable_kicks_past_waiting(memory)?;
    events.push(memory, chain, written as u32)?;
    session.interrupt_if_wanted()?;
    Ok(Some(waiting))
}

/// Moves streams until told to stop.
fn serve(
    session: &mut Session,
    muxer: &mut Muxer,
    bell: &Bell,
    host: &Mutex<HostSide>,
) -> Result<(), Broken> {
    let mut unheard = if std::mem::take(&mut session.lost) { tell_reset(session)? } else { None };
    let mut accept = |port: u32| lock(host).listeners.get_mut(&port).and_then(|open| open().ok());
    // The first turn asks for kicks.
    let mut more = true;
    loop {
        let rung = muxer.wait(more).map_err(|error| Broken::Host(error.kind()))?;
        let reasons = if rung { bell.wait() } else { 0 };
        if reasons & Bell::STOP != 0 {
            return Ok(());
        }
        let mut ready = unheard.is_none() && reasons & Bell::HOST != 0;
        if let Some(before) = unheard
            && session.queues[EVENT_QUEUE].waiting(&session.memory)? > before
        {
            unheard = None;
            ready = true;
        }
        if ready {
            let connects = std::mem::take(&mut lock(host).connects);
            for (port, socket) in connects {
                muxer.connect(port, socket);
            }
        }
        more = muxer.turn(session, &mut accept)?;
    }
}
