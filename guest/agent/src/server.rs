//! The agent at work: connections, the requests on them, and one loop that waits for all.
//!
//! ```text
//!  accepted ──request──▶ answered ─────────────────────▶ closed
//!     │                     ▲
//!     ├──await─▶ waiting ───┤
//!     ├──get───▶ sending ───┤
//!     ├──put───▶ receiving ─┤
//!     ├──dial──▶ relaying ──┤
//!     └──exec──▶ running ───┴─ ended, output sent
//!                   │ connection lost
//!                   ├──▶ abandoned ── process reaped ──▶ closed
//!                   └──▶ detached ─── process reaped ──▶ closed
//! ```
//!
//! A command whose connection is lost is abandoned, which is to be killed. A guest that is asked to park keeps the
//! connections of running commands of trees on their way and of TCP, and closes all others (`parking.rs`). It may go on as another guest, whose host knows
//! nothing of them: a command of an earlier life whose connection is lost is detached, and runs on with nobody at its
//! streams.
//!
//! Every file is watched edge-triggered: an event is remembered as "may be ready" until a call says otherwise, so the
//! loop makes no call to change what it waits for, and waits whenever nothing may be ready.

mod parking;

use alloc::format;
use alloc::string::{String, ToString as _};
use alloc::vec;
use alloc::vec::Vec;

use kiln_protocol::frame::{self, Kind, ToAgent};
use kiln_protocol::{
    Await, Call, Dial, Done, Exec, Failed, Outcome, Parked, PowerOff, Reason, Setup, Started, Welcome, power,
};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;
use rustix::time::Timespec;

use crate::adopt::{Moment, Rate};
use crate::awaited::Wait;
use crate::connection::{Connection, Next, Stage, data, source};
use crate::failure::{failed, internal, invalid, text};
use crate::identity::Life;
use crate::listen::Listener;
use crate::measure::measure;
use crate::power::Power;
use crate::relay::Relay;
use crate::session::{Registrar, Session, Source, Violation, one_shot};
use crate::setup::Prepared;
use crate::signals::{SIGKILL, SIGTERM};
use crate::transfer::{Receiving, Sending};
use crate::workload::{Place, Workload};
use crate::{extra, mounts, sys};
use parking::Parking;

/// The most connections at a time; one more is closed at once.
const MAX_CONNECTIONS: usize = 128;
/// The most of these that carry a TCP connection of the guest's: however many there are, commands have their place.
const MAX_RELAYS: usize = 64;
/// The random bytes that tell one guest from another.
const RANDOM_BYTES: usize = 32;
/// The most events taken at a time.
const MAX_EVENTS: usize = 32;
/// The longest a power-off waits for processes before it kills them.
const MAX_GRACE_MS: u64 = 10 * 60 * 1000;

/// Event data that is no connection's.
const LISTENER: u64 = u64::MAX;
const REAPER: u64 = u64::MAX - 1;
const GRACE: u64 = u64::MAX - 2;

/// How a guest is made ready for commands, in the life it leads since it was restored, from what has been prepared;
/// [`crate::setup::set_up`] in a guest.
pub type SetUp = fn(&Setup, Option<&Life>, Option<Prepared>) -> Result<Place, Failed>;

/// Why an agent serves no longer.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The kernel refuses what serving needs.
    #[error("cannot serve: {}", text(*.0))]
    Serving(Errno),
    /// The guest was restored and could not become the one it was to be.
    #[error("cannot become the guest of this generation: {0}")]
    NotAdopted(String),
}

impl Fault {
    /// The notice the monitor is given of it.
    pub fn notice(&self) -> u32 {
        match self {
            Self::Serving(_) => power::NOTICE_AGENT_PANIC,
            Self::NotAdopted(_) => power::NOTICE_NOT_ADOPTED,
        }
    }
}

/// The agent: answers requests until it is told to power off.
pub struct Agent<'a> {
    power: &'a Power,
    epoll: OwnedFd,
    listener: Listener,
    connections: Vec<Option<Connection>>,
    set_up: SetUp,
    /// What has been done of a set-up that is still to come.
    prepared: Option<Prepared>,
    workload: Option<Workload>,
    stopping: Option<Stopping>,
    /// A command of a chain has ended, and another is to follow.
    chain_due: bool,
    /// The guest is about to park.
    parking: Option<Parking>,
    started: Moment,
    /// How fast the processor's counter runs, once that has been measured.
    rate: Option<Rate>,
    /// The life since the guest was last restored.
    life: Option<Life>,
}

/// A power-off under way.
struct Stopping {
    /// The connection that asked.
    asked_by: usize,
    /// When patience ends; `None` once it has.
    grace: Option<OwnedFd>,
    /// The reaper knows that no command is left.
    commands_have_ended: bool,
}

impl<'a> Agent<'a> {
    /// An agent that listens on `listener`, speaks to the monitor by `power` and makes the guest ready by `set_up`.
    ///
    /// # Errors
    /// What epoll(7) reports.
    pub fn new(listener: Listener, set_up: SetUp, power: &'a Power) -> Result<Self, Errno> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN | EventFlags::ET)?;
        Ok(Self {
            power,
            epoll,
            listener,
            connections: Vec::new(),
            set_up,
            prepared: None,
            workload: None,
            stopping: None,
            chain_due: false,
            parking: None,
            started: Moment::now(),
            rate: None,
            life: None,
        })
    }

    /// Serves until a power-off request has been carried out: no process is left then, and disks are clean.
    ///
    /// # Errors
    /// [`Fault`], after which nothing can be served and the machine is to end.
    pub fn run(mut self) -> Result<(), Fault> {
        let mut events = Vec::with_capacity(MAX_EVENTS);
        let mut active: Vec<usize> = Vec::new();
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            let timeout = if active.is_empty() { None } else { Some(&at_once) };
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Fault::Serving(error)),
            }
            for event in &events {
                let (data, flags) = (event.data, event.flags);
                match data.u64() {
                    LISTENER => self.accept(),
                    REAPER => self.workload.iter_mut().for_each(Workload::reap_reaper),
                    GRACE => self.patience_ends(),
                    data => {
                        if let Some(slot) = self.happened(data, flags)
                            && !active.contains(&slot)
                        {
                            active.push(slot);
                        }
                    }
                }
            }
            self.chains_go_on();
            active.retain(|slot| self.turn(*slot) == Next::Again);
            if let Some(parking) = self.parking.take() {
                self.park(parking)?;
            }
            if self.has_stopped() {
                return Ok(());
            }
        }
    }

    /// Starts the commands whose turn has come in their chains. No guest is parked between the end of one and the start of the
    /// next; one that powers off starts none.
    fn chains_go_on(&mut self) {
        if !core::mem::take(&mut self.chain_due) {
            return;
        }
        let workload = self.workload.as_ref().filter(|_| self.stopping.is_none());
        for (slot, connection) in self.connections.iter_mut().enumerate() {
            let Some(connection) = connection else { continue };
            if let Stage::Running(session) | Stage::Abandoned(session) | Stage::Detached(session) =
                &mut connection.stage
                && session.is_due()
            {
                let files = |source| data(slot, Some(source));
                session.go_on(workload, &Registrar { epoll: self.epoll.as_fd(), data: &files });
            }
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok(Some(socket)) => self.admit(socket),
                // Not from the host, or gone again before it was accepted.
                Ok(None) | Err(Errno::INTR | Errno::CONNABORTED) => {}
                // AGAIN; and what else there is (no descriptor, no memory) is tried at the next connection.
                Err(_) => return,
            }
        }
    }

    fn admit(&mut self, socket: OwnedFd) {
        let slot = match self.connections.iter().position(Option::is_none) {
            Some(slot) => slot,
            None if self.connections.len() < MAX_CONNECTIONS => {
                self.connections.push(None);
                self.connections.len() - 1
            }
            None => return,
        };
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        if epoll::add(&self.epoll, &socket, data(slot, None), flags).is_ok() {
            self.connections[slot] = Some(Connection::new(socket));
        }
    }

    /// Takes note of an event; returns the connection it is about.
    fn happened(&mut self, data: u64, flags: EventFlags) -> Option<usize> {
        let slot = (data >> 8) as usize;
        let connection = self.connections.get_mut(slot)?.as_mut()?;
        match (source(data), &mut connection.stage) {
            (None, _) => {
                connection.readable |= flags.intersects(!EventFlags::OUT);
                connection.hung_up |= flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
                connection.writable |= flags.contains(EventFlags::OUT);
            }
            (
                Some(source),
                Stage::Running(session) | Stage::Abandoned(session) | Stage::Detached(session),
            ) => {
                let had_ended = session.has_ended();
                session.happened(source, flags);
                self.chain_due |= session.is_due();
                let ends = !had_ended && session.has_ended();
                if let (true, true, Some(workload)) = (ends, session.is_first(), &mut self.workload) {
                    workload.first_has_ended();
                }
            }
            (Some(_), Stage::Waiting(wait)) => match wait.look() {
                Ok(false) => {}
                Ok(true) => connection.answer(Outcome::Done(Done {})),
                Err(failed) => connection.answer(Outcome::Failed(failed)),
            },
            (Some(_), Stage::Relaying(relay)) => relay.happened(flags),
            (Some(_), Stage::Asking | Stage::Receiving(_) | Stage::Sending(_) | Stage::Answered) => {}
        }
        Some(slot)
    }

    /// Does for one connection what can be done without waiting.
    fn turn(&mut self, slot: usize) -> Next {
        let Some(mut connection) = self.connections.get_mut(slot).and_then(Option::take) else {
            return Next::Wait;
        };
        let next = self.serve(slot, &mut connection);
        if next == Next::Close {
            return self.closed(slot, connection);
        }
        self.connections[slot] = Some(connection);
        next
    }

    fn closed(&mut self, slot: usize, mut connection: Connection) -> Next {
        if let Stage::Running(mut session) = connection.stage {
            if connection.restores < self.restores() && !session.has_ended() {
                session.detach();
                connection.stage = Stage::Detached(session);
                connection.readable = false;
                connection.out = Vec::new();
                self.connections[slot] = Some(connection);
                return Next::Again;
            }
            session.abandon();
            if session.has_ended() {
                return Next::Wait;
            }
            connection.stage = Stage::Abandoned(session);
            connection.readable = false;
            self.connections[slot] = Some(connection);
            return Next::Wait;
        }
        if let Some(stopping) = &mut self.stopping
            && stopping.asked_by == slot
        {
            stopping.asked_by = usize::MAX;
        }
        Next::Wait
    }

    fn serve(&mut self, slot: usize, connection: &mut Connection) -> Next {
        if let Stage::Abandoned(session) = &connection.stage {
            return if session.has_ended() { Next::Close } else { Next::Wait };
        }
        if let Stage::Detached(session) = &mut connection.stage {
            let files = |source| data(slot, Some(source));
            let more =
                session.advance(&mut connection.out, &Registrar { epoll: self.epoll.as_fd(), data: &files });
            connection.out.clear();
            return match session.outcome() {
                Some(_) => Next::Close,
                None if more => Next::Again,
                None => Next::Wait,
            };
        }
        if let Stage::Relaying(_) = connection.stage {
            return self.relay(slot, connection);
        }
        if connection.receive().is_err() || self.take_frames(slot, connection).is_err() {
            return Next::Close;
        }
        let mut more_output = false;
        if let Stage::Running(session) = &mut connection.stage {
            let files = |source| data(slot, Some(source));
            let registrar = Registrar { epoll: self.epoll.as_fd(), data: &files };
            more_output = session.advance(&mut connection.out, &registrar);
            if let Some(exited) = session.outcome() {
                session.say_last_words(&mut connection.out);
                frame::append_message(&mut connection.out, Kind::Exited, &exited);
                connection.stage = Stage::Answered;
            }
        }
        if let Stage::Sending(sending) = &mut connection.stage {
            more_output = true;
            if connection.out.is_empty()
                && let Some(outcome) = sending.advance(&mut connection.out)
            {
                connection.answer(outcome);
            }
        }
        if connection.send(&self.epoll, slot).is_err() {
            return Next::Close;
        }
        match connection.stage {
            Stage::Answered if connection.out.is_empty() => Next::Close,
            _ if connection.readable || (more_output && connection.out.is_empty()) => Next::Again,
            _ => Next::Wait,
        }
    }

    /// Carries a TCP connection on, once it is made and the host has heard of it.
    fn relay(&mut self, slot: usize, connection: &mut Connection) -> Next {
        let files = |source| data(slot, Some(source));
        let registrar = Registrar { epoll: self.epoll.as_fd(), data: &files };
        if let Stage::Relaying(relay) = &mut connection.stage {
            match relay.settle(&registrar) {
                None if !relay.is_connected() => {
                    // Who does not wait any more has hung up, for nothing is to be sent yet.
                    return if connection.hung_up { Next::Close } else { Next::Wait };
                }
                None => {}
                Some(Ok(())) => connection.say(Outcome::Done(Done {})),
                Some(Err(failed)) => connection.answer(Outcome::Failed(failed)),
            }
        }
        if connection.send(&self.epoll, slot).is_err() {
            return Next::Close;
        }
        let Connection { socket, readable, writable, out, stage, .. } = connection;
        match stage {
            _ if !out.is_empty() => Next::Wait,
            Stage::Relaying(relay) => relay.advance(socket, readable, writable),
            _ => Next::Close,
        }
    }

    /// Sends a signal to every process, or to the command that is process 1.
    fn signal(&mut self, number: u32) -> Result<(), Failed> {
        self.has_root()?;
        let Some(workload) = &self.workload else { return Ok(()) };
        if workload.signal_all(number)? {
            self.signal_first(number);
        }
        Ok(())
    }

    /// Sends a signal to the command that is process 1.
    fn signal_first(&mut self, number: u32) {
        for (slot, connection) in self.connections.iter_mut().enumerate() {
            if let Some(Connection {
                stage: Stage::Running(session) | Stage::Abandoned(session) | Stage::Detached(session),
                ..
            }) = connection
                && session.is_first()
            {
                let files = |source| data(slot, Some(source));
                session.signal(number, false, &Registrar { epoll: self.epoll.as_fd(), data: &files });
            }
        }
    }

    /// Begins to make a TCP connection.
    fn dial(&mut self, slot: usize, connection: &mut Connection, dial: Dial) -> Result<Relay, Failed> {
        self.has_root()?;
        let is_relay = |connection: &&Connection| matches!(connection.stage, Stage::Relaying(_));
        if self.connections.iter().flatten().filter(is_relay).count() >= MAX_RELAYS {
            let message =
                format!("{MAX_RELAYS} connections to ports of the guest are open, as many as there may be");
            return Err(failed(Reason::Busy, message));
        }
        connection
            .watch(&self.epoll, slot)
            .map_err(|_| invalid("the connection cannot be watched".into()))?;
        let files = |source| data(slot, Some(source));
        Relay::dial(dial.port, &Registrar { epoll: self.epoll.as_fd(), data: &files })
    }

    fn take_frames(&mut self, slot: usize, connection: &mut Connection) -> Result<(), Violation> {
        // The reader is set aside so that a frame can be borrowed while the connection is changed.
        let mut reader = core::mem::take(&mut connection.reader);
        let taken = loop {
            match reader.next_frame() {
                Ok(None) => break Ok(()),
                Ok(Some((kind, payload))) => {
                    let Ok(frame) = ToAgent::decode(kind, payload) else { break Err(Violation) };
                    if let Err(violation) = self.take(slot, connection, frame) {
                        break Err(violation);
                    }
                }
                Err(_) => break Err(Violation),
            }
        };
        connection.reader = reader;
        taken
    }

    fn take(
        &mut self,
        slot: usize,
        connection: &mut Connection,
        frame: ToAgent<'_>,
    ) -> Result<(), Violation> {
        match &mut connection.stage {
            Stage::Asking => {
                let asked_before = self.stopping.as_ref().is_some_and(|stopping| stopping.asked_by == slot);
                let ToAgent::Request(request) = frame else { return Err(Violation) };
                let call = request.call.filter(|_| !asked_before).ok_or(Violation)?;
                self.call(slot, connection, call);
            }
            Stage::Running(session) => match frame {
                ToAgent::Request(_) | ToAgent::Entry(_) | ToAgent::Data(_) | ToAgent::End => {
                    return Err(Violation);
                }
                ToAgent::Stdin(bytes) => session.stdin(bytes)?,
                ToAgent::StdinEnd => session.end_stdin(),
                ToAgent::Signal(number) => {
                    let files = |source| data(slot, Some(source));
                    session.signal(number, true, &Registrar { epoll: self.epoll.as_fd(), data: &files });
                }
                ToAgent::Resize(size) => session.resize(size),
                ToAgent::StdoutCredit(bytes) => session.grant(0, bytes),
                ToAgent::StderrCredit(bytes) => session.grant(1, bytes),
                ToAgent::StdoutClose => session.close_output(0),
                ToAgent::StderrClose => session.close_output(1),
            },
            Stage::Receiving(receiving) => match receiving.take(frame)? {
                Some(outcome @ Outcome::Failed(_)) => connection.say(outcome),
                Some(outcome) => connection.answer(outcome),
                None => {}
            },
            Stage::Sending(_) | Stage::Relaying(_) | Stage::Waiting(_) => return Err(Violation),
            // What was under way when the command ended, or was never started.
            Stage::Answered | Stage::Abandoned(_) | Stage::Detached(_) => {}
        }
        Ok(())
    }

    fn call(&mut self, slot: usize, connection: &mut Connection, call: Call) {
        let outcome = match call {
            Call::Hello(_) => Ok(Outcome::Welcome(self.welcome())),
            Call::Setup(setup) => self.set_up(&setup).map(|()| Outcome::Done(Done {})),
            Call::Exec(exec) => self.exec(slot, exec).map(|(session, pid)| {
                connection.stage = Stage::Running(session);
                connection.restores = self.restores();
                Outcome::Started(Started { pid })
            }),
            Call::WriteFile(part) => {
                self.has_root().and_then(|()| extra::write(&part)).map(|()| Outcome::Done(Done {}))
            }
            Call::RemoveFile(file) => {
                self.has_root().and_then(|()| extra::remove(&file)).map(|()| Outcome::Done(Done {}))
            }
            Call::Put(put) => match self.has_root().and_then(|()| Receiving::begin(&put)) {
                Ok(receiving) => {
                    connection.say(Outcome::Done(Done {}));
                    connection.stage = Stage::Receiving(receiving);
                    return;
                }
                Err(failed) => Err(failed),
            },
            Call::Get(get) => match self.has_root().and_then(|()| Sending::begin(&get)) {
                Ok(sending) => {
                    connection.say(Outcome::Done(Done {}));
                    connection.stage = Stage::Sending(sending);
                    return;
                }
                Err(failed) => Err(failed),
            },
            Call::Dial(dial) => match self.dial(slot, connection, dial) {
                Ok(relay) => {
                    connection.stage = Stage::Relaying(relay);
                    return;
                }
                Err(failed) => Err(failed),
            },
            Call::Signal(signal) => self.signal(signal.number).map(|()| Outcome::Done(Done {})),
            Call::Measure(_) => self.has_root().and_then(|()| measure()).map(Outcome::Measured),
            Call::Await(request) => match self.wait(slot, request) {
                Ok(wait) => {
                    connection.stage = Stage::Waiting(wait);
                    return;
                }
                Err(outcome) => outcome,
            },
            Call::PowerOff(power_off) => match self.stop(slot, &power_off) {
                Ok(()) => return,
                Err(failed) => Err(failed),
            },
            Call::Park(_) => match self.make_ready_to_park() {
                Ok(parking) => {
                    self.parking = Some(parking);
                    if self.power.has_doorbell() {
                        // The ring is the answer.
                        connection.stage = Stage::Answered;
                        return;
                    }
                    Ok(Outcome::Parked(Parked {}))
                }
                Err(failed) => Err(failed),
            },
            Call::Become(_) => Err(invalid("the guest is not parked".into())),
        };
        connection.answer(outcome.unwrap_or_else(Outcome::Failed));
    }

    fn welcome(&self) -> Welcome {
        let system = rustix::system::uname();
        let mut random = vec![0; RANDOM_BYTES];
        if rustix::rand::getrandom(&mut random[..], GetRandomFlags::NONBLOCK) != Ok(RANDOM_BYTES) {
            // Not seeded yet: better nothing than what others may have too.
            random.clear();
        }
        Welcome {
            version: env!("CARGO_PKG_VERSION").to_string(),
            kernel: system.release().to_string_lossy().to_string(),
            generation: self.life.as_ref().map_or(0, |life| life.counter),
            hostname: system.nodename().to_string_lossy().to_string(),
            realtime_ns: sys::realtime_ns(),
            monotonic_ns: sys::monotonic_ns(),
            random,
        }
    }

    fn set_up(&mut self, setup: &Setup) -> Result<(), Failed> {
        if self.workload.is_some() || self.stopping.is_some() {
            return Err(invalid("the guest has been set up already".into()));
        }
        self.is_not_parking()?;
        let workload = Workload::new((self.set_up)(setup, self.life.as_ref(), self.prepared.take())?)?;
        if let Some(reaper) = workload.reaper() {
            epoll::add(&self.epoll, reaper, EventData::new_u64(REAPER), EventFlags::IN | EventFlags::ET)
                .map_err(|error| internal("watch the reaper", error))?;
        }
        self.workload = Some(workload);
        Ok(())
    }

    fn exec(&mut self, slot: usize, exec: Exec) -> Result<(Session, u32), Failed> {
        if self.stopping.is_some() {
            return Err(invalid("the guest is powering off".into()));
        }
        self.is_not_parking()?;
        let first = first_process(&self.connections);
        let workload =
            self.workload.as_mut().ok_or_else(|| invalid("the guest has not been set up".into()))?;
        let timeout_ms = exec.timeout_ms;
        let running = workload.start(exec, first)?;
        let pid = running.child.inner_pid;
        let files = |source| data(slot, Some(source));
        let registrar = Registrar { epoll: self.epoll.as_fd(), data: &files };
        match Session::new(running, timeout_ms, &registrar) {
            Ok(session) => Ok((session, pid)),
            Err((running, error)) => {
                let _ = sys::signal(running.child.pid, !running.is_first, SIGKILL);
                let _ = sys::reap(running.child.pid, true);
                if running.is_first {
                    workload.first_has_ended();
                }
                Err(internal("watch the command", error))
            }
        }
    }

    /// Begins to power off: processes are asked to end, and killed when the grace period is over.
    fn stop(&mut self, slot: usize, power_off: &PowerOff) -> Result<(), Failed> {
        if self.stopping.is_some() {
            return Err(invalid("the guest is powering off already".into()));
        }
        self.is_not_parking()?;
        self.stopping = Some(Stopping { asked_by: slot, grace: None, commands_have_ended: false });
        let Some(workload) = &self.workload else { return Ok(()) };
        let timer = match power_off.grace_ms.min(MAX_GRACE_MS) {
            0 => None,
            grace_ms => one_shot(grace_ms).ok().filter(|timer| {
                epoll::add(&self.epoll, timer, EventData::new_u64(GRACE), EventFlags::IN | EventFlags::ET)
                    .is_ok()
            }),
        };
        match &timer {
            Some(_) if workload.ask_to_end() => self.signal_first(SIGTERM),
            Some(_) => {}
            None => workload.end(),
        }
        self.stopping = Some(Stopping { asked_by: slot, grace: timer, commands_have_ended: false });
        Ok(())
    }

    /// Refuses what needs the image before it is there.
    fn has_root(&self) -> Result<(), Failed> {
        self.is_not_parking()?;
        match self.workload {
            Some(_) => Ok(()),
            None => Err(invalid("the guest has not been set up".into())),
        }
    }

    /// Begins to wait; what is there already is the answer.
    fn wait(&mut self, slot: usize, request: Await) -> Result<Wait, Result<Outcome, Failed>> {
        self.has_root().map_err(Err)?;
        let mut wait = Wait::new(request).map_err(Err)?;
        if wait.look().map_err(Err)? {
            return Err(Ok(Outcome::Done(Done {})));
        }
        epoll::add(
            &self.epoll,
            wait.file(),
            data(slot, Some(Source::Awaited)),
            EventFlags::IN | EventFlags::ET,
        )
        .map_err(|error| Err(internal("watch what is waited for", error)))?;
        Ok(wait)
    }

    /// How often the guest has been restored.
    fn restores(&self) -> u64 {
        self.life.as_ref().map_or(0, |life| life.counter)
    }

    /// Refuses what cannot be while processes are frozen: a command born among them would not get as far as its program.
    fn is_not_parking(&self) -> Result<(), Failed> {
        match self.parking {
            Some(_) => Err(invalid("the guest is being parked".into())),
            None => Ok(()),
        }
    }

    fn patience_ends(&mut self) {
        if let (Some(stopping), Some(workload)) = (&mut self.stopping, &self.workload) {
            stopping.grace = None;
            workload.end();
        }
    }

    /// Ends the power-off once no process is left.
    fn has_stopped(&mut self) -> bool {
        let Some(stopping) = &mut self.stopping else { return false };
        if let Some(workload) = self.workload.as_ref().filter(|workload| !workload.is_empty()) {
            let runs = |connection: &Connection| match &connection.stage {
                Stage::Running(session) | Stage::Abandoned(session) | Stage::Detached(session) => {
                    !session.has_ended()
                }
                Stage::Asking
                | Stage::Waiting(_)
                | Stage::Receiving(_)
                | Stage::Sending(_)
                | Stage::Relaying(_)
                | Stage::Answered => false,
            };
            if !stopping.commands_have_ended && !self.connections.iter().flatten().any(runs) {
                stopping.commands_have_ended = true;
                workload.end_with_orphans();
            }
            return false;
        }
        let asked_by = stopping.asked_by;
        if let Some(Some(connection)) = self.connections.get_mut(asked_by) {
            connection.answer(Outcome::Done(Done {}));
            // Best effort: what ends the machine is seen by the host in any case.
            let _ = connection.send(&self.epoll, asked_by);
        }
        mounts::settle(self.workload.as_ref().and_then(|workload| workload.place.scratch.as_ref()));
        true
    }
}

/// The command that is process 1, when one is.
fn first_process(connections: &[Option<Connection>]) -> Option<BorrowedFd<'_>> {
    connections.iter().flatten().find_map(|connection| match &connection.stage {
        Stage::Running(session) | Stage::Abandoned(session) | Stage::Detached(session)
            if session.is_first() =>
        {
            session.process()
        }
        _ => None,
    })
}
