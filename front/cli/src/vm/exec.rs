//! `kiln vm exec`.

use kiln::detached::Machines;
use kiln::image::Config;
use kiln::launch::{Launch, Overrides};

use super::args::Exec;
use crate::command::Spawned;
use crate::events::EventLog;
use crate::failure::Failure;
use crate::run;
use crate::signals::Signals;
use crate::terminal;

/// Runs a command in a VM that runs, and returns its exit code.
///
/// # Errors
/// What is to be reported with exit code [`run::FAILED`].
pub(crate) async fn exec(machines: &Machines, args: Exec) -> Result<u8, Failure> {
    let Exec { flags, timeout, vm, command } = args;
    flags.check_terminal()?;
    let env = flags.environment()?;
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
    let (user, workdir) = (flags.user.clone(), flags.workdir.clone());
    let overrides = Overrides { entrypoint: Some("".into()), args: command, env, user, workdir };
    let launch = Launch::new(&config, overrides)?;

    let window = flags.tty.then(terminal::size);
    let spawned = tokio::select! {
        spawned = flags.spawn(kept.exec(launch.argv.iter()), &launch, window, timeout) => spawned?,
        number = signals.fatal() => return Ok(128 + number),
    };
    let child = match spawned {
        Spawned::Child(child) => child,
        Spawned::Refused(code) => return Ok(code),
    };
    let raw = flags.raw_mode()?;
    let outcome = run::attend(child, &launch, &mut signals, &EventLog::default()).await;
    drop(raw);
    outcome.map_err(|failure| failure.hint(format!("kiln vm inspect {vm} says how the VM is")))
}
