//! The life of one machine, as its host orders it.
//!
//! ```text
//!            Pause, or the guest parks
//!          ┌───────────────────────────▶┐
//! Start ─▶ running ◀─ SaveMemory ...   resting ◀─ SaveMemory, SaveState
//! Restore ─▶ └◀───────────────────────────┘
//!                      Resume
//! ```
//! A second `Restore` takes the guest out of the machine and puts the one of the snapshot in its place. With `stand` it rests until it is
//! resumed.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kiln_control::{
    Channel, ChannelError, Command, Connect, Console, Do, EndReason, Ended, Entered, Happened,
    MAX_CONSOLE_BYTES, Parked, Pause, Paused as PausedEvent, Portion, Restore, Resume, SaveState,
    Saved as SavedEvent, Standing,
};
use kiln_hypervisor::Kvm;
use kiln_memory::Watch;
use kiln_virtio::VsockPorts;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::failure::with_causes;
use super::plan::RestorePlan;
use super::report::{Reporter, send};
use super::{CONSOLE_TAIL_BYTES, PROGRAM_NAME, restore, take_files};
use crate::clock::{Nanoseconds, monotonic};
use crate::control::End;
use crate::live::Saved;
use crate::machine::Machine;
use crate::paused::{MachineState, Parking, Paused};
use crate::shell::ShellError;

/// A machine and who is responsible for it.
pub(super) struct Supervisor<'a> {
    pub(super) channel: &'a Arc<Channel>,
    pub(super) kvm: &'a Kvm,
    pub(super) ports: VsockPorts,
    pub(super) reporter: Arc<Reporter>,
    /// Handed over for the order to come.
    pub(super) files: Vec<OwnedFd>,
    /// What goes with the memory that was last saved of the machine.
    pub(super) live: Option<MachineState>,
    /// What the machine has written since its memory was saved ahead.
    pub(super) ahead: Option<Watch>,
}

/// What a machine does until it has ended.
pub(super) enum State {
    Running(Machine<Kvm>),
    Resting(Paused<Kvm>),
}

/// What comes next: a state, or the end of the machine, as its host is told.
type Next = ControlFlow<Happened, State>;

/// What ended a wait.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Woken {
    /// There is something to read from the host, perhaps its end.
    Command,
    /// The guest has parked itself.
    Parked,
    /// The machine has ended.
    End,
}

impl Supervisor<'_> {
    /// Serves the host until the machine has ended.
    pub(super) fn run(&mut self, mut state: State) -> Result<(), ChannelError> {
        loop {
            let woken = self.wait_for(&state)?;
            let next = match (state, woken) {
                (State::Running(machine), Woken::End) => ended(machine),
                (State::Running(machine), Woken::Parked) => self.rest(machine, None)?,
                (state, _) => {
                    let (command, files) = self.channel.receive::<Command>()?;
                    self.obey(state, command, files)?
                }
            };
            state = match next {
                ControlFlow::Continue(state) => state,
                ControlFlow::Break(last) => return send(self.channel, last),
            };
        }
    }

    fn obey(&mut self, state: State, command: Command, files: Vec<OwnedFd>) -> Result<Next, ChannelError> {
        let ordered = monotonic();
        let call = command.call.ok_or(ChannelError::Malformed("a command that asks for nothing"))?;
        let state = match (call, state) {
            (Do::Stop(_), State::Running(machine) | State::Resting(Paused { machine, .. })) => {
                machine.stop();
                return Ok(ended(machine));
            }
            (Do::Pause(pause), State::Running(machine)) => {
                return self.rest(machine, Some((ordered, pause)));
            }
            (Do::Connect(connect), state) => {
                connect_port(&self.ports, &connect, files);
                state
            }
            (Do::Pause(_), state @ State::Resting(_)) => {
                send(self.channel, Happened::Paused(PausedEvent { took_ns: 0 }))?;
                state
            }
            (Do::Resume(resume), State::Resting(paused)) => self.resume(paused, &resume, ordered)?,
            (Do::SaveMemory(order), state) => self.save_memory(state, order.portion(), files, ordered)?,
            (Do::SaveState(order), state) => self.save_state(state, &order, files, ordered)?,
            (Do::ShowConsole(_), state) => {
                let (State::Running(machine) | State::Resting(Paused { machine, .. })) = &state;
                let tail = machine.console().tail(MAX_CONSOLE_BYTES);
                send(self.channel, Happened::Console(Console { tail }))?;
                state
            }
            (Do::Files(_), state) => {
                take_files(&mut self.files, files)?;
                state
            }
            (Do::Restore(restore), state) => {
                take_files(&mut self.files, files)?;
                return self.renew(state, restore, ordered);
            }
            (Do::Start(_) | Do::Prepare(_), _) => {
                return Err(ChannelError::Malformed("a monitor makes one machine"));
            }
            (Do::Resume(resume), state @ State::Running(_)) if resume.generation.is_none() => {
                // It runs already.
                let [spawned_ns, ordered_ns] = [self.reporter.spawned, ordered].map(|at| at.0);
                let entered = Entered { spawned_ns, ordered_ns, entered_ns: ordered_ns, at_port: false };
                send(self.channel, Happened::Entered(entered))?;
                state
            }
            (Do::Resume(_), State::Running(_)) => {
                return Err(ChannelError::Malformed("mail for a machine that runs"));
            }
        };
        Ok(ControlFlow::Continue(state))
    }

    /// Stops a machine whose host gave the order, at this time, or whose guest has parked it.
    fn rest(&self, machine: Machine<Kvm>, order: Option<(Nanoseconds, Pause)>) -> Result<Next, ChannelError> {
        let mut paused = match machine.pause() {
            Ok(paused) => paused,
            Err(machine) => return Ok(ended(machine)),
        };
        let at = monotonic();
        if order.is_some_and(|(_, pause)| pause.parked) {
            paused.park_at_port();
        }
        if paused.parking() != Parking::None {
            send(self.channel, Happened::Parked(Parked { at_ns: at.0 }))?;
        }
        if let Some((ordered, _)) = order {
            send(self.channel, Happened::Paused(PausedEvent { took_ns: at.0 - ordered.0 }))?;
        }
        Ok(ControlFlow::Continue(State::Resting(paused)))
    }

    fn resume(
        &self,
        mut paused: Paused<Kvm>,
        resume: &Resume,
        ordered: Nanoseconds,
    ) -> Result<State, ChannelError> {
        // Who is parked at its port is told there, by the host.
        if let Some(generation) = resume.generation.as_ref().filter(|_| paused.parking() != Parking::Port) {
            match paused.put_mail(generation) {
                Ok(id) => self.reporter.expect(id),
                Err(_) => return Err(ChannelError::Malformed("a generation that is none")),
            }
        }
        self.enter(paused, ordered)
    }

    /// Ends the guest and puts that of a snapshot in its place, into the same memory and vCPUs.
    fn renew(&mut self, state: State, restore: Restore, ordered: Nanoseconds) -> Result<Next, ChannelError> {
        let files = std::mem::take(&mut self.files);
        let paused = match state {
            State::Resting(paused) => paused,
            State::Running(machine) => match machine.pause() {
                Ok(paused) => paused,
                Err(machine) => return Ok(ended(machine)),
            },
        };
        (self.live, self.ahead) = (None, None);
        let stand = restore.stand;
        let reporter = Reporter::new(self.channel, self.reporter.spawned);
        let restored = RestorePlan::check(restore, files).and_then(|plan| {
            let shell = paused.into_shell().map_err(ShellError::from)?;
            restore::restore(self.kvm, Some(shell), plan, &reporter)
        });
        match restored {
            Ok((paused, ports)) => {
                (self.ports, self.reporter) = (ports, reporter);
                Ok(ControlFlow::Continue(self.begin(paused, stand, ordered)?))
            }
            Err(failure) => Ok(ControlFlow::Break(Happened::Failed(failure.into()))),
        }
    }

    /// Lets a machine run that was restored, unless it is to wait.
    pub(super) fn begin(
        &self,
        paused: Paused<Kvm>,
        stand: bool,
        ordered: Nanoseconds,
    ) -> Result<State, ChannelError> {
        if !stand {
            return self.enter(paused, ordered);
        }
        let [ordered_ns, at_ns] = [ordered, monotonic()].map(|at| at.0);
        send(self.channel, Happened::Standing(Standing { ordered_ns, at_ns }))?;
        Ok(State::Resting(paused))
    }

    /// Lets a machine run that stands still.
    pub(super) fn enter(&self, paused: Paused<Kvm>, ordered: Nanoseconds) -> Result<State, ChannelError> {
        let at_port = paused.parking() == Parking::Port;
        let [spawned_ns, ordered_ns, entered_ns] =
            [self.reporter.spawned, ordered, monotonic()].map(|at| at.0);
        self.reporter.enters(Entered { spawned_ns, ordered_ns, entered_ns, at_port })?;
        // Without its threads the machine has ended, and so does this program.
        let machine = restore::answering(|| paused.resume()).map_err(|error| host_error(&error))?;
        Ok(State::Running(machine))
    }

    fn save_memory(
        &mut self,
        state: State,
        portion: Portion,
        files: Vec<OwnedFd>,
        ordered: Nanoseconds,
    ) -> Result<State, ChannelError> {
        let file = only(files)?;
        self.live = None;
        let mut paused_ns = 0;
        // It is for the order that follows it and no other: the file is another's else.
        let ahead = self.ahead.take().filter(|_| portion == Portion::Rest);
        let (state, failure) = match state {
            State::Resting(mut paused) => {
                let failure = match (paused.save_rest(&file, ahead), paused.save()) {
                    (Ok(()), Ok(state)) => {
                        // So that the machine may go on before it is known what its memory is called.
                        self.live = Some(state);
                        None
                    }
                    (Err(error), _) => Some(format!("cannot write the memory: {error}")),
                    (_, Err(error)) => Some(with_causes(&error)),
                };
                (State::Resting(paused), failure)
            }
            State::Running(machine) if portion == Portion::Ahead => {
                let saved = machine.save_ahead(&file).map(|watch| self.ahead = watch);
                let failure = saved.err().map(|error| format!("cannot write the memory: {error}"));
                (State::Running(machine), failure)
            }
            State::Running(machine) => {
                let (machine, saved) = machine.save_running(&file);
                let state = match machine {
                    Saved::Running(machine) => State::Running(machine),
                    Saved::Parked(paused) => {
                        send(self.channel, Happened::Parked(Parked { at_ns: monotonic().0 }))?;
                        State::Resting(paused)
                    }
                    Saved::Lost => return Err(ChannelError::Io(Errno::AGAIN)),
                };
                let failure = match saved {
                    Ok(live) => {
                        paused_ns = live.pause.as_nanos() as u64;
                        self.live = Some(live.state);
                        None
                    }
                    Err(error) => Some(with_causes(&error)),
                };
                (state, failure)
            }
        };
        self.report_save(failure, ordered, paused_ns)?;
        Ok(state)
    }

    fn save_state(
        &mut self,
        mut state: State,
        order: &SaveState,
        files: Vec<OwnedFd>,
        ordered: Nanoseconds,
    ) -> Result<State, ChannelError> {
        let file = only(files)?;
        // What goes with a memory saved of a running machine is of that instant, whatever the machine does by now.
        let machine = match (self.live.take(), &mut state) {
            (Some(live), _) => Ok(live),
            (None, State::Resting(paused)) => paused.save().map_err(|error| with_causes(&error)),
            (None, State::Running(_)) => Err("the machine's memory was not saved".into()),
        };
        let written = machine.and_then(|machine| {
            restore::save_state(self.kvm, &machine, order, &file).map_err(|failure| failure.message)
        });
        self.report_save(written.err(), ordered, 0)?;
        Ok(state)
    }

    fn report_save(
        &self,
        failure: Option<String>,
        ordered: Nanoseconds,
        paused_ns: u64,
    ) -> Result<(), ChannelError> {
        let took_ns = monotonic().0 - ordered.0;
        let saved = SavedEvent { failure: failure.unwrap_or_default(), took_ns, paused_ns };
        send(self.channel, Happened::Saved(saved))
    }

    /// Waits for the host or the machine, whichever comes first; the machine's end first when both are there.
    fn wait_for(&self, state: &State) -> Result<Woken, ChannelError> {
        let machine = match state {
            State::Running(machine) => machine,
            State::Resting(_) => return Ok(Woken::Command),
        };
        let (ended, parked) = (machine.ended_fd(), machine.parked_fd());
        loop {
            let mut fds = [
                PollFd::new(&ended, PollFlags::IN),
                PollFd::new(&parked, PollFlags::IN),
                PollFd::new(self.channel, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) if !fds[0].revents().is_empty() => return Ok(Woken::End),
                Ok(_) if !fds[1].revents().is_empty() => return Ok(Woken::Parked),
                Ok(_) => return Ok(Woken::Command),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn host_error(error: &std::io::Error) -> ChannelError {
    ChannelError::Io(Errno::from_io_error(error).unwrap_or(Errno::AGAIN))
}

/// The one file beside a command that writes to it.
fn only(files: Vec<OwnedFd>) -> Result<File, ChannelError> {
    let only = <[OwnedFd; 1]>::try_from(files).map(|[file]| File::from(file));
    only.map_err(|_| ChannelError::Malformed("one file is saved to"))
}

fn ended(machine: Machine<Kvm>) -> Next {
    let (End { reason, detail }, console) = machine.wait();
    let console = match reason {
        EndReason::PowerOff => Vec::new(),
        // A host that gave up on a guest that hangs wants to know where it hung.
        EndReason::Reset | EndReason::Panic | EndReason::Crash | EndReason::Stopped => {
            console.tail(CONSOLE_TAIL_BYTES)
        }
    };
    ControlFlow::Break(Happened::Ended(Ended { reason: reason.into(), detail, console }))
}

/// Connects the one socket beside the command to a port of the guest. Whatever goes wrong closes the socket, which is
/// what the host sees.
fn connect_port(ports: &VsockPorts, connect: &Connect, files: Vec<OwnedFd>) {
    let Ok([socket]) = <[OwnedFd; 1]>::try_from(files) else { return };
    if let Err(error) = ports.connect(connect.port, socket) {
        eprintln!("{PROGRAM_NAME}: port {}: {}", connect.port, with_causes(&error));
    }
}
