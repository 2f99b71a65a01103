//! The processes of the guest that are not the agent: one PID namespace, and who is process 1 in it.
//!
//! The agent is process 1 of the machine, outside of that namespace: nothing in the guest can see it, signal it or
//! look into it. It shares its mount namespace, whose root is the image, with the commands, so that starting one takes
//! no call for it and every path the agent looks up ends inside the image.
//!
//! As with `docker run`, the first command is process 1 of the namespace: it costs nothing, images that insist on it
//! (s6, runit) run, and when it ends the kernel ends all others. A guest that outlives its commands asks for a reaper
//! instead, as with `docker run --init`.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::rc::Rc;
use alloc::string::String;
use alloc::vec::Vec;
use core::cell::Cell;

use kiln_protocol::{Argv, Exec, Failed, MAX_CHAIN, WindowSize};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::Pid;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use rustix::thread::ThreadNameSpaceType;

use crate::command::Command;
use crate::failure::{internal, invalid, unusable_directory};
use crate::freezer::Frozen;
use crate::groups::Groups;
use crate::identity::Files;
use crate::signals::{self, SIGKILL, SIGTERM};
use crate::sys::{self, Child, Stage, Start};
use crate::{files, mounts, transfer};

/// Where commands run: what set-up leaves behind.
pub struct Place {
    /// /dev/null, opened before any command could put something else there.
    pub null: OwnedFd,
    /// The directory of the devpts in which terminals are made.
    pub terminals: OwnedFd,
    /// The host name, for HOSTNAME.
    pub hostname: String,
    /// The files that say who the guest is.
    pub identity: Option<Files>,
    /// The groups in which commands are frozen; without any, a guest with commands cannot park.
    pub groups: Option<Groups>,
    /// /dev/urandom, opened before any command could put something else there.
    pub random: OwnedFd,
    /// The root of the writable file system, to be made clean at power-off.
    pub scratch: Option<OwnedFd>,
    /// Process 1 is a reaper of ours.
    pub reaper: bool,
}

/// The commands' namespace and its process 1.
pub(crate) struct Workload {
    pub(crate) place: Place,
    first: First,
    /// The first command is a warm-up: another first one follows it.
    warming: bool,
    /// A command has been started since the namespace is there.
    has_started: bool,
    /// New children of the agent go to the namespace.
    entered: bool,
    /// The namespace has its own /proc.
    proc_mounted: Cell<bool>,
}

/// Process 1 of the namespace.
enum First {
    Missing,
    Reaper(Child),
    /// A command; its session has the child.
    Command(Pid),
    Ended,
}

/// A command that runs, and our ends of its streams.
pub(crate) struct Running {
    pub(crate) child: Child,
    /// It is process 1 of its namespace.
    pub(crate) is_first: bool,
    pub(crate) streams: Streams,
    /// What follows it.
    pub(crate) chain: Option<Chain>,
}

/// Commands that follow one another, and their ends of the streams.
pub(crate) struct Chain {
    commands: VecDeque<Command>,
    theirs: Theirs,
}

impl Chain {
    /// None follows any more.
    pub(crate) fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }
}

/// The agent's ends of a command's streams.
pub(crate) struct Streams {
    /// All is one terminal, of which this is the agent's side.
    pub(crate) terminal: bool,
    pub(crate) stdin: Option<Rc<OwnedFd>>,
    pub(crate) stdout: Option<Rc<OwnedFd>>,
    pub(crate) stderr: Option<Rc<OwnedFd>>,
}

/// The command's ends. Without a stdin it is /dev/null, without stdout the same as stdin, without stderr as stdout.
struct Theirs {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Workload {
    /// A namespace for commands, with its reaper when the place wants one.
    pub(crate) fn new(place: Place) -> Result<Self, Failed> {
        let mut workload = Self {
            place,
            first: First::Missing,
            warming: false,
            has_started: false,
            entered: false,
            proc_mounted: Cell::new(false),
        };
        if workload.place.reaper {
            let reaper = sys::start_reaper().map_err(|error| internal("start the reaper", error))?;
            workload.enter(reaper.pidfd.as_fd())?;
            workload.first = First::Reaper(reaper);
        }
        Ok(workload)
    }

    /// The reaper's end is readable here.
    pub(crate) fn reaper(&self) -> Option<BorrowedFd<'_>> {
        match &self.first {
            First::Reaper(child) => Some(child.pidfd.as_fd()),
            _ => None,
        }
    }

    /// Starts a command; `first` is the process file descriptor of the command that is process 1, when one is.
    pub(crate) fn start(&mut self, exec: Exec, first: Option<BorrowedFd<'_>>) -> Result<Running, Failed> {
        let is_first = match self.first {
            First::Missing => true,
            First::Ended => {
                return Err(invalid(
                    "the guest's first command has ended, and all its processes with it".into(),
                ));
            }
            First::Command(_) if self.warming => {
                return Err(invalid("a warm-up runs, and nothing beside it".into()));
            }
            First::Command(_) if exec.warmup => {
                return Err(invalid(
                    "the guest's first command has started: it is too late to warm up".into(),
                ));
            }
            First::Reaper(_) | First::Command(_) => false,
        };
        let is_warmup = is_first && exec.warmup;
        if !is_first && !self.entered {
            let first = first.ok_or_else(|| invalid("the guest's first command is gone".into()))?;
            self.enter(first)?;
        }
        let (tty, stdin) = (exec.tty, exec.stdin);
        let mut exec = exec;
        let files = core::mem::take(&mut exec.files);
        let followers = self.followers(&mut exec)?;
        let command = Command::prepare(exec, &self.place.hostname)?;
        transfer::stage(&files)?;
        let uid = Uid::from_raw(command.identity.uid);
        let made = match tty {
            Some(size) => self.terminal(uid, size),
            None => pipes(uid, stdin),
        };
        let (streams, theirs) = made.map_err(|error| internal("make the command's streams", error))?;
        let group = self.place.groups.as_ref().map(Groups::commands);
        let child = self.spawn(&command, is_first, tty.is_some(), &theirs, group)?;
        self.has_started = true;
        if is_first {
            self.first = First::Command(child.pid);
            self.warming = is_warmup;
        }
        let chain = (!followers.is_empty()).then_some(Chain { commands: followers, theirs });
        Ok(Running { child, is_first, streams, chain })
    }

    /// The commands that follow a command, made ready.
    fn followers(&self, exec: &mut Exec) -> Result<VecDeque<Command>, Failed> {
        let chain = core::mem::take(&mut exec.chain);
        if chain.is_empty() {
            return Ok(VecDeque::new());
        }
        if chain.len() > MAX_CHAIN {
            return Err(invalid(format!("more than {MAX_CHAIN} commands follow a command")));
        }
        if exec.tty.is_some() || !matches!(self.first, First::Reaper(_)) {
            // A terminal hangs up with its session's first process, as a namespace ends with its own.
            return Err(invalid(
                "commands can follow one another without a terminal, and beside a reaper".into(),
            ));
        }
        let follower =
            |argv: Argv| Command::prepare(Exec { argv: argv.words, ..exec.clone() }, &self.place.hostname);
        chain.into_iter().map(follower).collect()
    }

    /// Starts the next command of a chain, which has one.
    pub(crate) fn start_next(&self, chain: &mut Chain) -> Result<Child, Failed> {
        let command = chain.commands.pop_front().ok_or_else(|| invalid("no command follows".into()))?;
        let group = self.place.groups.as_ref().map(Groups::commands);
        self.spawn(&command, false, false, &chain.theirs, group)
    }

    fn spawn(
        &self,
        command: &Command,
        is_first: bool,
        terminal: bool,
        theirs: &Theirs,
        control_group: Option<BorrowedFd<'_>>,
    ) -> Result<Child, Failed> {
        let groups: Vec<Gid> = command.identity.groups.iter().copied().map(Gid::from_raw).collect();
        let stdin = theirs.stdin.as_ref().unwrap_or(&self.place.null);
        let stdout = theirs.stdout.as_ref().unwrap_or(stdin);
        let stderr = theirs.stderr.as_ref().unwrap_or(stdout);
        let mut start = Start {
            stdio: [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
            terminal,
            prepare: (!self.proc_mounted.get()).then_some(mounts::proc as fn() -> Result<(), Errno>),
            control_group,
            groups: &groups,
            gid: Gid::from_raw(command.identity.gid),
            uid: Uid::from_raw(command.identity.uid),
            directory: &command.directory,
            programs: &command.programs,
            arguments: &command.arguments,
            environment: &command.environment,
        };
        let mut started = sys::start(&start, is_first);
        let late;
        if let (Err((Stage::Clone, Errno::BUSY | Errno::OPNOTSUPP)), Some(groups)) =
            (&started, &self.place.groups)
        {
            late = groups.late().map_err(|error| internal("make a control group", error))?;
            start.control_group = Some(late.as_fd());
            started = sys::start(&start, is_first);
        }
        if matches!(started, Err((Stage::Directory, Errno::NOENT))) {
            self.undo_prepare(is_first, Stage::Directory);
            let directory = command.directory.to_string_lossy();
            files::make_directories(&directory).map_err(|error| unusable_directory(&directory, error))?;
            started = sys::start(&start, is_first);
        }
        match started {
            Ok(child) => {
                self.proc_mounted.set(true);
                Ok(child)
            }
            Err(failure) => {
                self.undo_prepare(is_first, failure.0);
                Err(command.explain(failure))
            }
        }
    }

    /// Takes back what a command that failed at `stage` had mounted: the /proc of a namespace that ended with it. In
    /// a namespace that goes on, it stays.
    fn undo_prepare(&self, is_first: bool, stage: Stage) {
        if self.proc_mounted.get() || matches!(stage, Stage::Clone | Stage::Prepare) {
            return;
        }
        if is_first {
            mounts::undo_proc();
        } else {
            self.proc_mounted.set(true);
        }
    }

    fn terminal(&self, uid: Uid, size: WindowSize) -> Result<(Streams, Theirs), Errno> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let ours = rustix::fs::openat(&self.place.terminals, "ptmx", flags, Mode::empty())?;
        rustix::pty::unlockpt(&ours)?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let stdin = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
        resize(&ours, size)?;
        give(&stdin, uid)?;
        let ours = Rc::new(ours);
        let streams =
            Streams { terminal: true, stdin: Some(Rc::clone(&ours)), stdout: Some(ours), stderr: None };
        Ok((streams, Theirs { stdin: Some(stdin), stdout: None, stderr: None }))
    }

    fn enter(&mut self, first: BorrowedFd<'_>) -> Result<(), Failed> {
        // A namespace whose process 1 has just ended is refused here; nothing started then.
        rustix::thread::move_into_thread_name_spaces(first, ThreadNameSpaceType::PROCESS_ID)
            .map_err(|error| internal("enter the commands' namespace", error))?;
        self.entered = true;
        Ok(())
    }

    /// Says that the command that was process 1 has been reaped.
    pub(crate) fn first_has_ended(&mut self) {
        if core::mem::take(&mut self.warming) {
            self.first = First::Missing;
            self.forget_proc();
        } else {
            self.first = First::Ended;
        }
    }

    /// Starts a hook, as root, with nothing to read and nobody who reads: beside the commands there are, or alone in a
    /// namespace that ends with it. [`hook_has_ended`](Self::hook_has_ended) follows.
    pub(crate) fn start_hook(
        &mut self,
        exec: Exec,
        first: Option<BorrowedFd<'_>>,
        control_group: Option<BorrowedFd<'_>>,
    ) -> Result<Child, Failed> {
        let alone = match self.first {
            First::Missing => true,
            First::Ended => return Err(invalid("the guest's first command has ended".into())),
            First::Reaper(_) | First::Command(_) => false,
        };
        if !alone && !self.entered {
            let first = first.ok_or_else(|| invalid("the guest's first command is gone".into()))?;
            self.enter(first)?;
        }
        let command = Command::prepare(exec, &self.place.hostname)?;
        let streams = Theirs { stdin: None, stdout: None, stderr: None };
        self.spawn(&command, alone, false, &streams, control_group)
    }

    /// Says that a hook has been reaped.
    pub(crate) fn hook_has_ended(&mut self) {
        if matches!(self.first, First::Missing) {
            self.forget_proc();
        }
    }

    /// Takes away the /proc of a namespace that is gone, and that another follows.
    fn forget_proc(&self) {
        if self.proc_mounted.replace(false) {
            mounts::undo_proc();
        }
    }

    /// Stops every process of the guest's.
    ///
    /// # Errors
    /// When one does not stop, and then all go on; or when there is no way to stop any.
    pub(crate) fn freeze(&self) -> Result<Frozen, Failed> {
        if self.is_empty() || !self.has_started {
            return Ok(Frozen::default());
        }
        match &self.place.groups {
            Some(groups) => groups.freeze(),
            None => Err(invalid("the guest's kernel has no control groups to stop its processes by".into())),
        }
    }

    /// Reaps the reaper, if it has ended.
    pub(crate) fn reap_reaper(&mut self) {
        if let First::Reaper(child) = &self.first
            && !matches!(sys::reap(child.pid, false), Ok(None))
        {
            self.first = First::Ended;
        }
    }

    /// Whether no process is left.
    pub(crate) fn is_empty(&self) -> bool {
        matches!(self.first, First::Missing | First::Ended)
    }

    /// Asks every process to end, through the reaper. Whether a command is process 1 instead, which its session asks, as
    /// `docker stop` does.
    pub(crate) fn ask_to_end(&self) -> bool {
        if let First::Reaper(child) = &self.first {
            let _ = sys::signal(child.pid, false, SIGTERM);
        }
        matches!(self.first, First::Command(_))
    }

    /// Sends a signal to every process, through the reaper. Whether a command is process 1 instead, which its session signals.
    pub(crate) fn signal_all(&self, number: u32) -> Result<bool, Failed> {
        if !signals::exists(number) {
            return Err(invalid("a signal is a number from 1 to 64".into()));
        }
        match &self.first {
            First::Command(_) => Ok(true),
            First::Reaper(child) => sys::signal_all(child.pid, number)
                .map(|()| false)
                .map_err(|error| internal("send a signal", error)),
            First::Missing | First::Ended => Err(invalid("the guest has no processes to signal".into())),
        }
    }

    /// Says that no command is left that the agent started: the reaper ends when its own, the orphans, have.
    pub(crate) fn end_with_orphans(&self) {
        if let First::Reaper(child) = &self.first {
            let _ = sys::signal(child.pid, false, sys::END_WITH_ORPHANS);
        }
    }

    /// Ends every process: the kernel kills a namespace with its process 1.
    pub(crate) fn end(&self) {
        if let First::Command(pid) | First::Reaper(Child { pid, .. }) = &self.first {
            let _ = sys::signal(*pid, false, SIGKILL);
        }
    }
}

/// Sets a terminal's size; sizes are 16 bits.
pub(crate) fn resize(terminal: impl AsFd, size: WindowSize) -> Result<(), Errno> {
    let small = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
    let size = Winsize { ws_row: small(size.rows), ws_col: small(size.columns), ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size)
}

fn pipes(uid: Uid, stdin: bool) -> Result<(Streams, Theirs), Errno> {
    let (our_stdin, their_stdin) = if stdin {
        let (theirs, ours) = pipe(uid)?;
        rustix::fs::fcntl_setfl(&ours, OFlags::NONBLOCK)?;
        (Some(Rc::new(ours)), Some(theirs))
    } else {
        (None, None)
    };
    let (our_stdout, their_stdout) = pipe(uid)?;
    let (our_stderr, their_stderr) = pipe(uid)?;
    for ours in [&our_stdout, &our_stderr] {
        rustix::fs::fcntl_setfl(ours, OFlags::NONBLOCK)?;
    }
    let streams = Streams {
        terminal: false,
        stdin: our_stdin,
        stdout: Some(Rc::new(our_stdout)),
        stderr: Some(Rc::new(our_stderr)),
    };
    Ok((streams, Theirs { stdin: their_stdin, stdout: Some(their_stdout), stderr: Some(their_stderr) }))
}

/// A pipe whose reading end comes first, and which its user may open again by /dev/stdout and the like.
fn pipe(uid: Uid) -> Result<(OwnedFd, OwnedFd), Errno> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    give(&read, uid)?;
    Ok((read, write))
}

fn give(stream: &OwnedFd, uid: Uid) -> Result<(), Errno> {
    if uid == Uid::ROOT { Ok(()) } else { rustix::fs::fchown(stream, Some(uid), None) }
}
