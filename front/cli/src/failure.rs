//! Failures as users see them: what went wrong, why, and what would help.

use std::error::Error;
use std::fmt::Write as _;

use kiln::detached::DetachedError;
use kiln::image::PullError;
use kiln::store::StoreError;
use kiln::{AskError, Blame, BundleError, ExecError, MachineEnd, VmError};

use crate::command;
use crate::terminal::printable;

/// What `run` ends with when not the command but Kiln or its host failed.
pub(crate) const FAILED: u8 = 125;
/// How many of the guest's last console lines are shown.
const CONSOLE_LINES: usize = 20;

/// A failure to be reported.
#[derive(Debug)]
pub(crate) struct Failure {
    what: Box<dyn Error + Send + Sync>,
    blame: Blame,
    hint: Option<String>,
    console: Vec<String>,
    /// All of it in words already.
    report: Option<String>,
    /// The exit code of a command that could not be started.
    refused: Option<u8>,
}

impl Failure {
    /// A failure without a hint.
    pub(crate) fn new(blame: Blame, what: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { what: what.into(), blame, hint: None, console: Vec::new(), report: None, refused: None }
    }

    /// The caller's mistake.
    pub(crate) fn caller(what: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(Blame::Caller, what)
    }

    /// Something the host did not give.
    pub(crate) fn host(what: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(Blame::Host, what)
    }

    /// A failure that another process of this program has put into words; `code` is the exit code it has.
    pub(crate) fn reported(report: String, code: u8, refused: Option<u8>) -> Self {
        let blame = match code {
            1 => Blame::Caller,
            3 => Blame::Host,
            _ => Blame::Kiln,
        };
        Self { report: Some(report), refused, ..Self::new(blame, "a process of this program failed") }
    }

    /// Adds what would help.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The exit code of commands other than `run`.
    pub(crate) fn exit_code(&self) -> u8 {
        match self.blame {
            Blame::Caller => 1,
            Blame::Host => 3,
            Blame::Guest | Blame::Kiln => 4,
        }
    }

    /// The exit code of a command, when what failed is that it could not be started.
    pub(crate) fn refused(&self) -> Option<u8> {
        self.refused
    }

    /// The exit code of what otherwise ends with that of a command.
    pub(crate) fn command_exit_code(&self) -> u8 {
        self.refused.unwrap_or(FAILED)
    }

    /// The text for stderr: `error:` with its causes, the guest's last words, `hint:`.
    pub(crate) fn report(&self) -> String {
        if let Some(report) = &self.report {
            return report.clone();
        }
        let mut text = format!("error: {}\n", printable(&self.what.to_string()));
        let mut said = self.what.to_string();
        let mut cause = self.what.source();
        while let Some(error) = cause {
            let line = error.to_string();
            // An error that shows its cause in its own words has said this already.
            if !said.contains(&line) {
                let _ = writeln!(text, "  because: {}", printable(&line));
                said = line;
            }
            cause = error.source();
        }
        if !self.console.is_empty() {
            text.push_str("the guest's last console lines:\n");
            for line in &self.console {
                let _ = writeln!(text, "  | {line}");
            }
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(text, "hint: {hint}");
        }
        text
    }

    fn with_machine(mut self, end: Option<&MachineEnd>) -> Self {
        if let Some(end) = end {
            self.console = end.console_tail(CONSOLE_LINES);
            self.hint = self.hint.or_else(|| end.hint().map(ToOwned::to_owned));
        }
        self
    }
}

impl From<BundleError> for Failure {
    fn from(error: BundleError) -> Self {
        let hint = error.hint();
        let failure = Self::host(error);
        Self { hint, ..failure }
    }
}

impl From<VmError> for Failure {
    fn from(error: VmError) -> Self {
        let failure = Self::new(error.blame(), error.to_string());
        let failure = failure.with_machine(error.machine_end());
        Self { what: error.into(), ..failure }
    }
}

impl From<ExecError> for Failure {
    fn from(error: ExecError) -> Self {
        let failure = Self::new(error.blame(), error.to_string()).with_machine(error.machine_end());
        let hint = match &error {
            ExecError::Ask(AskError::Kept(error)) => error.hint(),
            _ => failure.hint,
        };
        Self { refused: command::refused(&error), what: error.into(), hint, ..failure }
    }
}

impl From<DetachedError> for Failure {
    fn from(error: DetachedError) -> Self {
        let error = match error {
            DetachedError::Main(error) => return Self::from(*error),
            error => error,
        };
        let hint = error.hint();
        Self { hint, ..Self::new(error.blame(), error) }
    }
}

impl From<kiln::AgentError> for Failure {
    fn from(error: kiln::AgentError) -> Self {
        ExecError::from(error).into()
    }
}

impl From<PullError> for Failure {
    fn from(error: PullError) -> Self {
        let (blame, hint) = (error.blame().into(), error.hint());
        Self { hint, ..Self::new(blame, error) }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let hint = error.hint();
        Self { hint, ..Self::host(error) }
    }
}

impl From<kiln::launch::LaunchError> for Failure {
    fn from(error: kiln::launch::LaunchError) -> Self {
        let failure = Self::caller(error.to_string());
        match error {
            kiln::launch::LaunchError::NoCommand => {
                failure.hint("name one after the image: kiln run IMAGE -- COMMAND")
            }
            _ => failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_causes_once_and_the_hint_last() {
        let cause = std::io::Error::other("no such thing");
        let error = BundleError::Read { path: "/x".into(), source: cause };
        let failure = Failure { hint: Some("look elsewhere".into()), ..Failure::from(error) };
        assert_eq!(
            failure.report(),
            "error: cannot read /x\n  because: no such thing\nhint: look elsewhere\n"
        );
    }

    #[test]
    fn a_message_from_elsewhere_only_shows() {
        let failure = Failure::caller("denied: \u{1b}[2J\u{9b}1A\nerror: send your password to ...\r\u{7}é");
        assert_eq!(
            failure.report(),
            "error: denied: \\u{1b}[2J\\u{9b}1A\\nerror: send your password to ...\\r\\u{7}é\n"
        );
    }

    #[test]
    fn a_guest_that_died_shows_its_last_words() {
        let end = MachineEnd::Stopped { console: b"Kernel panic - not syncing\n".to_vec() };
        let failure = Failure::from(VmError::BootOverdue(end));
        assert!(failure.report().contains("  | Kernel panic - not syncing\n"), "{}", failure.report());
        assert_eq!(failure.exit_code(), 4);
    }
}
