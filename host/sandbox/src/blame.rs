//! Whose fault a failure is.

use std::fmt;

/// Whose fault a failure is; it decides what a program does about it and with which code it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blame {
    /// Whoever asked: an image that does not exist, a bad kernel file, an impossible shape.
    Caller,
    /// What runs inside the machine: its kernel panicked, its agent broke the rules.
    Guest,
    /// The host or what it reaches: no permission, no memory, no KVM, a registry that does not answer.
    Host,
    /// Kiln: a defect worth a report.
    Kiln,
}

impl fmt::Display for Blame {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Caller => "caller",
            Self::Guest => "guest",
            Self::Host => "host",
            Self::Kiln => "kiln",
        })
    }
}

impl From<kiln_control::Blame> for Blame {
    fn from(blame: kiln_control::Blame) -> Self {
        match blame {
            kiln_control::Blame::Caller => Self::Caller,
            kiln_control::Blame::Host => Self::Host,
            kiln_control::Blame::Kiln => Self::Kiln,
        }
    }
}

impl From<kiln_oci::Blame> for Blame {
    /// An image's source counts as the host: it is reached from there, and the caller can only try again.
    fn from(blame: kiln_oci::Blame) -> Self {
        match blame {
            kiln_oci::Blame::Caller => Self::Caller,
            kiln_oci::Blame::Source | kiln_oci::Blame::Host => Self::Host,
            kiln_oci::Blame::Kiln => Self::Kiln,
        }
    }
}
