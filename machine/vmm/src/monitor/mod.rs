//! The monitor program: one process, one machine.
//!
//! ```text
//! host                          monitor
//!  │ Files …, Start + files       │  check all of it, make the machine, enter the guest
//!  │─────────────────────────────▶│
//!  │◀───────────────────── Booted │
//!  │◀────────────────────── Ready │  the agent listens
//!  │ Connect + socket …           │  → vsock
//!  │─────────────────────────────▶│
//!  │◀────────────────────── Ended │  and the process is gone
//! ```
//!
//! When the host's end of the channel closes, for whatever reason, the process ends at once and its machine with it, so
//! there is nothing to clean up after a host that died.

mod plan;
mod probe;

use std::error::Error;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kiln_control::{
    Blame, Booted, Channel, ChannelError, Command, Connect, Do, EndReason, Ended, Event, Failed, Happened,
    MAX_START_FDS, Ready, Start,
};
use kiln_hypervisor::{Hypervisor, Kvm};
use kiln_virtio::{Device, Rng, Vsock, VsockPorts};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::boot::{self, BootError};
use crate::clock::{Nanoseconds, monotonic};
use crate::console::Console;
use crate::devices::power;
use crate::machine::{Machine, Notice, StartError};
use crate::shell::{Shell, ShellError};
use plan::Plan;

pub use probe::PROBE_ARGUMENT;

/// The name by which the program knows that it is a monitor (`argv[0]`).
pub const PROGRAM_NAME: &str = "kiln-monitor";
/// The most of the console that travels with the end of a machine.
const CONSOLE_TAIL_BYTES: usize = 16 << 10;
/// What ends the program when it cannot even speak to its host.
const EXIT_UNUSABLE: u8 = 125;

/// Runs the monitor: with [`PROBE_ARGUMENT`], says what this host can do; otherwise serves the host on descriptor 3.
///
/// To be called first thing in `main`, when `argv[0]` is [`PROGRAM_NAME`].
pub fn main() -> ExitCode {
    let spawned = monotonic();
    if std::env::args().nth(1).as_deref() == Some(PROBE_ARGUMENT) {
        return probe::main();
    }
    let channel = match Channel::inherited() {
        Ok(channel) => Arc::new(channel),
        Err(error) => {
            eprintln!("{PROGRAM_NAME}: no control channel: {error}");
            return ExitCode::from(EXIT_UNUSABLE);
        }
    };
    match serve(&channel, spawned) {
        // The host is gone: nobody is left to report to, and the end of the process ends the machine.
        Err(ChannelError::Closed) | Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{PROGRAM_NAME}: {error}");
            ExitCode::from(EXIT_UNUSABLE)
        }
    }
}

/// The life of one machine. An error is one of the channel.
fn serve(channel: &Arc<Channel>, spawned: Nanoseconds) -> Result<(), ChannelError> {
    let (start, files) = receive_start(channel)?;
    let made = Plan::check(start, files).and_then(|plan| {
        let kvm = Kvm::open().map_err(ShellError::from)?;
        make(&kvm, plan, Reporter::new(channel, spawned))
    });
    match made {
        Ok((machine, ports)) => supervise(channel, machine, &ports),
        Err(failure) => send(channel, Happened::Failed(failure.into())),
    }
}

/// The order for the machine, with all its files.
fn receive_start(channel: &Channel) -> Result<(Start, Vec<OwnedFd>), ChannelError> {
    let mut files = Vec::new();
    loop {
        let (command, beside) = channel.receive::<Command>()?;
        files.extend(beside);
        if files.len() > MAX_START_FDS {
            return Err(ChannelError::Malformed("more files than a machine is made of"));
        }
        match command.call {
            Some(Do::Files(_)) => {}
            Some(Do::Start(start)) => return Ok((start, files)),
            _ => return Err(ChannelError::Malformed("the first command must be Start")),
        }
    }
}

/// Makes the machine and enters the guest.
fn make<H: Hypervisor>(
    hypervisor: &H,
    plan: Plan,
    reporter: Reporter,
) -> Result<(Machine<H>, VsockPorts), Failure> {
    let shell = Shell::create(hypervisor, plan.shape)?;
    let kernel = boot::load_kernel(shell.memory(), &plan.kernel)?;

    let mut devices: Vec<Box<dyn Device>> = plan.disks;
    let (vsock, ports) = Vsock::new(plan.cid);
    devices.push(Box::new(vsock));
    devices.push(Box::new(Rng::new()));

    let entry = boot::prepare(
        shell.memory(),
        &kernel,
        Some(&plan.initramfs),
        plan.shape,
        devices.len(),
        &plan.command_line,
    )?;
    let console =
        Console::new(plan.console).map_err(|error| Failure::host("cannot start the console", &error))?;
    let machine =
        Machine::start(shell, &entry, console, devices, Box::new(move |notice| reporter.report(notice)))?;
    Ok((machine, ports))
}

/// Serves the host until the machine has ended.
fn supervise<H: Hypervisor>(
    channel: &Channel,
    machine: Machine<H>,
    ports: &VsockPorts,
) -> Result<(), ChannelError> {
    while wait(channel, &machine)? == Woken::Command {
        let (command, files) = channel.receive::<Command>()?;
        match command.call {
            Some(Do::Connect(connect)) => connect_port(ports, &connect, files),
            Some(Do::Stop(_)) => machine.stop(),
            Some(_) | None => {
                return Err(ChannelError::Malformed("only Connect and Stop may follow Start"));
            }
        }
    }
    let (end, console) = machine.wait();
    let console = match end.reason {
        EndReason::PowerOff => Vec::new(),
        // A host that gave up on a guest that hangs wants to know where it hung.
        EndReason::Reset | EndReason::Panic | EndReason::Crash | EndReason::Stopped => {
            console.tail(CONSOLE_TAIL_BYTES)
        }
    };
    send(channel, Happened::Ended(Ended { reason: end.reason.into(), detail: end.detail, console }))
}

/// Connects the one socket beside the command to a port of the guest. Whatever goes wrong closes the socket, which is
/// what the host sees.
fn connect_port(ports: &VsockPorts, connect: &Connect, files: Vec<OwnedFd>) {
    let Ok([socket]) = <[OwnedFd; 1]>::try_from(files) else { return };
    if let Err(error) = ports.connect(connect.port, socket) {
        eprintln!("{PROGRAM_NAME}: port {}: {error}", connect.port);
    }
}

/// What ended a wait.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Woken {
    /// There is something to read from the host, perhaps its end.
    Command,
    /// The machine has ended.
    End,
}

/// Waits for the host or the machine's end, whichever comes first; the end first when both are there.
fn wait<H: Hypervisor>(channel: &Channel, machine: &Machine<H>) -> Result<Woken, ChannelError> {
    let ended = machine.ended_fd();
    loop {
        let mut fds = [PollFd::new(&ended, PollFlags::IN), PollFd::new(channel, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[0].revents().is_empty() => return Ok(Woken::End),
            Ok(_) => return Ok(Woken::Command),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Tells the host what a running machine reports.
struct Reporter {
    channel: Arc<Channel>,
    spawned: Nanoseconds,
    agent_started: AtomicU64,
    is_ready: AtomicBool,
}

impl Reporter {
    fn new(channel: &Arc<Channel>, spawned: Nanoseconds) -> Self {
        Self {
            channel: Arc::clone(channel),
            spawned,
            agent_started: AtomicU64::new(0),
            is_ready: AtomicBool::new(false),
        }
    }

    fn report(&self, notice: Notice) {
        let happened = match notice {
            Notice::Entered(at) => Happened::Booted(Booted { spawned_ns: self.spawned.0, entered_ns: at.0 }),
            Notice::Doorbell(power::PHASE_STARTED, at) => {
                // The first ring counts.
                let _ = self.agent_started.compare_exchange(0, at.0, Ordering::Relaxed, Ordering::Relaxed);
                return;
            }
            // Once: a guest that rings on and on must not fill the channel.
            Notice::Doorbell(power::PHASE_READY, at) if !self.is_ready.swap(true, Ordering::Relaxed) => {
                let agent_started_ns = self.agent_started.load(Ordering::Relaxed);
                Happened::Ready(Ready { agent_started_ns, ready_ns: at.0 })
            }
            Notice::Doorbell(..) => return,
        };
        // A host that is gone is noticed by the thread that reads from it.
        let _ = send(&self.channel, happened);
    }
}

fn send(channel: &Channel, happened: Happened) -> Result<(), ChannelError> {
    channel.send(&Event { happened: Some(happened) }, &[])
}

/// Why a machine was not made, and who is to blame.
#[derive(Debug, PartialEq, Eq)]
struct Failure {
    blame: Blame,
    message: String,
    hint: String,
}

impl Failure {
    fn new(blame: Blame, message: impl Into<String>) -> Self {
        Self { blame, message: message.into(), hint: String::new() }
    }

    fn host(what: &str, error: &dyn Error) -> Self {
        Self::new(Blame::Host, format!("{what}: {}", with_causes(error)))
    }

    fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: hint.into(), ..self }
    }
}

impl From<BootError> for Failure {
    fn from(error: BootError) -> Self {
        let blame = if matches!(error, BootError::Read { .. }) { Blame::Host } else { Blame::Caller };
        Self::new(blame, with_causes(&error)).with_hint(error.hint().unwrap_or_default())
    }
}

impl From<ShellError> for Failure {
    fn from(error: ShellError) -> Self {
        let hint = if let ShellError::Hypervisor(error) = &error { hypervisor_hint(error) } else { "" };
        Self::new(Blame::Host, with_causes(&error)).with_hint(hint)
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        Self::new(Blame::Host, with_causes(&error))
    }
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self { blame: failure.blame.into(), message: failure.message, hint: failure.hint }
    }
}

/// What would help against an error of the hypervisor.
fn hypervisor_hint(error: &kiln_hypervisor::Error) -> &'static str {
    use kiln_hypervisor::Error;
    use std::io::ErrorKind;
    match error {
        Error::Open { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
            "add yourself to the group that owns /dev/kvm, usually kvm: sudo usermod -aG kvm $USER, then log in again"
        }
        Error::Open { source, .. } if source.kind() == ErrorKind::NotFound => {
            "enable virtualization in the firmware and load kvm_intel or kvm_amd; in a VM, enable nested virtualization"
        }
        _ => "",
    }
}

/// An error and what caused it, in one line.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors already say their cause.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
