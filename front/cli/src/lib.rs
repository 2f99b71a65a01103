//! The kiln command line: words in, exit code out. What it does is in the `kiln` library.

#![forbid(unsafe_code)]

mod args;
mod bake;
mod command;
mod doctor;
mod environment;
mod events;
mod failure;
mod images;
mod machine;
mod parts;
mod progress;
mod quantity;
mod run;
mod signals;
mod snapshots;
mod streams;
mod terminal;
mod version;
mod vm;
mod when;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Once, OnceLock};

use clap::{CommandFactory, Parser};
use kiln::monitor::Groups;
use kiln::{GuestBundle, MonitorProgram};

pub use kiln::monitor::MONITOR_NAME;
pub use kiln::{BuiltIn, Digest};

use args::{Cli, Command, Global, ImageCommand, SnapshotCommand};
use failure::Failure;
use vm::args::Verb;

/// What a build of this program knows about itself.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// The version, as Cargo has it.
    pub version: &'static str,
    /// The commit it was built from, or `unknown`.
    pub commit: &'static str,
    /// Guest kernel and initramfs, when they are part of the program.
    pub guest: Option<(BuiltIn, BuiltIn)>,
    /// The monitor, when one that is a program of its own is part of this one.
    pub monitor: Option<BuiltIn>,
}

impl Build {
    fn monitor_program(self) -> MonitorProgram {
        // Where files in memory may not be executed, a start takes longer, and that is all.
        let built_in = self.monitor.map(MonitorProgram::built_in).and_then(Result::ok);
        built_in.unwrap_or_else(MonitorProgram::this)
    }
}

/// The whole command line as data, for man pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the program with this process's arguments.
pub fn main(build: Build) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let context = Context { build, global: cli.global, monitor: Arc::default(), tidied: Once::new() };
    let runs_a_command = match &cli.command {
        Command::Run(_) => true,
        Command::Vm(args) => args.command.runs_a_command(),
        Command::Verb(verb) => verb.runs_a_command(),
        _ => false,
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return finish(Err(Failure::host(error)), runs_a_command),
    };
    let outcome = runtime.block_on(dispatch(&context, cli.command));
    // A read of stdin that nobody waits for any more must not hold up the end.
    runtime.shutdown_background();
    finish(outcome, runs_a_command)
}

async fn dispatch(context: &Context, command: Command) -> Result<u8, Failure> {
    match command {
        Command::Run(args) if args.detach => return vm::run(context, *args).await,
        Command::Run(args) => {
            context.prepare_monitor();
            return run::run(context, *args).await;
        }
        Command::Verb(verb) => return vm::verb(context, verb).await,
        Command::Pull(args) => images::pull(context, args).await?,
        Command::Images(args) => images::list(context, args.json)?,
        Command::Rmi(args) => return images::remove(context, &args.images),
        Command::Image(args) => {
            let ImageCommand::Inspect { image, platform } = args.command;
            images::inspect(context, &image, platform.as_deref())?;
        }
        Command::Bake(args) => bake::bake(context, *args).await?,
        Command::Snapshot(args) => match args.command {
            SnapshotCommand::Ls { json } => snapshots::list(context, json)?,
            SnapshotCommand::Inspect { snapshot } => snapshots::inspect(context, &snapshot)?,
            SnapshotCommand::Rm { snapshots } => return snapshots::remove(context, &snapshots),
            SnapshotCommand::Verify { snapshots } => return snapshots::verify(context, &snapshots),
        },
        Command::Vm(args) => return vm::vm(context, args.command).await,
        Command::Doctor(args) => return doctor::doctor(context, args.json).await,
        Command::Parts(args) => parts::parts(context, &args.folder)?,
        Command::Version(args) => version::version(context, args.json)?,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "kiln", &mut script);
            print_bytes(&script)?;
        }
    }
    Ok(0)
}

fn finish(outcome: Result<u8, Failure>, runs_a_command: bool) -> ExitCode {
    match outcome {
        Ok(code) => code.into(),
        Err(failure) => {
            let _ = io::stderr().write_all(failure.report().as_bytes());
            if runs_a_command { failure.command_exit_code().into() } else { failure.exit_code().into() }
        }
    }
}

/// Prints help and version as asked for, or what is wrong with the words; a wrong `run` ends as all its failures do,
/// so that no exit code of a command can be taken for one of Kiln.
fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if error.exit_code() == 0 {
        return ExitCode::SUCCESS;
    }
    let mut words = std::env::args_os().skip(1).filter(|word| !word.as_encoded_bytes().starts_with(b"-"));
    let word = words.find(|word| word != "vm");
    let runs_a_command =
        word.is_some_and(|word| word == "run" || Verb::RUN_A_COMMAND.iter().any(|verb| word == *verb));
    if runs_a_command { failure::FAILED.into() } else { 2.into() }
}

/// What every command needs to know.
#[derive(Debug)]
struct Context {
    build: Build,
    global: Global,
    /// What machines' processes are made from, once that is known.
    monitor: Arc<OnceLock<MonitorProgram>>,
    tidied: Once,
}

impl Context {
    /// The folder of the store.
    fn root(&self) -> Result<PathBuf, Failure> {
        self.global.root.clone().map_or_else(images::default_root, Ok)
    }

    /// Says something that nobody asked for and everybody should know.
    fn note(&self, text: &str) {
        if !self.global.quiet {
            terminal::note(&format!("note: {text}"));
        }
    }

    /// The guest to boot: the environment's, else the one built in, else the one beside the executable.
    fn guest(&self) -> Result<GuestBundle, Failure> {
        let named =
            std::env::var_os(kiln::bundle::GUEST_DIR_VARIABLE).is_some_and(|folder| !folder.is_empty());
        Ok(match self.build.guest {
            Some((kernel, initramfs)) if !named => GuestBundle::built_in(kernel, initramfs),
            _ => GuestBundle::find()?,
        })
    }

    /// What machines' processes are made from: the monitor that is built in, or this very program, which can be one.
    fn monitor(&self) -> MonitorProgram {
        self.tidy_groups();
        self.monitor.get_or_init(|| self.build.monitor_program()).clone()
    }

    /// Removes what is left of the processes of hosts that died, and says so: once.
    fn tidy_groups(&self) {
        self.tidied.call_once(|| {
            // An error is that of the machine that is made next.
            let cleared = kiln::monitor::groups().ok().flatten().map(Groups::cleared).unwrap_or_default();
            if cleared.groups > 0 {
                self.note(&format!("removed {cleared}"));
            }
        });
    }

    /// Has it made on a thread of its own, so that who asks for it soon need not wait for a file to be written.
    fn prepare_monitor(&self) {
        let (build, monitor) = (self.build, Arc::clone(&self.monitor));
        if build.monitor.is_some() {
            std::thread::spawn(move || {
                monitor.get_or_init(|| build.monitor_program());
            });
        }
    }
}

/// Prints to stdout. A reader that went away is no failure of ours.
fn print(text: &str) -> Result<(), Failure> {
    print_bytes(text.as_bytes())
}

fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::host(format!("cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_are_consistent() {
        command().debug_assert();
    }
}
