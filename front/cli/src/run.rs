//! `kiln run`.

use std::io;

use futures_util::future::OptionFuture;
use kiln::image::Image;
use kiln::launch::{Launch, Overrides};
use kiln::store::{SnapshotRecord, Store};
use kiln::{Blame, Child, ExitStatus, Vm, VmBuilder, WindowSize, signal};
use serde_json::{Map, Value, json};

use crate::args::Run;
use crate::events::{EventLog, monotonic_ns};
use crate::failure::Failure;
use crate::signals::{Signals, Wish};
use crate::terminal;
use crate::{Context, images, machine, progress, streams};

const KILLED: u8 = 128 + 9;
/// How often `-v` is given for the guest's console to be shown.
const SHOW_CONSOLE: u8 = 2;

/// Runs a command in a fresh machine and returns the exit code for this process.
///
/// # Errors
/// What is to be reported.
pub(crate) async fn run(context: &Context, args: Run) -> Result<u8, Failure> {
    let events = EventLog::open(args.json_events.as_deref(), context.global.verbose > 0)?;
    events.now("started");
    args.flags.check_terminal()?;
    let mut signals = Signals::catch().map_err(Failure::host)?;

    let window = args.flags.tty.then(terminal::size);
    let (vm, child, launch) = tokio::select! {
        started = start(context, &args, window, &events) => started?,
        number = signals.fatal() => return Ok(128 + number),
    };
    let raw = args.flags.raw_mode()?;
    let outcome = attend(child, &launch, &mut signals, &events).await;
    drop(raw);
    vm.stop().await;
    outcome
}

async fn start(
    context: &Context,
    args: &Run,
    window: Option<WindowSize>,
    events: &EventLog,
) -> Result<(Vm, Child, Launch), Failure> {
    let env = args.flags.environment()?;
    let store = images::store(context)?;
    let (named, image) = image(context, &store, args).await?;
    events.now("pulled");

    let hostname = match &args.hostname {
        Some(name) => name.clone(),
        None => kiln::random_name().map_err(Failure::host)?,
    };
    let launch = Launch::new(&image.config, overrides(args, env, named.as_ref()))?;

    let spinner = progress::spinner(context, format!("starting {}", args.image));
    let builder = machine::builder(context, &args.machine, &store, &image, events)?;
    let mut builder = console(context, builder)?.hostname(hostname).working_directory(&launch.workdir);
    if let Some(record) = named {
        builder = machine::from_snapshot(builder, &store, record, &image);
    } else if !args.no_snapshot {
        builder = machine::with_snapshots(context, builder, &store, &image, spinner.clone());
    }
    let vm = builder.start().await?;
    drop(spinner);
    match args.flags.describe(vm.exec(launch.argv.iter()), &launch, window, args.timeout).spawn().await {
        Ok(child) => {
            events.now("exec_started");
            Ok((vm, child, launch))
        }
        Err(error) => {
            vm.stop().await;
            Err(error.into())
        }
    }
}

/// The image that is to be run, and the snapshot whose it is when one is named.
///
/// # Errors
/// When there is none, or the snapshot runs a command already and no other is given.
pub(crate) async fn image(
    context: &Context,
    store: &Store,
    args: &Run,
) -> Result<(Option<SnapshotRecord>, Image), Failure> {
    let Some((record, image)) = machine::named_snapshot(store, &args.image)? else {
        return Ok((
            None,
            images::obtain(context, store, &args.image, &args.source, args.pull, false).await?,
        ));
    };
    if let Some(service) = &record.service
        && args.command.is_empty()
        && args.entrypoint.is_none()
    {
        return Err(Failure::caller(format!("{} has its command running already: {service}", args.image))
            .hint("name one to run beside it: kiln run snapshot:NAME -- COMMAND"));
    }
    Ok((Some(record), image))
}

/// What a command line, or the snapshot that it names, wants otherwise than an image says.
pub(crate) fn overrides(
    args: &Run,
    env: Vec<std::ffi::OsString>,
    snapshot: Option<&SnapshotRecord>,
) -> Overrides {
    Overrides {
        entrypoint: args.entrypoint.clone(),
        args: args.command.clone(),
        env,
        user: args.flags.user.clone(),
        workdir: args.flags.workdir.clone(),
    }
    .over(snapshot.and_then(|record| record.commands.as_ref()))
}

/// Shows the guest's console when the user wants to see that much.
fn console(context: &Context, builder: VmBuilder) -> Result<VmBuilder, Failure> {
    if context.global.verbose < SHOW_CONSOLE {
        return Ok(builder);
    }
    let stderr = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3);
    Ok(builder.console(stderr.map_err(|errno| Failure::host(io::Error::from(errno)))?))
}

/// Carries streams and signals until the command's end.
///
/// # Errors
/// When the command's end is not known, or its output cannot be written.
pub(crate) async fn attend(
    mut child: Child,
    launch: &Launch,
    signals: &mut Signals,
    events: &EventLog,
) -> Result<u8, Failure> {
    if let Some(stdin) = child.stdin.take() {
        tokio::spawn(streams::carry_in(stdin));
    }
    let stdout =
        child.stdout.take().map(|from| streams::carry_out(from, rustix::stdio::stdout(), events.clone()));
    let stderr =
        child.stderr.take().map(|from| streams::carry_out(from, rustix::stdio::stderr(), events.clone()));
    let outputs = async {
        let carried = tokio::join!(OptionFuture::from(stdout), OptionFuture::from(stderr));
        carried.0.unwrap_or(Ok(())).and(carried.1.unwrap_or(Ok(())))
    };
    let outputs = tokio::spawn(outputs);

    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            wish = signals.next() => match wish {
                // A guest that takes no signals is ended by the third request.
                Wish::Pass(number) => drop(child.signal(number.into())),
                Wish::Stop => drop(child.signal(launch.stop_signal.into())),
                Wish::Resize => child.resize(terminal::size()),
                Wish::End => return Ok(KILLED),
            },
        }
    };
    tokio::select! {
        carried = outputs => carried
            .map_err(|error| Failure::new(Blame::Kiln, error))?
            .map_err(|error| Failure::host(format!("cannot write the command's output: {error}")))?,
        number = signals.fatal() => return Ok(128 + number),
    }
    let status = status?;
    events.with("exited", monotonic_ns(), particulars(&status));
    Ok(status.shell_code())
}

fn particulars(status: &ExitStatus) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("code".into(), json!(status.code()));
    map.insert("signal".into(), json!(status.signal().map(signal::name)));
    map.insert("timed_out".into(), json!(status.timed_out()));
    map.insert("peak_rss_bytes".into(), json!(status.peak_rss_bytes()));
    map
}
