//! Machines that outlive the program that started them, without a daemon.
//!
//! Each such machine has a *keeper*: a process that owns its [`Vm`] and answers on a socket. What is known of it is a record in
//! a folder of its own:
//!
//! ```text
//! vms/.lock                held while machines are made, removed or looked after: moments
//! vms/.events{,.old,.lock} what happened to all of them, a line each
//! vms/NAME/vm.json         what it is and how it is: written whole or not at all
//! vms/NAME/life            locked for as long as its keeper lives
//! vms/NAME/socket          where the keeper answers
//! vms/NAME/log             what the keeper had to say
//! vms/NAME/output{,.old}   what its main command wrote
//! ```
//! ```text
//! create ─▶ created ──keeper──▶ running ◀─▶ paused ─▶ ended ──keeper──▶ running ...
//!                                  └── keeper died ────▶ ended
//! ```
//! Whether a keeper lives is told by its lock, which goes with the process, however that ends; and with the keeper goes its
//! machine. So nothing is left of a crash but a record that says otherwise, which [`Machines::reconcile`] puts right.

mod client;
mod events;
mod folder;
mod inside;
mod keeper;
mod log;
mod publish;
mod record;
mod watch;
mod wire;
mod workload;

pub use client::Kept;
pub use events::{EVENT_FILE_BYTES_MAX, Event, EventReader, Happening};
pub use folder::{Creation, Life, Machines};
pub use keeper::Keeping;
pub use kiln_support::word::Word;
pub use log::{LOG_FILE_BYTES_MAX, LogEntry, LogReader, LogStream};
pub use publish::Published;
pub use record::{Defaults, Exit, Origin, ScratchKind, State, VmRecord, is_vm_name};
pub use watch::Watch;
pub use workload::MainCommand;

use std::io;
use std::path::{Path, PathBuf};

use rustix::time::ClockId;

#[cfg(doc)]
use crate::Vm;
use crate::vm::boot::clock_ns;
use crate::{Blame, ExecError, ExposeError};

/// What can go wrong with detached machines.
#[derive(Debug, thiserror::Error)]
pub enum DetachedError {
    /// The name is another machine's.
    #[error("there is a VM called {0} already")]
    NameTaken(String),
    /// The name is none.
    #[error("'{0}' is no name: it has letters, digits and -_. and begins with a letter or digit")]
    Name(String),
    /// There is no such machine.
    #[error("no VM is called {0}, and no single id starts so")]
    Unknown(String),
    /// More machines than a folder may have.
    #[error("there are {0} VMs, as many as there may be")]
    TooMany(usize),
    /// The machine has no keeper: it was not started, or has ended.
    #[error("the VM {0} does not run")]
    NotRunning(String),
    /// The machine has a keeper.
    #[error("the VM {0} runs")]
    Running(String),
    /// The record of a machine is none.
    #[error("the record of the VM {name} is damaged: {why}")]
    Damaged {
        /// The machine.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// The file system failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The keeper went away, or said what none says.
    #[error("the keeper of the VM {name} did not answer: {why}")]
    Keeper {
        /// The machine.
        name: String,
        /// Why not.
        why: String,
    },
    /// Its main command could not be started.
    #[error(transparent)]
    Main(Box<ExecError>),
    /// An address at which a port is to be published cannot be had.
    #[error(transparent)]
    Publish(#[from] ExposeError),
    /// A signal for the main command of a machine that has none.
    #[error("the VM {0} has no main command")]
    NoMain(String),
    /// The keeper could not do it.
    #[error("{message}")]
    Refused {
        /// Whose fault.
        blame: Blame,
        /// What was tried and what went wrong, in one line.
        message: String,
    },
}

impl DetachedError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Io { .. } | Self::Damaged { .. } => Blame::Host,
            Self::Keeper { .. } => Blame::Kiln,
            Self::Refused { blame, .. } => *blame,
            Self::Main(error) => error.blame(),
            Self::Publish(error) => error.blame(),
            _ => Blame::Caller,
        }
    }

    /// What would help, when something is known to.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NameTaken(name) => format!("choose another, or remove it: kiln rm {name}"),
            Self::Unknown(_) => "kiln ps -a shows what there is".to_owned(),
            Self::NotRunning(name) => format!("start it: kiln vm start {name}"),
            Self::Running(name) => format!("stop it first: kiln stop {name}"),
            Self::Damaged { name, .. } => format!("remove it: kiln rm -f {name}"),
            Self::Publish(_) => "choose another port of this host, or 0 for one that is free".to_owned(),
            Self::NoMain(name) => format!("end the VM: kiln stop {name}, or at once: kiln kill {name}"),
            Self::Keeper { name, .. } => format!("kiln inspect {name} says how it is"),
            _ => return None,
        })
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// Milliseconds since 1970.
fn now_unix_ms() -> u64 {
    clock_ns(ClockId::Realtime) / 1_000_000
}
