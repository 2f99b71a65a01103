//! Why there is no machine, as the host is told.

use std::error::Error;

use kiln_control::{Blame, Failed};
use kiln_snapshot::LoadError;
pub(super) use kiln_support::causes::with_causes;

use crate::boot::BootError;
use crate::machine::StartError;
use crate::mailbox::MailError;
use crate::paused::RestoreError;
use crate::rehearsal::RehearsalError;
use crate::saved::SectionError;
use crate::shell::{ShapeError, ShellError};

/// Why a machine was not made, and who is to blame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) blame: Blame,
    pub(super) message: String,
    pub(super) hint: String,
}

impl Failure {
    pub(super) fn new(blame: Blame, message: impl Into<String>) -> Self {
        Self { blame, message: message.into(), hint: String::new() }
    }

    pub(super) fn host(what: &str, error: &dyn Error) -> Self {
        Self::new(Blame::Host, format!("{what}: {}", with_causes(error)))
    }

    pub(super) fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: hint.into(), ..self }
    }
}

impl From<BootError> for Failure {
    fn from(error: BootError) -> Self {
        let blame = if matches!(error, BootError::Read { .. }) { Blame::Host } else { Blame::Caller };
        Self::new(blame, with_causes(&error)).with_hint(error.hint().unwrap_or_default())
    }
}

impl From<ShellError> for Failure {
    fn from(error: ShellError) -> Self {
        Self::new(Blame::Host, with_causes(&error))
    }
}

impl From<ShapeError> for Failure {
    fn from(error: ShapeError) -> Self {
        Self::new(Blame::Caller, error.to_string())
    }
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        let blame = if matches!(error, LoadError::Read(_)) { Blame::Host } else { Blame::Caller };
        Self::new(blame, with_causes(&error))
            .with_hint("remove the snapshot; it is made again when it is needed")
    }
}

impl From<SectionError> for Failure {
    fn from(error: SectionError) -> Self {
        Self::new(Blame::Caller, error.to_string())
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Self {
        let blame = match error {
            RestoreError::Host(_) | RestoreError::Hypervisor(_) => Blame::Host,
            _ => Blame::Caller,
        };
        Self::new(blame, format!("cannot restore the machine: {}", with_causes(&error)))
    }
}

impl From<MailError> for Failure {
    fn from(error: MailError) -> Self {
        Self::new(Blame::Kiln, error.to_string())
    }
}

impl From<RehearsalError> for Failure {
    fn from(error: RehearsalError) -> Self {
        let blame = match error {
            RehearsalError::Mail(_) => Blame::Kiln,
            RehearsalError::Hypervisor(_) => Blame::Host,
            RehearsalError::Unexpected => Blame::Caller,
        };
        Self::new(blame, with_causes(&error))
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::host("cannot set a deadline", &error)
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        Self::new(Blame::Host, with_causes(&error))
    }
}

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self { blame: failure.blame.into(), message: failure.message, hint: failure.hint }
    }
}
