//! The command line's words: one definition from which parser, help, man pages and completions are made.
#![allow(rustdoc::broken_intra_doc_links, reason = "these comments are help texts: `[:TAG]` is no link")]

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::quantity::{self, MemoryMib};
use crate::vm::args::{Verb, Vm};
use crate::vm::port::Publish;

/// Runs OCI images as hardware-isolated microVMs, as easily as processes.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, propagate_version = false, max_term_width = 100, after_help = EXAMPLES)]
#[command(subcommand_required = true, arg_required_else_help = true, disable_help_subcommand = true)]
pub(crate) struct Cli {
    /// Options every command takes.
    #[command(flatten)]
    pub(crate) global: Global,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  kiln run debian:12 -- cat /etc/os-release   run one command in a fresh microVM
  kiln run -it alpine                         a shell with a terminal
  kiln run -d --name web nginx                a VM that stays: kiln ps, logs, exec, stop, rm
  kiln doctor                                 can this machine run VMs, and how well

Exit codes: `run` and `exec` end with the code of their command, `wait` with that of a VM, and use
125 for failures of their own; the others end with 0, 1 (the caller's mistake), 2 (usage), 3 (the
host's or a registry's fault) or 4 (Kiln's).";

/// Options every command takes.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where images are kept [default: /var/lib/kiln for root, else ~/.local/share/kiln]
    #[arg(
        long,
        value_name = "DIR",
        global = true,
        display_order = 1000,
        env = "KILN_ROOT",
        hide_env_values = true
    )]
    pub(crate) root: Option<PathBuf>,
    /// Say nothing but errors
    #[arg(short, long, global = true, display_order = 1000, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Say more; twice also shows the guest's console
    #[arg(short, long, global = true, display_order = 1000, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command in a fresh microVM made from an image
    Run(Box<Run>),
    /// What is done with VMs that stay.
    #[command(flatten)]
    Verb(Verb),
    /// Fetch an image and make it ready to run
    Pull(Pull),
    /// List the images in the store
    Images(Images),
    /// Remove images and free what nothing else uses
    Rmi(Rmi),
    /// Look into images
    #[command(subcommand_required = true, arg_required_else_help = true)]
    Image(Image),
    /// Save a guest with an image mounted and warmed up, for machines to be made from
    Bake(Box<Bake>),
    /// Look at, check and remove saved guests
    #[command(subcommand_required = true, arg_required_else_help = true)]
    Snapshot(Snapshot),
    /// Machines that stay: create, start, save, restore and fork them; and all that is done with them otherwise
    #[command(subcommand_required = true, arg_required_else_help = true)]
    Vm(Vm),
    /// Check what this host offers: each fact with its consequence and the fix
    Doctor(Doctor),
    /// Write out what programs that embed Kiln's library need: guest kernel, agent and monitor
    Parts(Parts),
    /// Show the versions of Kiln, its guest kernel and its agent
    Version(Version),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  kiln completion bash > ~/.local/share/bash-completion/completions/kiln"
    )]
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// How a command in a guest runs.
#[derive(Debug, Args)]
pub(crate) struct CommandFlags {
    /// Pass this program's stdin to the command; without it the command reads /dev/null
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal; stdout and stderr become one stream
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set an environment variable; KEY alone passes this program's value on
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<OsString>,
    /// Read environment variables from a file: KEY=VALUE or KEY a line, # starts a comment
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Run as this user: name, uid, name:group or uid:gid
    #[arg(short, long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Run in this directory, made when missing
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
}

/// `kiln run`.
#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES, override_usage = "kiln run [OPTIONS] IMAGE [--] [COMMAND]...")]
pub(crate) struct Run {
    /// Leave the command running in a VM that stays, and print the VM's id
    #[arg(short, long, conflicts_with = "json_events")]
    pub(crate) detach: bool,
    /// With -d: call the VM so; two words by default
    #[arg(long, value_name = "NAME", requires = "detach", value_parser = quantity::vm_name)]
    pub(crate) name: Option<String>,
    /// With -d: publish a TCP port of the guest on this host, on 127.0.0.1 unless an address is given
    #[arg(short, long, value_name = "[[ADDRESS:]HOST:]GUEST", requires = "detach")]
    pub(crate) publish: Vec<Publish>,
    /// With -d: remove the VM when its command has ended. Without, it always is
    #[arg(long)]
    pub(crate) rm: bool,
    /// What machine.
    #[command(flatten)]
    pub(crate) machine: MachineFlags,
    /// Boot the guest and neither use nor make a snapshot of it
    #[arg(long)]
    pub(crate) no_snapshot: bool,
    /// How the command runs.
    #[command(flatten)]
    pub(crate) flags: CommandFlags,
    /// Replace the image's entrypoint (and drop its default command); empty for none
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<OsString>,
    /// Name the guest; by default a random one, with -d the VM's name
    #[arg(long, value_name = "NAME", value_parser = quantity::hostname)]
    pub(crate) hostname: Option<String>,
    /// Kill the command when it runs longer than this (30s, 5m, 1h30m); exit code 124
    #[arg(long, value_name = "TIME", value_parser = quantity::duration)]
    pub(crate) timeout: Option<Duration>,
    /// Where the image comes from.
    #[command(flatten)]
    pub(crate) source: PullFlags,
    /// When to ask the registry: missing, always or never
    #[arg(long, value_name = "WHEN", default_value = "missing", hide_possible_values = true)]
    pub(crate) pull: Pulling,
    /// Write the phases of the run with their times to a file, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub(crate) json_events: Option<PathBuf>,
    /// The image: a name as Docker's, oci-layout:DIR[:TAG], oci-archive:FILE or docker-archive:FILE; or snapshot:NAME,
    /// whose machine it is then
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// The command and its arguments; the image's own when absent
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,
}

/// What machine a guest gets: what of it a snapshot is known by.
#[derive(Debug, Args)]
pub(crate) struct MachineFlags {
    /// Guest memory, with a unit: a ceiling, not a reservation
    #[arg(short, long, value_name = "SIZE", default_value = "512m", value_parser = quantity::memory)]
    pub(crate) memory: MemoryMib,
    /// Virtual CPUs, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) cpus: u32,
    /// Run a reaper as process 1 of the guest, and not the command itself
    #[arg(long)]
    pub(crate) init: bool,
    /// Mount the image read-only; /tmp, /run and its volumes are in memory
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Keep the guest's changes in its memory and not on a disk
    #[arg(long, conflicts_with_all = ["read_only", "scratch_size"])]
    pub(crate) scratch_in_memory: bool,
    /// The size of the disk that takes the guest's changes; it costs what is written
    #[arg(long, value_name = "SIZE", default_value = "10g", value_parser = quantity::bytes)]
    pub(crate) scratch_size: u64,
    /// Boot this kernel (vmlinux with a PVH note, or bzImage) and not Kiln's own
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
}

const RUN_EXAMPLES: &str = "\
Examples:
  kiln run debian:12 -- cat /etc/os-release
  kiln run -it -e TERM python:3.12             a Python prompt
  tar c src | kiln run -i gcc:14 sh -c 'tar x && make -C src'
  kiln run --memory 2g --cpus 4 --timeout 10m node:22 node bench.js
  kiln run oci-layout:./build:latest           an image from a local directory
  kiln run -d --name web -p 8080:80 nginx      a VM that stays; then kiln logs -f web, kiln stop web

With -d the VM ends with its command, and what that wrote and ended with is kept (kiln logs, kiln
wait, kiln inspect). Its host name is its name. -i keeps its stdin open, -t gives it a terminal.

Exit codes: the command's own; 124 its time was up, 125 Kiln or the host failed, 126 the command
cannot be executed, 127 it does not exist, 128+n signal n ended it.

Signals: SIGINT, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed to the command, SIGTERM as the
image's STOPSIGNAL. The third SIGINT or SIGTERM ends the machine at once.";

/// When to ask the registry for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Pulling {
    /// When the store does not have the name.
    Missing,
    /// Every time: a tag may have moved.
    Always,
    /// Never: the store has it or it is an error.
    Never,
}

/// Which image behind a name, and how it may be fetched.
#[derive(Debug, Args)]
pub(crate) struct PullFlags {
    /// The platform, such as linux/amd64; this host's by default
    #[arg(long, value_name = "OS/ARCH")]
    pub(crate) platform: Option<String>,
    /// Speak plain HTTP to a registry that is not on this machine
    #[arg(long)]
    pub(crate) allow_http: bool,
}

/// `kiln pull`.
#[derive(Debug, Args)]
#[command(after_help = PULL_EXAMPLES)]
pub(crate) struct Pull {
    /// Where the image comes from.
    #[command(flatten)]
    pub(crate) source: PullFlags,
    /// Check every byte the store has of the image, and fetch what is damaged again
    #[arg(long)]
    pub(crate) verify: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The image: a name as Docker's, oci-layout:DIR[:TAG], oci-archive:FILE or docker-archive:FILE
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
}

const PULL_EXAMPLES: &str = "\
Examples:
  kiln pull debian:12
  kiln pull ghcr.io/owner/name@sha256:...
  kiln pull docker-archive:image.tar           what `docker save` wrote

Prints the image's digest. Credentials are read where Docker keeps them (~/.docker/config.json and
the helpers it names).";

/// `kiln images`.
#[derive(Debug, Args)]
pub(crate) struct Images {
    /// Print as JSON: one array of objects
    #[arg(long)]
    pub(crate) json: bool,
}

/// `kiln rmi`.
#[derive(Debug, Args)]
pub(crate) struct Rmi {
    /// Names or ids
    #[arg(value_name = "IMAGE", required = true)]
    pub(crate) images: Vec<String>,
}

/// `kiln image`.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

/// `kiln image ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Print an image's configuration and layers as JSON
    Inspect {
        /// Name or id
        #[arg(value_name = "IMAGE")]
        image: String,
        /// The platform, when the name is there for several
        #[arg(long, value_name = "OS/ARCH")]
        platform: Option<String>,
    },
}

/// What says that a command is ready to be saved.
#[derive(Debug, Args)]
#[group(id = "ready", multiple = false)]
pub(crate) struct Ready {
    /// Start the image's command, and save the guest with it running as soon as it listens on this TCP port
    #[arg(long = "ready-port", value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: Option<u16>,
    /// The same as soon as this path is there in the guest
    #[arg(long = "ready-file", value_name = "PATH", value_parser = quantity::guest_path)]
    pub(crate) file: Option<String>,
    /// The same as soon as it has written a line that matches this regular expression to stdout or stderr
    #[arg(long = "ready-log", value_name = "REGEX")]
    pub(crate) log: Option<kiln::LogPattern>,
}

/// `kiln bake`.
#[derive(Debug, Args)]
#[command(after_help = BAKE_EXAMPLES, override_usage = "kiln bake [OPTIONS] IMAGE [--] [COMMAND]...")]
pub(crate) struct Bake {
    /// What machine.
    #[command(flatten)]
    pub(crate) machine: MachineFlags,
    /// Run a command in the guest, by its shell, before it is saved; may be given several times
    #[arg(long, value_name = "CMD")]
    pub(crate) warmup: Vec<String>,
    /// Run a script of this host's likewise, by its #! line or else by /bin/sh; after all --warmup
    #[arg(long, value_name = "FILE")]
    pub(crate) warmup_file: Vec<PathBuf>,
    /// Put a file of this host's into the guest before all warm-ups, owned by root, with its permissions
    #[arg(long, value_name = "HOST:GUEST", value_parser = quantity::extra_file)]
    pub(crate) extra_file: Vec<(PathBuf, String)>,
    /// What says that a command is ready.
    #[command(flatten)]
    pub(crate) ready: Ready,
    /// How long the command may take until it is ready
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = quantity::duration, requires = "ready")]
    pub(crate) ready_timeout: Duration,
    /// Set an environment variable for warm-ups and command; KEY alone passes this program's value on
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<OsString>,
    /// Call the snapshot so
    #[arg(long, value_name = "NAME", value_parser = quantity::snapshot_name)]
    pub(crate) name: Option<String>,
    /// Where the image comes from.
    #[command(flatten)]
    pub(crate) source: PullFlags,
    /// When to ask the registry: missing, always or never
    #[arg(long, value_name = "WHEN", default_value = "missing", hide_possible_values = true)]
    pub(crate) pull: Pulling,
    /// Print the outcome as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The image: a name as Docker's, oci-layout:DIR[:TAG], oci-archive:FILE or docker-archive:FILE
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
    /// The command that is saved running, in the place of the image's own
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true, requires = "ready")]
    pub(crate) command: Vec<OsString>,
}

const BAKE_EXAMPLES: &str = "\
Examples:
  kiln bake python:3.12                        what the first `kiln run` would do
  kiln bake --warmup 'python3 -c \"import json\"' --name json python:3.12
  kiln run snapshot:json -- python3            a machine that begins where the warm-up ended
  kiln bake --extra-file ./app.conf:/etc/app.conf --warmup-file ./prepare.sh --name app app:1
  kiln bake --ready-port 6379 --name redis redis:8
  kiln run snapshot:redis -- redis-cli ping    beside the server, which is up already
  kiln bake --ready-log 'accepts connections' --ready-timeout 5m --name srv app:1 -- serve --warm

Files are put in place first, warm-ups run to their end, and the command is started last. It stays
process 1 of the guest (with --init a child of the reaper): when it ends, so does all else in there.
What it writes is not kept, and it has no stdin.

Prints the snapshot's key. Baking what is baked already costs nothing. The key is made of
the image, the machine, contents of files, warm-ups, command, what it is ready by, and environment.";

/// `kiln snapshot`.
#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: SnapshotCommand,
}

/// `kiln snapshot ...`.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// List the snapshots in the store
    Ls {
        /// Print as JSON: one array of objects
        #[arg(long)]
        json: bool,
    },
    /// Print what is known of a snapshot as JSON
    Inspect {
        /// Name, key, or the start of a key
        #[arg(value_name = "SNAPSHOT")]
        snapshot: String,
    },
    /// Remove snapshots; machines made from them go on
    Rm {
        /// Names, keys, or starts of keys
        #[arg(value_name = "SNAPSHOT", required = true)]
        snapshots: Vec<String>,
    },
    /// Check every byte of snapshots, of all when none is named
    Verify {
        /// Names, keys, or starts of keys
        #[arg(value_name = "SNAPSHOT")]
        snapshots: Vec<String>,
    },
}

/// `kiln doctor`.
#[derive(Debug, Args)]
#[command(after_help = "Exits with 1 when `kiln run` cannot work here.")]
pub(crate) struct Doctor {
    /// Print as JSON: one array of objects
    #[arg(long)]
    pub(crate) json: bool,
}

/// `kiln parts`.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  kiln parts target/release/kiln-guest   found there by target/release/my-program

Elsewhere the program finds them by KILN_GUEST_DIR=DIR.")]
pub(crate) struct Parts {
    /// The folder, made when it is missing; files of these names in it are replaced
    #[arg(value_name = "DIR")]
    pub(crate) folder: PathBuf,
}

/// `kiln version`.
#[derive(Debug, Args)]
pub(crate) struct Version {
    /// Print as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
