//! Why there is no machine for who asked.

use std::time::Duration;

use crate::{Blame, MachineEnd, VmError};

/// Why there is no machine for who asked.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// All machines stayed taken.
    #[error("no machine was free within {:.1} s: all {max} are taken", after.as_secs_f64())]
    Exhausted {
        /// How long it was waited.
        after: Duration,
        /// As many as there may be.
        max: usize,
    },
    /// More wait already than may.
    #[error("{waiting} wait for a machine already")]
    Crowded {
        /// As many as may.
        waiting: usize,
    },
    /// The pool is being shut down.
    #[error("the pool is closed")]
    Closed,
    /// The host has not enough memory left for another machine.
    #[error(
        "another machine needs {needed_bytes} bytes of memory where the host has {available_bytes} to spare"
    )]
    Memory {
        /// What machines of this pool were measured to need, and what is left to the host.
        needed_bytes: u64,
        /// What the host has.
        available_bytes: u64,
    },
    /// One could not be made.
    #[error(transparent)]
    Vm(#[from] VmError),
}

impl PoolError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Exhausted { .. } | Self::Crowded { .. } | Self::Closed => Blame::Caller,
            Self::Memory { .. } => Blame::Host,
            Self::Vm(error) => error.blame(),
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
