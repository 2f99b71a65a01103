//! Other people's programs: a failure carries what the program said, and a missing one says what to install.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Runs a program quietly to its success.
///
/// # Errors
/// When it is not installed or fails; the error has its stderr.
pub fn run(command: &mut Command) -> Result<()> {
    capture(command).map(drop)
}

/// Runs a program to its success and returns its stdout.
///
/// # Errors
/// When it is not installed or fails; the error has its stderr.
pub fn capture(command: &mut Command) -> Result<Vec<u8>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| {
        format!("cannot start {name}\nhint: `cargo xtask setup` installs what tests need")
    })?;
    if !output.status.success() {
        let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
        bail!("{name} {}: {}\n{}", args.join(" "), output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

/// Copies a program that is to be executed. Another process writes the copy: while this one had it open for writing, a
/// test that starts a program in another thread would hand that descriptor on, and until its `execve` no one could
/// execute the copy (`ETXTBSY`).
///
/// # Errors
/// As [`run`].
pub fn copy_program(from: &Path, to: &Path) -> Result<()> {
    run(Command::new("cp").arg("--preserve=mode").arg(from).arg(to))
}
