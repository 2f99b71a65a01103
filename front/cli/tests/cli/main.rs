//! The `kiln` program as its users meet it: words, exit codes, and the monitor it also is. No test here boots a guest;
//! those are in the whole-system tests.

#![forbid(unsafe_code)]

mod monitor;
mod words;

use std::process::{Command, Output};

/// The program, with an environment that does not depend on who runs the test.
fn kiln(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(arguments).env_clear().env("PATH", "/usr/bin:/bin").env("HOME", "/nonexistent");
    command
}

fn run(arguments: &[&str]) -> Output {
    kiln(arguments).output().expect("the program starts")
}

/// Exit code, stdout and stderr in one text, for snapshots.
fn told(arguments: &[&str]) -> String {
    let output = run(arguments);
    format!(
        "exit code {}\n--- stdout\n{}--- stderr\n{}",
        output.status.code().map_or("none".to_owned(), |code| code.to_string()),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
