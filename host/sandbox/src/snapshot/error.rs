//! What can go wrong with snapshots.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_snapshot::LoadError;
use kiln_store::StoreError;

use crate::agent::{AgentError, ExitStatus};
use crate::monitor::{MachineEnd, MonitorError};
use crate::{Blame, ExecError};

/// Why a snapshot that is in the store could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It does not match its digests.
    #[error("the snapshot is damaged")]
    Damaged(#[from] LoadError),
    /// It, or something it is made of, is not in the store any more.
    #[error("the snapshot is gone")]
    Gone,
    /// Its parts, or what the machine is to have, are not of one machine: its state, its memory, its scratch disk or the lack of one.
    #[error("the snapshot is damaged: its parts are of different machines")]
    Mixed,
    /// The image's disk is not the one that its guest has mounted.
    #[error("the snapshot was made of another conversion of its image")]
    OtherRoot,
    /// The monitor refused it, or its guest did not live long enough to take on its identity.
    #[error("the snapshot cannot be restored")]
    Refused(#[source] Arc<MachineEnd>),
    /// The guest did not say, at its port, that it has taken on its identity. Its machine has been ended.
    #[error("the guest of the snapshot did not take on its identity")]
    NotAdopted(#[source] AgentError),
    /// The guest did not take on its identity in time.
    #[error("the guest of the snapshot did not answer in time")]
    Overdue(MachineEnd),
}

impl SnapshotError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Gone | Self::OtherRoot => Blame::Caller,
            Self::Damaged(_) | Self::Mixed => Blame::Host,
            Self::Refused(end) => end.blame(),
            Self::Overdue(_) | Self::NotAdopted(_) => Blame::Guest,
        }
    }

    /// Whether another snapshot in its place would help. A process that was killed, or a host too busy, says nothing of the snapshot.
    pub(crate) fn is_the_snapshots(&self) -> bool {
        match self {
            Self::Damaged(_) | Self::Gone | Self::Mixed | Self::OtherRoot | Self::NotAdopted(_) => true,
            Self::Refused(end) => !matches!(**end, MachineEnd::Died { .. } | MachineEnd::OutOfMemory),
            Self::Overdue(_) => false,
        }
    }

    /// How the machine ended, when that is what went wrong.
    pub fn machine_end(&self) -> Option<&MachineEnd> {
        match self {
            Self::Damaged(_) | Self::Gone | Self::Mixed | Self::OtherRoot | Self::NotAdopted(_) => None,
            Self::Refused(end) => Some(end),
            Self::Overdue(end) => Some(end),
        }
    }
}

/// Why no snapshot could be made, although its machine came up.
#[derive(Debug, thiserror::Error)]
pub enum BakeError {
    /// The agent refused to park, or did not go on.
    #[error("the guest cannot be saved")]
    Park(#[source] AgentError),
    /// The machine ended instead of parking.
    #[error("the guest did not park")]
    NotParked(#[source] Arc<MachineEnd>),
    /// The agent did not park in time.
    #[error("the guest did not park in time")]
    ParkOverdue(MachineEnd),
    /// The agent of a machine that goes on did not park in time.
    #[error("the guest did not make itself ready to be copied in time")]
    ParkTooSlow,
    /// The guest was parked at its port and did not hear that it goes on: it stands still.
    #[error("the guest does not go on after it was copied")]
    NotGoneOn(#[source] AgentError),
    /// The monitor could not write the machine to its files.
    #[error("cannot save the guest")]
    Save(#[source] MonitorError),
    /// The store could not take it.
    #[error(transparent)]
    Store(StoreError),
    /// A warm-up command could not run.
    #[error("cannot run the warm-up command {command}")]
    Warmup {
        /// The command.
        command: String,
        /// Why not.
        #[source]
        source: Box<ExecError>,
    },
    /// A warm-up command failed.
    #[error("the warm-up command {command} {}: {output}", ended(*status))]
    WarmupFailed {
        /// The command.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The last of what it wrote.
        output: String,
    },
    /// The caller's code that warms the guest up failed.
    #[error("the warm-up '{tag}' failed")]
    Code {
        /// What stands for the code.
        tag: String,
        /// What it said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file could not be written into the guest, or taken out of it.
    #[error("cannot put the file {path} into the guest")]
    File {
        /// Its path in the guest.
        path: String,
        /// Why not.
        #[source]
        source: AgentError,
    },
    /// A file of the host's is not what it was when the bake began.
    #[error("{} has changed while it was copied", .0.display())]
    Changed(PathBuf),
    /// The command that is to run in the snapshot could not, or its end is not known.
    #[error("cannot run {command}")]
    Service {
        /// The command.
        command: String,
        /// Why not.
        #[source]
        source: Box<ExecError>,
    },
    /// The command that is to run in the snapshot ended.
    #[error("{command} {} and was not ready: no {missing}; {output}", ended(*status))]
    ServiceEnded {
        /// The command.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What would have said that it is ready.
        missing: String,
        /// The last of what it wrote.
        output: String,
    },
    /// The command that is to run in the snapshot was not ready in time.
    #[error("{command} was not ready within {seconds} s: no {missing}; {output}")]
    NotReady {
        /// The command.
        command: String,
        /// The limit.
        seconds: f64,
        /// What would have said that it is ready.
        missing: String,
        /// The last of what it wrote.
        output: String,
    },
    /// The host name is none that a restored guest can be given.
    #[error("'{0}' is not a host name")]
    Hostname(String),
    /// Something of the host could not be read that decides which snapshot fits.
    #[error("cannot {action} {what}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// On what.
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with code {code}"),
        (None, Some(signal)) => format!("was ended by {}", crate::signal::name(signal)),
        (None, None) => "ended".to_owned(),
    }
}

impl BakeError {
    pub(super) fn read(path: &Path, source: io::Error) -> Self {
        Self::Host { action: "read", what: path.display().to_string(), source }
    }

    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Park(error) | Self::NotGoneOn(error) => error.blame(),
            Self::NotParked(end) => end.blame(),
            Self::ParkOverdue(_) | Self::ParkTooSlow => Blame::Guest,
            Self::Save(_) | Self::Store(_) | Self::Host { .. } => Blame::Host,
            Self::Warmup { source, .. } | Self::Service { source, .. } => source.blame(),
            Self::File { source, .. } => source.blame(),
            Self::WarmupFailed { .. }
            | Self::Code { .. }
            | Self::Changed(_)
            | Self::ServiceEnded { .. }
            | Self::NotReady { .. }
            | Self::Hostname(_) => Blame::Caller,
        }
    }

    /// How the machine ended, when that is what went wrong.
    pub fn machine_end(&self) -> Option<&MachineEnd> {
        match self {
            Self::NotParked(end)
            | Self::Park(AgentError::MachineEnded(end))
            | Self::NotGoneOn(AgentError::MachineEnded(end))
            | Self::File { source: AgentError::MachineEnded(end), .. }
            | Self::Save(MonitorError::Ended(end)) => Some(end),
            Self::ParkOverdue(end) => Some(end),
            Self::Warmup { source, .. } | Self::Service { source, .. } => source.machine_end(),
            _ => None,
        }
    }

    /// True when the host is short of something that saving takes and booting does not.
    pub fn is_hosts(&self) -> bool {
        self.blame() == Blame::Host
    }
}
