//! The rig.

use std::process::ExitCode;

/// Runs a command in the rig.
pub(crate) fn run(_args: &[String]) -> ExitCode {
    eprintln!("xtask rig: not part of this tree yet");
    ExitCode::from(125)
}
