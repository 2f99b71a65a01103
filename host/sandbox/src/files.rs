//! Files and trees of a running guest, over one connection each.
//!
//! What comes from a guest is believed in nothing. A tree of it is made by `kiln_tree`: names are looked up one by one in
//! directories that are open, no link is followed, and limits hold for what there is of it.

mod frames;
mod single;
mod tree;

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use kiln_protocol::{Call, Outcome};
use kiln_tree::Failure;
use rustix::io::Errno;
use tokio::net::UnixStream;

use crate::agent::AgentError;
use crate::monitor::MachineEnd;
use crate::vm::{AskError, Target};
use crate::{Blame, Reason};

pub use single::GuestFile;
pub(crate) use single::{read, write};
pub use tree::{Copied, CopyOptions};
pub(crate) use tree::{copy_in, copy_out};

/// Why a file or tree was not copied, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The guest refused, or cannot be asked.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// A file of the host's could not be read or made.
    #[error("cannot {action} {}", path.display())]
    Host {
        /// `read`, `make` or `write`.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// What was to be written could not be read.
    #[error("cannot read what is to be written to {} in the guest", path.display())]
    Source {
        /// The file in the guest.
        path: PathBuf,
        /// What the reader said.
        #[source]
        source: io::Error,
    },
    /// There is more in the guest than may be copied.
    #[error("{} is too large: more than what may be copied", path.display())]
    TooLarge {
        /// Where the limit was met.
        path: PathBuf,
    },
}

impl FileError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Ask(error) => error.blame(),
            Self::Host { .. } => Blame::Host,
            Self::Source { .. } | Self::TooLarge { .. } => Blame::Caller,
        }
    }

    /// The agent's reason, when it refused: [`Reason::NotFound`] for what is not there.
    pub fn refusal(&self) -> Option<Reason> {
        match self {
            Self::Ask(error) => error.refusal(),
            _ => None,
        }
    }

    /// How the machine ended, when that is what went wrong.
    pub fn machine_end(&self) -> Option<&MachineEnd> {
        match self {
            Self::Ask(error) => error.machine_end(),
            _ => None,
        }
    }
}

impl From<AgentError> for FileError {
    fn from(error: AgentError) -> Self {
        Self::Ask(error.into())
    }
}

impl From<Failure> for FileError {
    fn from(failure: Failure) -> Self {
        let Failure { action, path, error } = failure;
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(&path));
        match error {
            Errno::FBIG => Self::TooLarge { path },
            error => Self::Host { action, path, source: error.into() },
        }
    }
}

/// Asks for a transfer; what is carried follows on the connection.
async fn begin(machine: Target<'_>, call: Call) -> Result<UnixStream, FileError> {
    match machine.ask(call).await? {
        (Outcome::Done(_), stream) => Ok(stream),
        _ => Err(AgentError::Broken("a reply that does not answer what was asked").into()),
    }
}

/// Finds the better reason behind a lost connection.
async fn explained<T>(machine: Target<'_>, outcome: Result<T, FileError>) -> Result<T, FileError> {
    match (outcome, machine.end_watch()) {
        (Err(FileError::Ask(AskError::Agent(error))), Some(mut end)) => {
            Err(error.explained(&mut end).await.into())
        }
        (outcome, _) => outcome,
    }
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}
