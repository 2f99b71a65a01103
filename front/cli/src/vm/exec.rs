//! `kiln vm exec`.

use std::io::{self, IsTerminal};

use kiln::detached::Machines;
use kiln::image::Config;
use kiln::launch::{Launch, Overrides};

use super::args::Exec;
use crate::environment;
use crate::events::EventLog;
use crate::failure::Failure;
use crate::run::{self, NOT_EXECUTABLE, NOT_FOUND};
use crate::signals::Signals;
use crate::terminal::{self, RawMode};

/// Runs a command in a VM that runs, and returns its exit code.
///
/// # Errors
/// What is to be reported with exit code [`run::FAILED`].
pub(crate) async fn exec(machines: &Machines, args: Exec) -> Result<u8, Failure> {
    let Exec { interactive, tty, env, env_file, user, workdir, timeout, vm, command } = args;
    if tty && interactive && !io::stdin().is_terminal() {
        return Err(Failure::caller("-t with -i needs a terminal at stdin, and this is none")
            .hint("leave -t out to pipe data in"));
    }
    let env = environment::words(&env_file, &env, |name| std::env::var_os(name)).map_err(Failure::caller)?;
    let mut signals = Signals::catch().map_err(Failure::host)?;
    let kept = machines.reach(&vm)?;
    let defaults = machines.find(kept.name())?.defaults;
    let config = Config {
        env: defaults.env,
        user: defaults.user,
        working_dir: defaults.working_directory,
        ..Config::default()
    };
    // The image's entrypoint is for who runs the image.
    let overrides = Overrides { entrypoint: Some("".into()), args: command, env, user, workdir };
    let launch = Launch::new(&config, overrides)?;

    let mut exec =
        kept.exec(launch.argv.iter()).env(launch.env.iter()).cwd(&launch.workdir).user(&launch.user);
    if tty {
        exec = exec.tty(terminal::size());
    }
    if interactive {
        exec = exec.stdin();
    }
    if let Some(limit) = timeout {
        exec = exec.timeout(limit);
    }
    let spawned = tokio::select! {
        spawned = exec.spawn() => spawned,
        number = signals.fatal() => return Ok(128 + number),
    };
    let child = match spawned {
        Ok(child) => child,
        Err(error) => {
            let code = match error.refusal() {
                Some(kiln::Reason::NotFound) => NOT_FOUND,
                Some(kiln::Reason::NotExecutable) => NOT_EXECUTABLE,
                _ => return Err(error.into()),
            };
            eprint!("{}", Failure::from(error).report());
            return Ok(code);
        }
    };
    let raw = if tty && interactive { Some(RawMode::enter().map_err(Failure::host)?) } else { None };
    let outcome = run::attend(child, &launch, &mut signals, &EventLog::default()).await;
    drop(raw);
    outcome.map_err(|failure| failure.hint(format!("kiln vm inspect {vm} says how the VM is")))
}
