//! Why there is no machine for who asked.

use std::time::Duration;

use crate::{Blame, MachineEnd, VmError};

/// The machines of a pool were to have more than their image, or too little.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{asked} {of} for machines of an image that was built with {most}, where {least} is the least")]
pub struct SizeError {
    /// Of what: `MiB of memory` or `vCPUs`.
    pub of: &'static str,
    /// How many were asked for.
    pub asked: u32,
    /// How few there may be.
    pub least: u32,
    /// How many the image has.
    pub most: u32,
}

impl SizeError {
    /// What would help.
    pub fn hint(&self) -> Option<String> {
        let hint = "build the image with as much: its memory is a ceiling, and taken as it is used";
        (self.asked > self.most).then(|| hint.to_owned())
    }
}

/// Why there is no machine for who asked.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Its machines cannot be of the size that was asked for.
    #[error(transparent)]
    Size(#[from] SizeError),
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
            Self::Size(_) | Self::Exhausted { .. } | Self::Crowded { .. } | Self::Closed => Blame::Caller,
            Self::Memory { .. } => Blame::Host,
            Self::Vm(error) => error.blame(),
        }
    }

    /// What would help, when something is known to.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Size(error) => error.hint(),
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
