//! Why there is no image.

use kiln_oci::{ParseSourceError, PullError};
use kiln_store::StoreError;

use crate::launch::LaunchError;
use crate::snapshot::SnapshotError;
use crate::{Blame, BundleError, HostFileError, MachineEnd, VmError};

/// Why there is no image to make machines of.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// What was given names no image.
    #[error(transparent)]
    Reference(#[from] ParseSourceError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image could not be fetched, or is not whole.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// There is no guest to boot.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A file cannot go into the guest.
    #[error(transparent)]
    File(#[from] HostFileError),
    /// The command that the snapshot is to have running is none.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// There is no such snapshot.
    #[error("there is no snapshot called {0}")]
    UnknownSnapshot(String),
    /// The snapshot is of no image.
    #[error("the snapshot {0} is of no image, so there is nothing to run")]
    NoImage(String),
    /// The image could not be baked, or its snapshot not be used.
    #[error(transparent)]
    Vm(#[from] VmError),
}

impl From<SnapshotError> for ImageError {
    fn from(error: SnapshotError) -> Self {
        Self::Vm(error.into())
    }
}

impl ImageError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Reference(_)
            | Self::File(_)
            | Self::Launch(_)
            | Self::UnknownSnapshot(_)
            | Self::NoImage(_) => Blame::Caller,
            Self::Store(_) | Self::Bundle(_) => Blame::Host,
            Self::Pull(error) => error.blame().into(),
            Self::Vm(error) => error.blame(),
        }
    }

    /// What would help, when something is known to.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Store(error) => error.hint(),
            Self::Pull(error) => error.hint(),
            Self::Bundle(error) => error.hint(),
            _ => None,
        }
    }

    /// How the machine ended, when that is what went wrong.
    pub fn machine_end(&self) -> Option<&MachineEnd> {
        match self {
            Self::Vm(error) => error.machine_end(),
            _ => None,
        }
    }
}
