//! A running command and its streams, between the command's pipes and the frames of one connection.
//!
//! Bytes wait in two places only. Stdin waits here, at most the credit the host was given. Output waits in the
//! command's pipe until the host has given credit for it and the connection has taken what went before: a slow reader
//! holds up the command, not memory.
//!
//! A command has ended when its own process has. What it wrote is in its pipes then, and is sent; what a process it
//! left behind may still write is not waited for, as `docker run` does not.

use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;

use kiln_protocol::frame::{self, HEADER_BYTES, Kind};
use kiln_protocol::{Exited, INITIAL_CREDIT_BYTES, MAX_DATA_BYTES, Reason, WindowSize};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::failure::internal;
use crate::signals::{self, Fate, SIGKILL};
use crate::sys::{self, Ended};
use crate::workload::{self, Chain, Running, Workload};

/// The most a terminal can hold of what a command wrote before it ended: 64 KiB on the way and a line buffer.
const MAX_TERMINAL_BYTES: u64 = 128 << 10;
/// How much stdin the command takes before the host hears of it: a frame for every few keys would cost more.
const GRANT_BYTES: u64 = INITIAL_CREDIT_BYTES / 2;
/// How often one looks what became of a signal: after a millisecond, then each time after twice as long, but no longer than the
/// longest pause: for a second. Who keeps it blocked for longer does so on purpose.
const LOOKS: u32 = 36;
const LONGEST_PAUSE_MS: u64 = 32;
/// What ends input at a terminal: Ctrl-D.
const END_OF_TRANSMISSION: u8 = 4;

/// What of a session an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The command ended.
    Child,
    /// Its time is up.
    Timer,
    /// It took from stdin.
    Stdin,
    /// It wrote to stdout, or its terminal is ready.
    Stdout,
    /// It wrote to stderr.
    Stderr,
    /// There is a reason to look for what is waited for; no command is.
    Awaited,
    /// A TCP connection is ready; no command is.
    Dialed,
    /// It is time to look what became of a signal.
    Signal,
}

/// Registers the files of one session with the event loop.
pub(crate) struct Registrar<'a> {
    pub(crate) epoll: BorrowedFd<'a>,
    /// The event data for each source.
    pub(crate) data: &'a dyn Fn(Source) -> EventData,
}

impl Registrar<'_> {
    pub(crate) fn add(&self, source: Source, file: impl AsFd, flags: EventFlags) -> Result<(), Errno> {
        epoll::add(self.epoll, file, (self.data)(source), flags | EventFlags::ET)
    }

    fn modify(&self, source: Source, file: impl AsFd, flags: EventFlags) -> Result<(), Errno> {
        epoll::modify(self.epoll, file, (self.data)(source), flags | EventFlags::ET)
    }
}

/// The host broke the rules of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Violation;

/// A command that was started and has not been reported as ended.
pub(crate) struct Session {
    running: Running,
    timer: Option<OwnedFd>,
    input: Input,
    outputs: [Output; 2],
    ended: Option<Ended>,
    timed_out: bool,
    /// What follows, once the command has exited with 0.
    chain: Option<Chain>,
    /// How the command ended that the next one of the chain is to follow.
    due: Option<Ended>,
    /// Why the next one did not start, for stderr.
    last_words: String,
    /// The most memory one of the chain had resident, in KiB.
    peak_rss_kib: u64,
    /// A signal to process 1 of which the fate is open.
    open: Option<OpenSignal>,
    /// The signal that SIGKILL stood in for.
    stood_in_for: Option<u32>,
}

struct OpenSignal {
    number: u32,
    looks: u32,
    timer: OwnedFd,
}

impl Session {
    /// Takes over a command that has just started.
    ///
    /// # Errors
    /// When its files cannot be watched; the caller ends the command.
    pub(crate) fn new(
        mut running: Running,
        timeout_ms: u64,
        registrar: &Registrar<'_>,
    ) -> Result<Self, (Running, Errno)> {
        let timer = match watch(&running, timeout_ms, registrar) {
            Ok(timer) => timer,
            Err(error) => return Err((running, error)),
        };
        let streams = &mut running.streams;
        let terminal = streams.terminal;
        let input = Input::new(streams.stdin.take(), terminal);
        let outputs = [
            Output::new(Kind::Stdout, streams.stdout.take(), terminal),
            Output::new(Kind::Stderr, streams.stderr.take(), terminal),
        ];
        let chain = running.chain.take();
        Ok(Self {
            running,
            timer,
            input,
            outputs,
            ended: None,
            timed_out: false,
            chain,
            due: None,
            last_words: String::new(),
            peak_rss_kib: 0,
            open: None,
            stood_in_for: None,
        })
    }

    /// The command's process, as long as it has not been reaped.
    pub(crate) fn process(&self) -> Option<BorrowedFd<'_>> {
        self.runs().then(|| self.running.child.pidfd.as_fd())
    }

    /// Its process is there: it has not been reaped.
    fn runs(&self) -> bool {
        self.ended.is_none() && self.due.is_none()
    }

    /// The next command of its chain is to be started.
    pub(crate) fn is_due(&self) -> bool {
        self.due.is_some()
    }

    /// Starts the next command of its chain; without a `workload`, the chain ends here.
    pub(crate) fn go_on(&mut self, workload: Option<&Workload>, registrar: &Registrar<'_>) {
        let (Some(last), Some(chain)) = (self.due.take(), &mut self.chain) else { return };
        let Some(workload) = workload.filter(|_| !self.timed_out) else {
            self.finish(last);
            return;
        };
        let started = workload.start_next(chain).and_then(|child| {
            match registrar.add(Source::Child, &child.pidfd, EventFlags::IN) {
                Ok(()) => Ok(child),
                Err(error) => {
                    let _ = sys::signal(child.pid, true, SIGKILL);
                    let _ = sys::reap(child.pid, true);
                    Err(internal("watch the command", error))
                }
            }
        });
        let ends = chain.is_empty();
        match started {
            Ok(child) => {
                self.running.child = child;
                if ends {
                    // With it goes the last end of its streams that is not its own.
                    self.chain = None;
                }
            }
            Err(failed) => {
                let code = match failed.reason() {
                    Reason::NotFound => 127,
                    Reason::NotExecutable => 126,
                    _ => 125,
                };
                self.last_words = failed.message;
                self.last_words.push('\n');
                self.finish(Ended { code, ..last });
            }
        }
    }

    /// Appends what is to be said on stderr behind all that was written there, as far as the host has room for it.
    pub(crate) fn say_last_words(&mut self, out: &mut Vec<u8>) {
        let words = core::mem::take(&mut self.last_words);
        if !words.is_empty() && words.len() as u64 <= self.outputs[1].credit {
            frame::append(out, Kind::Stderr, words.as_bytes());
        }
    }

    /// It is process 1 of its namespace.
    pub(crate) fn is_first(&self) -> bool {
        self.running.is_first
    }

    /// Takes note of an event.
    pub(crate) fn happened(&mut self, source: Source, flags: EventFlags) {
        match source {
            Source::Child => self.reap(),
            Source::Timer => self.time_is_up(),
            Source::Signal => self.look_again(),
            Source::Stdin => self.input.writable = true,
            Source::Awaited | Source::Dialed => {}
            Source::Stdout | Source::Stderr => {
                if flags.contains(EventFlags::OUT) {
                    self.input.writable = true;
                }
                let output = &mut self.outputs[usize::from(source == Source::Stderr)];
                output.readable = true;
                output.hung_up |= flags.intersects(EventFlags::HUP | EventFlags::ERR);
            }
        }
    }

    /// Takes in bytes for stdin; they wait here until the command reads.
    pub(crate) fn stdin(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        self.input.receive(bytes)
    }

    /// Ends stdin behind what came before.
    pub(crate) fn end_stdin(&mut self) {
        self.input.ending = true;
    }

    /// Lets the command write `bytes` more.
    pub(crate) fn grant(&mut self, output: usize, bytes: u64) {
        let output = &mut self.outputs[output];
        output.credit = output.credit.saturating_add(bytes);
    }

    /// Closes a stream nobody reads: the command hears of it at its next write. A terminal is not hung up for that:
    /// what is written to it is lost.
    pub(crate) fn close_output(&mut self, output: usize) {
        if self.running.streams.terminal {
            self.outputs[output].lost = true;
        } else {
            self.outputs[output].close();
        }
    }

    /// Sets the terminal's size, when there is a terminal.
    pub(crate) fn resize(&mut self, size: WindowSize) {
        if let (true, Some(terminal)) = (self.running.streams.terminal, &self.outputs[0].from) {
            let _ = workload::resize(terminal.as_fd(), size);
        }
    }

    /// Sends a signal to the command's process group, or to its own process alone.
    pub(crate) fn signal(&mut self, number: u32, group: bool, registrar: &Registrar<'_>) {
        if !self.runs() || !signals::exists(number) {
            return;
        }
        let _ = sys::signal(self.running.child.pid, group, number);
        if !self.is_first() || !signals::ends_a_process(number) {
            return;
        }
        match signals::fate(number) {
            Fate::Received => {}
            Fate::Dropped => self.stand_in_for(number),
            // Without word of the time to look, what is dropped later is lost, as it is to any process 1.
            Fate::Open => {
                self.open = one_shot(1)
                    .and_then(|timer| {
                        registrar.add(Source::Signal, &timer, EventFlags::IN)?;
                        Ok(OpenSignal { number, looks: 0, timer })
                    })
                    .ok();
            }
        }
    }

    fn look_again(&mut self) {
        // An event of a signal, or of a session, that was here before says nothing about this one.
        let due = |open: &mut OpenSignal| rustix::io::read(&open.timer, &mut [0; 8]).is_ok();
        let Some(mut open) = self.open.take_if(due).filter(|_| self.runs()) else { return };
        open.looks += 1;
        match signals::fate(open.number) {
            Fate::Dropped => self.stand_in_for(open.number),
            Fate::Open
                if open.looks < LOOKS && set(&open.timer, LONGEST_PAUSE_MS.min(1 << open.looks)).is_ok() =>
            {
                self.open = Some(open);
            }
            Fate::Open | Fate::Received => {}
        }
    }

    fn stand_in_for(&mut self, number: u32) {
        self.kill();
        self.stood_in_for.get_or_insert(number);
    }

    /// Kills the command's process group, or everything when it is process 1 of its namespace.
    pub(crate) fn kill(&mut self) {
        if self.runs() {
            let _ = sys::signal(self.running.child.pid, !self.is_first(), SIGKILL);
        }
    }

    /// Closes the command's streams, and kills it: nobody is there any more to hear of it.
    pub(crate) fn abandon(&mut self) {
        self.kill();
        self.chain = None;
        self.input.close();
        self.outputs.iter_mut().for_each(Output::close);
    }

    /// Leaves the command to itself: it goes on, what it writes is lost, and it waits for what nobody types.
    pub(crate) fn detach(&mut self) {
        for output in &mut self.outputs {
            output.lost = true;
        }
    }

    /// Whether the process has ended and been reaped.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// Moves what can be moved; `out` is taken on by the connection, and output is read only while it is empty.
    /// Returns whether more could be moved at once.
    pub(crate) fn advance(&mut self, out: &mut Vec<u8>, registrar: &Registrar<'_>) -> bool {
        let granted = self.input.advance(registrar);
        if granted > 0 {
            frame::append(out, Kind::StdinCredit, &granted.to_le_bytes());
        }
        if out.is_empty() {
            for output in &mut self.outputs {
                output.advance(out);
            }
        }
        self.outputs.iter().any(Output::is_ready)
    }

    /// How the command ended, once all it wrote has been sent.
    pub(crate) fn outcome(&self) -> Option<Exited> {
        let ended = self.ended.filter(|_| self.outputs.iter().all(|output| output.from.is_none()))?;
        let signal = match self.stood_in_for {
            Some(number) if u32::from(ended.signal) == SIGKILL && !self.timed_out => number,
            _ => ended.signal.into(),
        };
        let code = ended.code.into();
        Some(Exited { code, signal, timed_out: self.timed_out, peak_rss_kib: self.peak_rss_kib })
    }

    fn reap(&mut self) {
        if !self.runs() {
            return;
        }
        if let Ok(Some(ended)) = sys::reap(self.running.child.pid, false) {
            self.peak_rss_kib = self.peak_rss_kib.max(ended.peak_rss_kib);
            if self.chain.is_some() && (ended.code, ended.signal) == (0, 0) {
                self.due = Some(ended);
            } else {
                self.finish(ended);
            }
        }
    }

    fn finish(&mut self, ended: Ended) {
        self.ended = Some(ended);
        self.chain = None;
        self.timer = None;
        self.open = None;
        self.input.close();
        self.outputs.iter_mut().for_each(Output::end);
    }

    fn time_is_up(&mut self) {
        let Some(timer) = &self.timer else { return };
        // An event of a session that had this place before says nothing about this timer.
        if rustix::io::read(timer, &mut [0; 8]).is_ok() && self.ended.is_none() {
            self.timed_out = true;
            self.kill();
        }
    }
}

fn watch(running: &Running, timeout_ms: u64, registrar: &Registrar<'_>) -> Result<Option<OwnedFd>, Errno> {
    let streams = &running.streams;
    registrar.add(Source::Child, &running.child.pidfd, EventFlags::IN)?;
    for (source, output) in [(Source::Stdout, &streams.stdout), (Source::Stderr, &streams.stderr)] {
        if let Some(output) = output {
            registrar.add(source, output.as_fd(), EventFlags::IN)?;
        }
    }
    if timeout_ms == 0 {
        return Ok(None);
    }
    let timer = one_shot(timeout_ms)?;
    registrar.add(Source::Timer, &timer, EventFlags::IN)?;
    Ok(Some(timer))
}

/// A timer that becomes readable once, after `ms` milliseconds.
pub(crate) fn one_shot(ms: u64) -> Result<OwnedFd, Errno> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
    set(&timer, ms)?;
    Ok(timer)
}

/// Has such a timer become readable once more.
pub(crate) fn set(timer: &OwnedFd, ms: u64) -> Result<(), Errno> {
    let never = Timespec { tv_sec: 0, tv_nsec: 0 };
    let seconds = i64::try_from(ms / 1000).unwrap_or(i64::MAX);
    // Zero would be never.
    let nanoseconds = ((ms % 1000) as i64 * 1_000_000).max(1);
    let at = Itimerspec { it_interval: never, it_value: Timespec { tv_sec: seconds, tv_nsec: nanoseconds } };
    timerfd_settime(timer, TimerfdTimerFlags::empty(), &at).map(|_| ())
}

/// stdin: what the host sent and the command has not taken.
struct Input {
    to: Option<Rc<OwnedFd>>,
    terminal: bool,
    queue: Vec<u8>,
    /// How much of `queue` the command has taken.
    taken: usize,
    /// The last write found room.
    writable: bool,
    /// The event loop tells when there is room again.
    watched: bool,
    /// It ends behind the queue.
    ending: bool,
    /// What the host may still send.
    window: u64,
    /// What the command took and the host has not been told of.
    owed: u64,
}

impl Input {
    fn new(to: Option<Rc<OwnedFd>>, terminal: bool) -> Self {
        Self {
            to,
            terminal,
            queue: Vec::new(),
            taken: 0,
            writable: true,
            watched: false,
            ending: false,
            window: INITIAL_CREDIT_BYTES,
            owed: 0,
        }
    }

    fn receive(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        self.window = self.window.checked_sub(bytes.len() as u64).ok_or(Violation)?;
        // Once nobody reads, the window stays used up and the host stops.
        if self.to.is_some() {
            // What was taken makes room first: the queue holds what is on its way, and that is at most the window.
            self.queue.drain(..core::mem::take(&mut self.taken));
            self.queue.extend_from_slice(bytes);
        }
        Ok(())
    }

    /// Hands the command what it takes; returns the credit to give the host for it.
    fn advance(&mut self, registrar: &Registrar<'_>) -> u64 {
        while let (Some(to), true, true) = (self.to.as_deref(), self.writable, self.taken < self.queue.len())
        {
            let rest = &self.queue[self.taken..];
            match rustix::io::write(to, rest) {
                Ok(bytes) => {
                    self.taken += bytes;
                    self.owed += bytes as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.writable = false;
                    self.watch(registrar);
                }
                // The reader is gone.
                Err(_) => self.close(),
            }
        }
        if self.taken == self.queue.len() {
            self.queue.clear();
            self.taken = 0;
            if self.ending {
                self.finish();
            }
        }
        if self.owed < GRANT_BYTES || self.ending {
            return 0;
        }
        self.window += self.owed;
        core::mem::take(&mut self.owed)
    }

    fn watch(&mut self, registrar: &Registrar<'_>) {
        let Some(to) = self.to.as_deref().filter(|_| !self.watched) else { return };
        let watched = if self.terminal {
            registrar.modify(Source::Stdout, to, EventFlags::IN | EventFlags::OUT)
        } else {
            registrar.add(Source::Stdin, to, EventFlags::OUT)
        };
        match watched {
            Ok(()) => self.watched = true,
            // Without word of room to come, nothing more can be handed over.
            Err(_) => self.close(),
        }
    }

    /// Ends stdin: a pipe is closed, a terminal's reader gets an end of file and the terminal stays.
    fn finish(&mut self) {
        if self.terminal && self.to.is_some() {
            self.queue.push(END_OF_TRANSMISSION);
        }
        if !self.terminal {
            self.to = None;
        }
        self.ending = false;
    }

    fn close(&mut self) {
        self.to = None;
        self.queue = Vec::new();
        self.taken = 0;
    }
}

/// stdout or stderr.
struct Output {
    kind: Kind,
    from: Option<Rc<OwnedFd>>,
    terminal: bool,
    /// What the host has room for.
    credit: u64,
    /// There may be something to read.
    readable: bool,
    /// No writer is left: what is there ends with an end of file.
    hung_up: bool,
    /// Nobody wants to hear of it.
    lost: bool,
    /// The command has ended, and left at most this.
    left: Option<u64>,
}

impl Output {
    fn new(kind: Kind, from: Option<Rc<OwnedFd>>, terminal: bool) -> Self {
        Self {
            kind,
            from,
            terminal,
            credit: INITIAL_CREDIT_BYTES,
            readable: false,
            hung_up: false,
            lost: false,
            left: None,
        }
    }

    fn is_ready(&self) -> bool {
        self.from.is_some() && self.readable && (self.lost || self.credit > 0)
    }

    fn close(&mut self) {
        self.from = None;
    }

    /// Takes note that the command has ended: what it wrote and nothing else is still to be read.
    fn end(&mut self) {
        let Some(from) = self.from.as_deref() else { return };
        let left = if self.terminal {
            MAX_TERMINAL_BYTES
        } else {
            rustix::io::ioctl_fionread(from).unwrap_or(MAX_TERMINAL_BYTES)
        };
        self.left = Some(left);
        self.readable = true;
        if left == 0 {
            self.close();
        }
    }

    /// Appends one frame of what the command wrote to `out`.
    fn advance(&mut self, out: &mut Vec<u8>) {
        let Some(from) = self.from.as_deref().filter(|_| self.is_ready()) else { return };
        let room = if self.lost { u64::MAX } else { self.credit };
        let room = room.min(self.left.unwrap_or(u64::MAX)).min(MAX_DATA_BYTES as u64) as usize;
        let start = out.len();
        out.resize(start + HEADER_BYTES, 0);
        let read = loop {
            match sys::read_onto(from, out, room) {
                Err(Errno::INTR) => {}
                read => break read,
            }
        };
        let bytes = match read {
            Ok(bytes) if bytes > 0 => bytes,
            end => {
                out.truncate(start);
                if end == Err(Errno::AGAIN) && self.left.is_none() {
                    self.readable = false;
                } else {
                    // All writers are gone, a terminal is hung up (EIO), or the command ended and left no more.
                    self.close();
                }
                return;
            }
        };
        if self.lost {
            out.truncate(start);
        } else {
            out[start..start + HEADER_BYTES].copy_from_slice(&frame::header(self.kind, bytes));
            self.credit -= bytes as u64;
        }
        // A short read emptied the pipe (epoll(7), question 9); of a terminal it says nothing.
        self.readable = bytes == room || self.terminal || self.hung_up || self.left.is_some();
        if let Some(left) = &mut self.left {
            *left -= bytes as u64;
            if *left == 0 {
                self.close();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use alloc::vec;
    use std::io::Read as _;

    /// stdin of a command, the command's end, and an event loop.
    fn input() -> (Input, std::io::PipeReader, OwnedFd) {
        let (read, write) = std::io::pipe().expect("a pipe");
        let write: OwnedFd = write.into();
        rustix::fs::fcntl_setfl(&write, rustix::fs::OFlags::NONBLOCK).expect("a pipe");
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an event loop");
        (Input::new(Some(Rc::new(write)), false), read, epoll)
    }

    #[test]
    fn stdin_that_never_runs_dry_takes_no_more_memory_than_the_window() {
        let (mut input, mut reader, epoll) = input();
        let registrar = Registrar { epoll: epoll.as_fd(), data: &|_| EventData::new_u64(0) };
        let (mut window, mut sent, mut read) = (INITIAL_CREDIT_BYTES, 0_u64, 0_u64);
        while sent < 20 * INITIAL_CREDIT_BYTES {
            let piece = window.min(MAX_DATA_BYTES as u64);
            let bytes: Vec<u8> = (sent..sent + piece).map(|at| (at % 251) as u8).collect();
            input.receive(&bytes).expect("no more than the window");
            (window, sent) = (window - piece, sent + piece);
            assert!(input.queue.len() as u64 <= INITIAL_CREDIT_BYTES, "{} bytes wait", input.queue.len());

            input.writable = true;
            window += input.advance(&registrar);
            let mut taken = vec![0; 20_000];
            reader.read_exact(&mut taken).expect("bytes in the pipe");
            assert!(taken.iter().zip(read..).all(|(byte, at)| u64::from(*byte) == at % 251));
            read += taken.len() as u64;
        }
    }

    #[test]
    fn stdin_beyond_the_window_is_a_violation() {
        let (mut input, _reader, _epoll) = input();
        assert_eq!(input.receive(&vec![0; INITIAL_CREDIT_BYTES as usize]), Ok(()));
        assert_eq!(input.receive(&[0]), Err(Violation));
    }
}
