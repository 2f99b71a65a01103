//! The words of `kiln vm`.
#![allow(rustdoc::broken_intra_doc_links, reason = "these comments are help texts")]

use std::ffi::OsString;
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::args::{CommandFlags, MachineFlags, PullFlags, Pulling};
use crate::quantity;

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
  kiln vm exec web -- nginx -T                 a command in it, as often as wanted
  kiln vm fork web --name web-2                a second one that begins where the first is
  kiln vm snapshot web --name warm             kept in the store, to go on from later
  kiln vm restore warm --name web-3
  kiln vm stop web && kiln vm rm web

A VM is known by its name or by the start of its id. It belongs to a process of its own, and ends
with it: there is no daemon. One that has ended starts anew, with an empty disk for its changes.";

/// `kiln vm ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Make a VM from an image; it does not run yet
    Create(Box<Create>),
    /// Start VMs
    Start {
        /// Names or ids
        #[arg(value_name = "VM", required = true)]
        vms: Vec<String>,
    },
    /// List the VMs that run
    Ls {
        /// List also those that do not run
        #[arg(short, long)]
        all: bool,
        /// Print as JSON: one array of objects
        #[arg(long)]
        json: bool,
    },
    /// Show how a VM is and what it is made of
    Inspect {
        /// Print as JSON
        #[arg(long)]
        json: bool,
        /// Name or id
        #[arg(value_name = "VM")]
        vm: String,
    },
    /// Run a command in a VM that runs
    Exec(Box<Exec>),
    /// Stop VMs between two instructions: they keep their memory and take no processor time
    Pause {
        /// Names or ids
        #[arg(value_name = "VM", required = true)]
        vms: Vec<String>,
    },
    /// Let paused VMs go on
    Resume {
        /// Names or ids
        #[arg(value_name = "VM", required = true)]
        vms: Vec<String>,
    },
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
        /// Call it so; its id by default
        #[arg(long, value_name = "NAME", value_parser = quantity::vm_name)]
        name: Option<String>,
        /// Name, key, or the start of a key
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
    },
    /// Make a second VM from one that runs, as it is now; both go on
    #[command(after_help = FORK_EXAMPLES)]
    Fork {
        /// Call it so; its id by default
        #[arg(long, value_name = "NAME", value_parser = quantity::vm_name)]
        name: Option<String>,
        /// Name or id of the one that runs
        #[arg(value_name = "VM")]
        vm: String,
    },
    /// Stop VMs: their processes are asked to end (SIGTERM), then killed
    Stop {
        /// How long processes have to end
        #[arg(short, long, value_name = "TIME", default_value = "10s", value_parser = quantity::duration)]
        time: Duration,
        /// Names or ids
        #[arg(value_name = "VM", required = true)]
        vms: Vec<String>,
    },
    /// Remove VMs that do not run
    Rm {
        /// End them first if they run
        #[arg(short, long)]
        force: bool,
        /// Names or ids
        #[arg(value_name = "VM", required = true)]
        vms: Vec<String>,
    },
    /// Be the process that a VM belongs to
    #[command(hide = true)]
    Keep {
        /// The name
        #[arg(value_name = "VM")]
        vm: String,
    },
}

impl VmCommand {
    /// Its exit code is that of a command.
    pub(crate) fn runs_a_command(&self) -> bool {
        matches!(self, Self::Exec(_))
    }
}

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
right. What runs in the first runs in both; connections and `kiln vm exec` stay with the first.";

/// `kiln vm create`.
#[derive(Debug, Args)]
#[command(after_help = CREATE_EXAMPLES, mut_arg("init", |arg| arg.hide(true)))]
pub(crate) struct Create {
    /// Call it so; its id by default
    #[arg(long, value_name = "NAME", value_parser = quantity::vm_name)]
    pub(crate) name: Option<String>,
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
  kiln vm exec db -- psql --version

Prints the VM's name. It runs no command of its image by itself: `kiln vm exec` says what it does.";

/// `kiln vm exec`.
#[derive(Debug, Args)]
#[command(after_help = EXEC_EXAMPLES, override_usage = "kiln vm exec [OPTIONS] VM [--] COMMAND...")]
pub(crate) struct Exec {
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
  kiln vm exec web -- ps
  kiln vm exec -it web sh                      a shell with a terminal
  tar c src | kiln vm exec -i -w /srv web tar x

Environment, user and directory are the image's unless given. Exit codes and signals are those of
`kiln run`, except that the VM goes on: the third SIGINT ends the command and not the VM.";
