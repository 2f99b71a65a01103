//! How a machine ended.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use kiln_control::{EndReason, Ended, Failed};

use crate::Blame;

/// What ends a monitor that makes a system call it has no business to make.
const SIGSYS: i32 = rustix::process::Signal::SYS.as_raw();

/// How a machine ended; an error where somebody still wanted something of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEnd {
    /// The guest powered off.
    PowerOff,
    /// The host stopped it, or dropped its handle.
    Stopped {
        /// The last of the guest's console, at most 16 KiB, when the monitor gave it.
        console: Vec<u8>,
    },
    /// The guest kernel panicked, asked for a reset, or a vCPU could not go on.
    Crashed {
        /// Which of these.
        reason: EndReason,
        /// The particulars in one line, or empty.
        detail: String,
        /// The last of the guest's console, at most 16 KiB.
        console: Vec<u8>,
    },
    /// The machine could not be made.
    Failed {
        /// Whose fault.
        blame: Blame,
        /// What was tried and what went wrong, in one line.
        message: String,
        /// What would help, or empty.
        hint: String,
    },
    /// The monitor process was killed by the kernel: its control group had more memory than it may.
    OutOfMemory,
    /// The monitor process went away without a word.
    Died {
        /// How the process ended, when that could be learned.
        status: Option<ExitStatus>,
        /// The last of what it said on stderr.
        stderr: String,
    },
}

impl MachineEnd {
    /// Whose fault this end is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::PowerOff | Self::Crashed { .. } => Blame::Guest,
            Self::Stopped { .. } => Blame::Caller,
            Self::Failed { blame, .. } => *blame,
            Self::Died { status: Some(status), .. } if is_overdue(*status) => Blame::Guest,
            // A guest that does what it may does not get there.
            Self::OutOfMemory | Self::Died { .. } => Blame::Kiln,
        }
    }

    /// What would help, when something is known to.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Failed { hint, .. } if !hint.is_empty() => Some(hint),
            _ => None,
        }
    }

    /// The last `lines` lines of the guest's console, without control characters.
    pub fn console_tail(&self, lines: usize) -> Vec<String> {
        let (Self::Crashed { console, .. } | Self::Stopped { console }) = self else { return Vec::new() };
        let text = String::from_utf8_lossy(console);
        let all: Vec<String> = text.lines().map(printable).filter(|line| !line.trim().is_empty()).collect();
        all[all.len().saturating_sub(lines)..].to_vec()
    }
}

impl Default for MachineEnd {
    fn default() -> Self {
        Self::Stopped { console: Vec::new() }
    }
}

/// A guest's line as a terminal may show it: a guest must not move the cursor or set the title of its host's.
fn printable(line: &str) -> String {
    line.chars().filter(|character| !character.is_control() || *character == '\t').collect()
}

impl fmt::Display for MachineEnd {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => write!(formatter, "the guest powered off"),
            Self::Stopped { .. } => write!(formatter, "the machine was stopped"),
            Self::Crashed { reason, detail, .. } => {
                formatter.write_str(match reason {
                    EndReason::Panic => "the guest kernel panicked",
                    EndReason::Reset => "the guest asked for a reset",
                    _ => "the guest crashed",
                })?;
                if detail.is_empty() { Ok(()) } else { write!(formatter, ": {}", printable(detail)) }
            }
            Self::Failed { message, .. } => formatter.write_str(message),
            Self::OutOfMemory => {
                write!(
                    formatter,
                    "the monitor was killed: it needed more memory than its control group may have"
                )
            }
            Self::Died { status: Some(status), stderr } if status.signal() == Some(SIGSYS) => {
                write!(formatter, "the monitor was ")?;
                match stderr.lines().last() {
                    Some(line) => formatter.write_str(&printable(line)),
                    None => write!(formatter, "killed by its own filter"),
                }
            }
            Self::Died { status: Some(status), .. } if is_overdue(*status) => {
                write!(formatter, "the guest did not say in time that it knows who it is")
            }
            Self::Died { status, stderr } => {
                write!(formatter, "the monitor process died")?;
                if let Some(status) = status {
                    write!(formatter, " ({status})")?;
                }
                match stderr.lines().last() {
                    Some(line) => write!(formatter, ": {}", printable(line)),
                    None => Ok(()),
                }
            }
        }
    }
}

/// Whether a monitor ended itself because its guest kept it.
fn is_overdue(status: ExitStatus) -> bool {
    status.code() == Some(kiln_jail::EXIT_OVERDUE)
}

impl std::error::Error for MachineEnd {}

impl From<Ended> for MachineEnd {
    fn from(ended: Ended) -> Self {
        match EndReason::try_from(ended.reason) {
            Ok(EndReason::PowerOff) => Self::PowerOff,
            Ok(EndReason::Stopped) => Self::Stopped { console: ended.console },
            reason => Self::Crashed {
                reason: reason.unwrap_or(EndReason::Crash),
                detail: ended.detail,
                console: ended.console,
            },
        }
    }
}

impl From<Failed> for MachineEnd {
    fn from(failed: Failed) -> Self {
        Self::Failed {
            blame: kiln_control::Blame::try_from(failed.blame).unwrap_or(kiln_control::Blame::Kiln).into(),
            message: failed.message,
            hint: failed.hint,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panic_with(console: &[u8]) -> MachineEnd {
        MachineEnd::from(Ended {
            reason: EndReason::Panic as i32,
            detail: "init died".into(),
            console: console.to_vec(),
        })
    }

    #[test]
    fn a_panic_shows_the_last_console_lines() {
        let end = panic_with(b"one\r\ntwo\r\n\r\nthree");
        assert_eq!(end.to_string(), "the guest kernel panicked: init died");
        assert_eq!(end.console_tail(2), ["two", "three"]);
        assert_eq!(end.blame(), Blame::Guest);
    }

    #[test]
    fn a_guest_cannot_send_escape_sequences_to_the_terminal() {
        assert_eq!(panic_with(b"\x1b]0;owned\x07ok").console_tail(9), ["]0;ownedok"]);
    }

    #[test]
    fn a_monitor_that_broke_out_of_its_list_of_calls_is_told_as_that() {
        let end = MachineEnd::Died {
            status: Some(ExitStatus::from_raw(SIGSYS)),
            stderr: "something\nkilled by its own filter: system call 41".into(),
        };
        assert_eq!(end.to_string(), "the monitor was killed by its own filter: system call 41");
        assert_eq!(end.blame(), Blame::Kiln);
    }

    #[test]
    fn a_guest_that_keeps_its_monitor_is_to_blame() {
        let status = Some(ExitStatus::from_raw(kiln_jail::EXIT_OVERDUE << 8));
        let end = MachineEnd::Died { status, stderr: String::new() };
        assert_eq!(end.to_string(), "the guest did not say in time that it knows who it is");
        assert_eq!(end.blame(), Blame::Guest);
    }

    #[test]
    fn an_unknown_reason_is_a_crash() {
        let end = MachineEnd::from(Ended { reason: 77, ..Ended::default() });
        assert!(matches!(end, MachineEnd::Crashed { reason: EndReason::Crash, .. }));
    }
}
