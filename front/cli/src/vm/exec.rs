//! `kiln exec`.

use kiln::detached::{Happening, Machines};
use kiln::image::Config;
use kiln::launch::{Launch, Overrides};

use super::args::Exec;
use crate::events::EventLog;
use crate::failure::Failure;
use crate::run;
use crate::signals::Signals;
use crate::terminal;

/// Runs a command in a VM that runs, and returns its exit code.
///
/// # Errors
/// What is to be reported.
pub(crate) async fn exec(machines: &Machines, args: Exec) -> Result<u8, Failure> {
    let Exec { detach, flags, timeout, vm, command } = args;
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

    let record = machines.find(kept.name())?;
    let words = launch.argv.iter().map(|word| word.to_string_lossy());
    let shown = words.collect::<Vec<_>>().join(" ");
    let tell = |event, details: &[(&str, &str)]| machines.tell(&record, event, details);
    let window = flags.tty.then(terminal::size);
    let command = flags.describe(kept.exec(launch.argv.iter()), &launch, window, timeout);
    if detach {
        command.spawn_in_background().await?;
        tell(Happening::ExecStart, &[("command", &shown)]);
        return Ok(0);
    }
    let child = tokio::select! {
        spawned = command.spawn() => spawned?,
        number = signals.fatal() => return Ok(128 + number),
    };
    tell(Happening::ExecStart, &[("command", &shown)]);
    let raw = flags.raw_mode()?;
    let outcome = run::attend(child, &launch, &mut signals, &EventLog::default()).await;
    drop(raw);
    if let Ok(code) = &outcome {
        tell(Happening::ExecEnd, &[("command", &shown), ("exit_code", &code.to_string())]);
    }
    outcome.map_err(|failure| failure.hint(format!("kiln inspect {vm} says how the VM is")))
}
