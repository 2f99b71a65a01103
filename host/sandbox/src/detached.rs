//! Machines that outlive the program that started them, without a daemon.
//!
//! Each such machine has a *keeper*: a process that owns its [`Vm`] and answers on a socket. What is known of it is a record in
//! a folder of its own:
//!
//! ```text
//! vms/.lock          held while machines are made, removed or looked after: moments
//! vms/NAME/vm.json   what it is and how it is: written whole or not at all
//! vms/NAME/life      locked for as long as its keeper lives
//! vms/NAME/socket    where the keeper answers
//! vms/NAME/log       what the keeper had to say
//! ```
//! ```text
//! create ─▶ created ──keeper──▶ running ◀─▶ paused ─▶ ended ──keeper──▶ running ...
//!                                  └── keeper died ────▶ ended
//! ```
//! Whether a keeper lives is told by its lock, which goes with the process, however that ends; and with the keeper goes its
//! machine. So nothing is left of a crash but a record that says otherwise, which [`Machines::reconcile`] puts right.

mod client;
mod folder;
mod inside;
mod keeper;
mod record;
mod wire;

pub use client::Kept;
pub use folder::{Creation, Life, Machines};
pub use keeper::keep;
pub use record::{Defaults, Origin, ScratchKind, State, VmRecord, is_vm_name};

use std::io;
use std::path::{Path, PathBuf};

use rustix::time::ClockId;

use crate::Blame;
#[cfg(doc)]
use crate::Vm;
use crate::vm::boot::clock_ns;

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
            _ => Blame::Caller,
        }
    }

    /// What would help, when something is known to.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NameTaken(name) => format!("choose another, or remove it: kiln vm rm {name}"),
            Self::Unknown(_) => "kiln vm ls -a shows what there is".to_owned(),
            Self::NotRunning(name) => format!("start it: kiln vm start {name}"),
            Self::Running(name) => format!("stop it first: kiln vm stop {name}"),
            Self::Damaged { name, .. } => format!("remove it: kiln vm rm -f {name}"),
            Self::Keeper { name, .. } => format!("kiln vm inspect {name} says how it is"),
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
