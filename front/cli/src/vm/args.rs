//! The words of `kiln vm`.
#![allow(rustdoc::broken_intra_doc_links, reason = "these comments are help texts")]

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, Subcommand};
use kiln::detached::State;

use super::copy::Place;
use super::port::Publish;
use crate::args::{CommandFlags, MachineFlags, PullFlags, Pulling};
use crate::quantity::{self, Lines};
use crate::when::{self, UnixNs};

/// `kiln vm`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Vm {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: VmCommand,
}

const EXAMPLES: &str = "\
Examples:
  kiln vm create --name web nginx && kiln vm start web
  kiln exec web -- nginx -T                    a command in it, as often as wanted
  kiln vm fork web --name web-2                a second one that begins where the first is
  kiln vm snapshot web --name warm             kept in the store, to go on from later
  kiln vm restore warm --name web-3
  kiln stop web && kiln rm web

What is done with VMs otherwise needs no `vm`: kiln ps, kiln exec ... A VM is known by its name or
by the start of its id. It belongs to a process of its own, and ends with it: there is no daemon.
One that has ended starts anew, with an empty disk for its changes.";

/// `kiln vm ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Make a VM from an image; it does not run yet
    Create(Box<Create>),
    /// Start VMs
    Start(Names),
    /// Save a VM that runs to the store, and let it go on
    #[command(after_help = SNAPSHOT_EXAMPLES)]
    Snapshot {
        /// Call the snapshot so
        #[arg(long, value_name = "NAME", value_parser = quantity::snapshot_name)]
        name: Option<String>,
        /// Print the outcome as JSON
        #[arg(long)]
        json: bool,
        /// Name or id
        #[arg(value_name = "VM")]
        vm: String,
    },
    /// Make a VM from a snapshot of another, and start it
    Restore {
        /// Call it so; two words by default
        #[arg(long, value_name = "NAME", value_parser = quantity::vm_name)]
        name: Option<String>,
        /// Name, key, or the start of a key
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
    },
    /// Make a second VM from one that runs, as it is now; both go on
    #[command(after_help = FORK_EXAMPLES)]
    Fork {
        /// Call it so; two words by default
        #[arg(long, value_name = "NAME", value_parser = quantity::vm_name)]
        name: Option<String>,
        /// Name or id of the one that runs
        #[arg(value_name = "VM")]
        vm: String,
    },
    /// What needs no `vm` before it.
    #[command(flatten)]
    Verb(Verb),
    /// Be the process that a VM belongs to
    #[command(hide = true)]
    Keep {
        /// The name
        #[arg(value_name = "VM")]
        vm: String,
    },
}

/// What is done with VMs that are there: `kiln ...` and `kiln vm ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List the VMs that run
    #[command(visible_alias = "ls", after_help = PS_EXAMPLES)]
    Ps(Ps),
    /// Run a command in a VM that runs
    Exec(Box<Exec>),
    /// Show what the command of a VM wrote
    #[command(after_help = LOGS_EXAMPLES)]
    Logs(Logs),
    /// Wait until VMs have ended, and print what with
    #[command(after_help = WAIT_EXAMPLES)]
    Wait(Names),
    /// Stop VMs: their command is asked to end, then killed
    #[command(after_help = STOP_EXAMPLES)]
    Stop(Stop),
    /// Stop VMs that run, and start them anew
    #[command(after_help = "Examples:\n  kiln restart web\n  kiln restart -t 1m db")]
    Restart(Stop),
    /// Send the command of VMs a signal; by default the one that ends VMs at once
    #[command(after_help = KILL_EXAMPLES)]
    Kill(Kill),
    /// Stop VMs between two instructions: they keep their memory and take no processor time
    #[command(after_help = "Examples:\n  kiln pause web && kiln resume web")]
    Pause(Names),
    /// Let paused VMs go on
    #[command(visible_alias = "unpause", after_help = "Examples:\n  kiln pause web && kiln resume web")]
    Resume(Names),
    /// Remove VMs that do not run
    #[command(after_help = RM_EXAMPLES)]
    Rm(Rm),
    /// Show how a VM is and what it is made of
    #[command(after_help = "Examples:\n  kiln inspect web\n  kiln inspect --json web | jq .state")]
    Inspect(Inspect),
    /// Copy files and directories into a VM that runs, or out of it
    #[command(after_help = COPY_EXAMPLES)]
    Cp(Copy),
    /// Show what VMs use, measured anew each second
    #[command(after_help = STATS_EXAMPLES)]
    Stats(StatsArgs),
    /// Show what VMs use on a screen
    #[command(after_help = TOP_EXAMPLES)]
    Top,
    /// Publish TCP ports of a VM that runs on this host
    #[command(after_help = EXPOSE_EXAMPLES)]
    Expose(Expose),
    /// List the published ports of a VM
    #[command(after_help = "Examples:\n  kiln port web\n  kiln port --json web | jq -r '.[0].bound'")]
    Port(Port),
    /// Show what happens to VMs, as it happens
    #[command(after_help = EVENTS_EXAMPLES)]
    Events(Events),
}

impl VmCommand {
    /// Its exit code is that of a command.
    pub(crate) fn runs_a_command(&self) -> bool {
        matches!(self, Self::Verb(verb) if verb.runs_a_command())
    }
}

impl Verb {
    /// Its exit code is that of a command.
    pub(crate) fn runs_a_command(&self) -> bool {
        matches!(self, Self::Exec(_) | Self::Wait(_))
    }

    /// The words whose exit code is that of a command.
    pub(crate) const RUN_A_COMMAND: [&str; 2] = ["exec", "wait"];
}

/// VMs by their names.
#[derive(Debug, Args)]
pub(crate) struct Names {
    /// Names or ids
    #[arg(value_name = "VM", required = true)]
    pub(crate) vms: Vec<String>,
}

/// `kiln ps`.
#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// List also those that do not run
    #[arg(short, long)]
    pub(crate) all: bool,
    /// List those for which this holds, whether they run or not: status=STATE or name=PART
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) filter: Vec<Filter>,
    /// Print as JSON: one array of objects
    #[arg(long)]
    pub(crate) json: bool,
}

const PS_EXAMPLES: &str = "\
Examples:
  kiln ps -a
  kiln rm $(kiln ps -aq --filter status=ended)
  kiln ps --json | jq -r '.[].name'

States are created, running, paused and ended. With -q, ids alone are printed.";

/// What a VM is listed for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Filter {
    /// It is so.
    Status(State),
    /// Its name has this in it.
    Name(String),
}

impl std::str::FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("name", part)) => Ok(Self::Name(part.to_owned())),
            Some(("status", state)) => match state {
                "created" => Ok(Self::Status(State::Created)),
                "running" => Ok(Self::Status(State::Running)),
                "paused" => Ok(Self::Status(State::Paused)),
                "ended" | "exited" => Ok(Self::Status(State::Ended)),
                _ => Err(format!("there is no state '{state}': created, running, paused or ended")),
            },
            _ => Err("expected status=STATE or name=PART".to_owned()),
        }
    }
}

/// `kiln logs`.
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Go on until the VM ends
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Begin so many lines before the end; 'all' for all
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", value_parser = quantity::lines)]
    pub(crate) tail: Lines,
    /// Begin at this time (2026-01-31T12:00:00Z, or seconds since 1970) or so long ago (10m)
    #[arg(long, value_name = "TIME", value_parser = when::parse)]
    pub(crate) since: Option<UnixNs>,
    /// Begin each line with the time at which it arrived
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Name or id
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
}

const LOGS_EXAMPLES: &str = "\
Examples:
  kiln logs web
  kiln logs -f --tail 10 web                   go on until it ends, or Ctrl-C
  kiln logs --since 5m -t web 2>/dev/null      its stdout alone, with times

What the command wrote to stdout is printed there, and what it wrote to stderr there. The last 16
MiB at least are kept, 32 MiB at most; how much is missing is said on stderr.";

const WAIT_EXAMPLES: &str = "\
Examples:
  kiln run -d --name job app:1 && kiln wait job

Prints, for each VM in its turn, the exit code of its command: the command's own, 128+n when signal
n ended it, 124 when its time was up; 137 too when the VM was killed. Ends with the last that is not
0.";

/// `kiln stop`.
#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// How long it has to end
    #[arg(short, long, value_name = "TIME", default_value = "10s", value_parser = quantity::duration)]
    pub(crate) time: Duration,
    /// Names or ids
    #[arg(value_name = "VM", required = true)]
    pub(crate) vms: Vec<String>,
}

const STOP_EXAMPLES: &str = "\
Examples:
  kiln stop web
  kiln stop -t 1m db

The command of the VM gets its image's stop signal (SIGTERM by default), and SIGKILL when its time
is up. In a VM without one, all processes do.";

/// `kiln kill`.
#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// The signal: a name or a number
    #[arg(short, long, value_name = "SIGNAL", default_value = "KILL", value_parser = quantity::signal)]
    pub(crate) signal: u8,
    /// Names or ids
    #[arg(value_name = "VM", required = true)]
    pub(crate) vms: Vec<String>,
}

const KILL_EXAMPLES: &str = "\
Examples:
  kiln kill web
  kiln kill -s HUP web                         many servers read their configuration again

SIGKILL ends the VM as pulling the plug would. Another signal is for the command of the VM: one that
was started by `kiln run -d`.";

/// `kiln rm`.
#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// End them first if they run
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Names or ids
    #[arg(value_name = "VM", required = true)]
    pub(crate) vms: Vec<String>,
}

const RM_EXAMPLES: &str = "\
Examples:
  kiln rm web
  kiln rm -f web db                            also when they run
  kiln rm $(kiln ps -aq --filter status=ended)";

/// `kiln inspect`.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Print as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Name or id
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
}

/// `kiln cp`.
#[derive(Debug, Args)]
pub(crate) struct Copy {
    /// Into a VM: files keep their user and group ids; otherwise they are root's
    #[arg(short = 'a', long)]
    pub(crate) keep_owner: bool,
    /// What is copied: PATH, VM:PATH, or - for one file from stdin
    #[arg(value_name = "FROM")]
    pub(crate) from: Place,
    /// Where to: VM:PATH, PATH, or - for one file to stdout
    #[arg(value_name = "TO")]
    pub(crate) to: Place,
}

const COPY_EXAMPLES: &str = "\
Examples:
  kiln cp app.conf web:/etc/app.conf
  kiln cp -q web:/var/log ./logs               a directory, as ./logs or into it
  kiln cp ./site/. web:/srv/www                what is in it
  kiln cp web:/etc/hosts - | grep web

Names follow `docker cp`. Links are copied as links. What comes out of a VM is the caller's, without
set-id bits; devices, fifos and sockets are left out. How much was copied is said on stderr.";

/// `kiln stats`.
#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Print it once: processor time since the VM started
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Print as JSON: one object a line
    #[arg(long)]
    pub(crate) json: bool,
    /// Names or ids; all that run by default
    #[arg(value_name = "VM")]
    pub(crate) vms: Vec<String>,
}

const STATS_EXAMPLES: &str = "\
Examples:
  kiln stats                                   until Ctrl-C
  kiln stats --no-stream web db
  kiln stats --json web | jq .cpu_percent

CPU is of one processor of this host, MEMORY what the guest uses of what it has, ON HOST what would
be free here without the VM.";

const TOP_EXAMPLES: &str = "\
Examples:
  kiln top

Keys: c, m, p and n sort by processor time, memory, processes and name; q quits. The bars are the
processor time of the last measurements, of all that the VM may have.";

/// `kiln expose`.
#[derive(Debug, Args)]
pub(crate) struct Expose {
    /// Publish them no more
    #[arg(long)]
    pub(crate) remove: bool,
    /// Name or id
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// Ports: the host's, or none for one that is free, and the guest's; 127.0.0.1 unless an address is given
    #[arg(value_name = "[[ADDRESS:]HOST:]GUEST", required = true)]
    pub(crate) ports: Vec<Publish>,
}

const EXPOSE_EXAMPLES: &str = "\
Examples:
  kiln expose web 8080:80
  curl http://$(kiln expose web 80)/           at a port that is free
  kiln expose db 0.0.0.0:5432:5432             for everybody who reaches this host
  kiln expose --remove web 8080:80

Prints where each is reached. The VM needs no network: connections go by way of Kiln to the guest's
own loopback addresses. Nothing of a VM is reached that was not published. It is published again
when the VM starts anew.";

/// `kiln port`.
#[derive(Debug, Args)]
pub(crate) struct Port {
    /// Print as JSON: one array of objects
    #[arg(long)]
    pub(crate) json: bool,
    /// Name or id
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
}

/// `kiln events`.
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Begin at this time (2026-01-31T12:00:00Z, or seconds since 1970) or so long ago (10m), and not now
    #[arg(long, value_name = "TIME", value_parser = when::parse)]
    pub(crate) since: Option<UnixNs>,
    /// End with what has happened
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Print as JSON: one object a line
    #[arg(long)]
    pub(crate) json: bool,
}

const EVENTS_EXAMPLES: &str = "\
Examples:
  kiln events                                  until Ctrl-C
  kiln events --since 1h --no-stream
  kiln events --json | jq 'select(.event == \"die\") | .details.exit_code'

Events are create, start, pause, resume, exec_start, exec_end, expose, unexpose, kill, stop,
snapshot, fork, die and destroy. The last 4 MiB of them are kept at least, for all VMs together.";

const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  kiln vm snapshot web --name warm
  kiln vm restore warm --name web-2
  kiln run snapshot:warm -- cat /etc/hostname  a command in a fresh VM made from it

Prints the snapshot's key. The VM's processes are frozen while its memory and disk are written; how
long that took is said on stderr.";

const FORK_EXAMPLES: &str = "\
Examples:
  kiln vm fork web --name web-2

The second VM has its own disk, host name, machine id, boot id and random numbers, and its clock is
right. What runs in the first runs in both; connections and `kiln exec` stay with the first.";

/// `kiln vm create`.
#[derive(Debug, Args)]
#[command(after_help = CREATE_EXAMPLES, mut_arg("init", |arg| arg.hide(true)))]
pub(crate) struct Create {
    /// Call it so; two words by default
    #[arg(long, value_name = "NAME", value_parser = quantity::vm_name)]
    pub(crate) name: Option<String>,
    /// Publish a TCP port of the guest, as `kiln expose` does
    #[arg(short, long, value_name = "[[ADDRESS:]HOST:]GUEST")]
    pub(crate) publish: Vec<Publish>,
    /// What machine.
    #[command(flatten)]
    pub(crate) machine: MachineFlags,
    /// Where the image comes from.
    #[command(flatten)]
    pub(crate) source: PullFlags,
    /// When to ask the registry: missing, always or never
    #[arg(long, value_name = "WHEN", default_value = "missing", hide_possible_values = true)]
    pub(crate) pull: Pulling,
    /// The image: a name as Docker's, oci-layout:DIR[:TAG], oci-archive:FILE or docker-archive:FILE
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
}

const CREATE_EXAMPLES: &str = "\
Examples:
  kiln vm create --name db --memory 2g --cpus 2 postgres:17
  kiln vm start db
  kiln exec db -- psql --version

Prints the VM's name. It runs no command of its image by itself: `kiln exec` says what it does. For
one that does, see `kiln run -d`.";

/// `kiln exec`.
#[derive(Debug, Args)]
#[command(after_help = EXEC_EXAMPLES, override_usage = "kiln exec [OPTIONS] VM [--] COMMAND...")]
pub(crate) struct Exec {
    /// Leave the command running: nothing of what it writes is shown or kept
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub(crate) detach: bool,
    /// How the command runs.
    #[command(flatten)]
    pub(crate) flags: CommandFlags,
    /// Kill the command when it runs longer than this (30s, 5m, 1h30m); exit code 124
    #[arg(long, value_name = "TIME", value_parser = quantity::duration)]
    pub(crate) timeout: Option<Duration>,
    /// Name or id
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub(crate) command: Vec<OsString>,
}

const EXEC_EXAMPLES: &str = "\
Examples:
  kiln exec web -- ps
  kiln exec -it web sh                      a shell with a terminal
  kiln exec -d web -- sh -c 'sleep 60; nginx -s reload'
  tar c src | kiln exec -i -w /srv web tar x

Environment, user and directory are the image's unless given. Exit codes and signals are those of
`kiln run`, except that the VM goes on: the third SIGINT ends the command and not the VM.";
