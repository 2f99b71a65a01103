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
//! `Restore` in the place of `Start` makes the machine of a snapshot; `Prepare` before it makes ahead what is the same whatever
//! the snapshot. `supervise.rs` has what can be ordered of a machine that is there.
//!
//! Before it reads a byte from anybody, it enters its jail (`kiln_jail`).
//!
//! When the host's end of the channel closes, for whatever reason, the process ends at once and its machine with it, so
//! there is nothing to clean up after a host that died.

mod failure;
mod plan;
mod probe;
mod report;
mod restore;
mod supervise;

use std::io::stdin;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;

use kiln_control::{
    Blame, Channel, ChannelError, Command, Do, Happened, MAX_START_FDS, Prepare, Prepared, Restore, Start,
};
use kiln_hypervisor::Kvm;
use kiln_jail::Jailed;

use crate::boot;
use crate::clock::{Nanoseconds, monotonic};
use crate::console::Console;
use crate::host;
use crate::machine::Machine;
use crate::shell::{Shape, Shell, ShellError};
use failure::{Failure, with_causes};
use plan::{BootPlan, Devices, RestorePlan};
use report::{Reporter, send};
use supervise::{State, Supervisor};

pub use probe::PROBE_ARGUMENT;

/// The name by which the program knows that it is a monitor (`argv[0]`).
pub const PROGRAM_NAME: &str = "kiln-monitor";
/// The most of the console that travels with the end of a machine.
const CONSOLE_TAIL_BYTES: usize = 16 << 10;
/// What ends the program when it cannot even speak to its host.
const EXIT_UNUSABLE: u8 = 125;

/// Runs the monitor: with [`PROBE_ARGUMENT`], says what this host can do; otherwise serves the host on standard input.
///
/// To be called first thing in `main`, when `argv[0]` is [`PROGRAM_NAME`].
pub fn main() -> ExitCode {
    let spawned = monotonic();
    if std::env::args().nth(1).as_deref() == Some(PROBE_ARGUMENT) {
        return probe::main();
    }
    let unusable = |what: &str, why: &dyn std::error::Error| {
        eprintln!("{PROGRAM_NAME}: {what}: {}", with_causes(why));
        ExitCode::from(EXIT_UNUSABLE)
    };
    let Jailed { prepared: kvm, stdin } = match kiln_jail::enter(prepare) {
        Ok(jailed) => jailed,
        Err(error) => {
            let failure = Failure::host("cannot jail the machine's process", &error).with_hint(error.hint());
            if let Ok(channel) = stdin().as_fd().try_clone_to_owned().and_then(Channel::inherited) {
                // A host that has gone needs no word.
                let _ = refuse(&channel, failure);
            }
            return unusable("no jail", &error);
        }
    };
    let channel = match Channel::inherited(stdin) {
        Ok(channel) => Arc::new(channel),
        Err(error) => return unusable("no control channel", &error),
    };
    match serve(&channel, kvm, spawned) {
        // The host is gone: nobody is left to report to, and the end of the process ends the machine.
        Err(ChannelError::Closed) | Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{PROGRAM_NAME}: {error}");
            ExitCode::from(EXIT_UNUSABLE)
        }
    }
}

/// Gets at all that a machine needs and that is not in the jail: the host's KVM, of the descriptor it gave for it, and what of
/// this process and this host is only to be had from files.
fn prepare(files: Vec<OwnedFd>) -> Result<Kvm, Failure> {
    host::is_pvm();
    kiln_memory::open_page_map()
        .map_err(|error| Failure::host("cannot open this process's page table", &error))?;
    Ok(Kvm::from_device(device(files)?).map_err(ShellError::from)?)
}

/// The one descriptor beside the standard streams: /dev/kvm.
fn device(files: Vec<OwnedFd>) -> Result<OwnedFd, Failure> {
    let only = <[OwnedFd; 1]>::try_from(files).map(|[device]| device);
    only.map_err(|files| Failure::new(Blame::Kiln, format!("{} devices were given, not one", files.len())))
}

/// The life of one machine. An error is one of the channel.
fn serve(
    channel: &Arc<Channel>,
    kvm: Result<Kvm, Failure>,
    spawned: Nanoseconds,
) -> Result<(), ChannelError> {
    let mut ahead = Ahead { channel, kvm: &kvm, shell: None };
    let received = ahead.receive_order();
    let shell = ahead.shell;
    let (order, files) = match received {
        Ok(order) => order,
        Err(Unserved::Channel(error)) => return Err(error),
        Err(Unserved::Failed(failure)) => return refuse(channel, failure),
    };
    let ordered = monotonic();
    let reporter = Reporter::new(channel, spawned);
    let kvm = match kvm {
        Ok(kvm) => kvm,
        Err(failure) => return refuse(channel, failure),
    };
    let supervisor = |ports| Supervisor {
        channel,
        kvm: &kvm,
        ports,
        reporter: Arc::clone(&reporter),
        files: Vec::new(),
        live: None,
        ahead: None,
    };
    match order {
        Order::Start(start) => {
            match BootPlan::check(start, files).and_then(|plan| boot(&kvm, plan, &reporter)) {
                Ok((machine, ports)) => supervisor(ports).run(State::Running(machine)),
                Err(failure) => refuse(channel, failure),
            }
        }
        Order::Restore(restore) => {
            let stand = restore.stand;
            let restored = RestorePlan::check(restore, files)
                .and_then(|plan| restore::restore(&kvm, shell, plan, &reporter));
            match restored {
                Ok((paused, ports)) => {
                    let mut supervisor = supervisor(ports);
                    let state = supervisor.begin(paused, stand, ordered)?;
                    supervisor.run(state)
                }
                Err(failure) => refuse(channel, failure),
            }
        }
    }
}

/// What a monitor is for.
enum Order {
    Start(Start),
    Restore(Restore),
}

/// A monitor that has no machine yet.
struct Ahead<'a> {
    channel: &'a Channel,
    kvm: &'a Result<Kvm, Failure>,
    shell: Option<Shell<Kvm>>,
}

/// Why there is no order for a machine.
enum Unserved {
    Channel(ChannelError),
    Failed(Failure),
}

impl From<ChannelError> for Unserved {
    fn from(error: ChannelError) -> Self {
        Self::Channel(error)
    }
}

impl Ahead<'_> {
    /// The order for the machine, with all its files.
    fn receive_order(&mut self) -> Result<(Order, Vec<OwnedFd>), Unserved> {
        let mut files = Vec::new();
        loop {
            let (command, beside) = self.channel.receive::<Command>()?;
            take_files(&mut files, beside)?;
            match command.call {
                Some(Do::Files(_)) => {}
                Some(Do::Start(start)) => return Ok((Order::Start(start), files)),
                Some(Do::Restore(restore)) => return Ok((Order::Restore(restore), files)),
                Some(Do::Prepare(order)) if self.shell.is_none() => self.prepare(order)?,
                _ => {
                    let broken =
                        ChannelError::Malformed("the first command must be Prepare, Start or Restore");
                    return Err(broken.into());
                }
            }
        }
    }

    /// Makes a shell ahead of its use.
    fn prepare(&mut self, order: Prepare) -> Result<(), Unserved> {
        let kvm = self.kvm.as_ref().map_err(|failure| Unserved::Failed(failure.clone()))?;
        let shell = Shape::new(order.memory_mib, order.vcpus)
            .map_err(Failure::from)
            .and_then(|shape| Ok(Shell::create(kvm, shape)?));
        self.shell = Some(shell.map_err(Unserved::Failed)?);
        // Which is known then when the order comes.
        restore::class(kvm).map_err(Unserved::Failed)?;
        Ok(send(self.channel, Happened::Prepared(Prepared { at_ns: monotonic().0 }))?)
    }
}

/// Adds the files beside a packet to those of the order to come.
fn take_files(files: &mut Vec<OwnedFd>, beside: Vec<OwnedFd>) -> Result<(), ChannelError> {
    files.extend(beside);
    if files.len() > MAX_START_FDS {
        return Err(ChannelError::Malformed("more files than a machine is made of"));
    }
    Ok(())
}

fn refuse(channel: &Channel, failure: Failure) -> Result<(), ChannelError> {
    send(channel, Happened::Failed(failure.into()))
}

/// Bounds this process to what a machine of this shape needs, whose largest disk has so many bytes.
fn confine(shape: Shape, disk_bytes: u64) -> Result<(), Failure> {
    let memory_bytes = shape.memory_bytes();
    // Besides its disks it writes what is saved of its memory.
    kiln_jail::confine(memory_bytes, disk_bytes.max(memory_bytes))
        .map_err(|error| Failure::host("cannot bound this process", &error))
}

/// Makes the machine and enters the guest.
fn boot(
    kvm: &Kvm,
    plan: BootPlan,
    reporter: &Arc<Reporter>,
) -> Result<(Machine<Kvm>, kiln_virtio::VsockPorts), Failure> {
    confine(plan.shape, plan.devices.writable_bytes)?;
    let shell = Shell::create(kvm, plan.shape)?;
    let kernel = boot::load_kernel(shell.memory(), &plan.kernel)?;
    let Devices { virtio, ports, .. } = plan.devices;
    let entry = boot::prepare(
        shell.memory(),
        &kernel,
        Some(&plan.initramfs),
        plan.shape,
        virtio.len(),
        &plan.command_line,
    )?;
    let console =
        Console::new(plan.console).map_err(|error| Failure::host("cannot start the console", &error))?;
    reporter.watches(shell.memory());
    reporter.listens(&ports);
    Ok((Machine::start(shell, &entry, console, virtio, reporter.observer())?, ports))
}
