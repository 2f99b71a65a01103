//! A command in a guest, as `kiln run` and `kiln vm exec` start one.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::time::Duration;

use kiln::launch::Launch;
use kiln::{ExecBuilder, ExecError, WindowSize};

use crate::args::CommandFlags;
use crate::environment;
use crate::failure::Failure;
use crate::terminal::RawMode;

const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

impl CommandFlags {
    /// Refuses a terminal for a stdin that is none.
    pub(crate) fn check_terminal(&self) -> Result<(), Failure> {
        if self.tty && self.interactive && !io::stdin().is_terminal() {
            return Err(Failure::caller("-t with -i needs a terminal at stdin, and this is none")
                .hint("leave -t out to pipe data in"));
        }
        Ok(())
    }

    /// The environment that was asked for.
    pub(crate) fn environment(&self) -> Result<Vec<OsString>, Failure> {
        environment::words(&self.env_file, &self.env, |name| std::env::var_os(name)).map_err(Failure::caller)
    }

    /// This program's terminal handed to the command, if it is to have it.
    pub(crate) fn raw_mode(&self) -> Result<Option<RawMode>, Failure> {
        (self.tty && self.interactive).then(RawMode::enter).transpose().map_err(Failure::host)
    }

    /// Describes what `launch` says, by `exec`, which has its words.
    pub(crate) fn describe<'vm>(
        &self,
        exec: ExecBuilder<'vm>,
        launch: &Launch,
        window: Option<WindowSize>,
        timeout: Option<Duration>,
    ) -> ExecBuilder<'vm> {
        let mut exec = exec.env(launch.env.iter()).cwd(&launch.workdir).user(&launch.user);
        if let Some(size) = window {
            exec = exec.tty(size);
        }
        if self.interactive {
            exec = exec.stdin();
        }
        if let Some(limit) = timeout {
            exec = exec.timeout(limit);
        }
        exec
    }
}

/// The exit code of a command that could not be started for a reason of its own.
pub(crate) fn refused(error: &ExecError) -> Option<u8> {
    match error.refusal() {
        Some(kiln::Reason::NotFound) => Some(NOT_FOUND),
        Some(kiln::Reason::NotExecutable) => Some(NOT_EXECUTABLE),
        _ => None,
    }
}
