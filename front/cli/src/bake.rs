//! `kiln bake`.

use std::ffi::OsString;
use std::path::Path;

use kiln::image::Config;
use kiln::launch::{Launch, LaunchError, Overrides};
use kiln::{HostFile, Trigger, VmBuilder};

use crate::args::{Bake, Ready};
use crate::events::EventLog;
use crate::failure::Failure;
use crate::{Context, environment, images, machine, print, progress, snapshots};

/// What a warm-up is handed to.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];
/// The most files that are put into one guest.
const EXTRA_FILES_MAX: usize = 256;

/// Bakes an image and prints the snapshot's key.
///
/// # Errors
/// When there is no such image, or it cannot be baked.
pub(crate) async fn bake(context: &Context, args: Bake) -> Result<(), Failure> {
    let events = EventLog::open(None, context.global.verbose > 0)?;
    let store = images::store(context)?;
    let image = images::obtain(context, &store, &args.image, &args.source, args.pull, false).await?;
    let spinner = progress::spinner(context, format!("looking for {}", args.image));
    let builder = machine::builder(context, &args.machine, &store, &image, &events)?;
    let builder = with_content(builder, &args, &image.config)?;
    let builder = machine::with_snapshots(context, builder, &store, &image, spinner.clone());
    let snapshot = builder.bake(args.name).await?;
    drop(spinner);
    if args.json {
        return print(&format!("{:#}\n", snapshots::describe(&store, &snapshot)));
    }
    print(&format!("{}\n", snapshot.key))
}

/// Adds what the snapshot is to have beside the image.
fn with_content(mut builder: VmBuilder, args: &Bake, config: &Config) -> Result<VmBuilder, Failure> {
    let env = environment::words(&[], &args.env, |name| std::env::var_os(name)).map_err(Failure::caller)?;
    if args.extra_file.len() > EXTRA_FILES_MAX {
        return Err(Failure::caller(format!("more than {EXTRA_FILES_MAX} files to put into the guest"))
            .hint("make an image of them, or unpack an archive in a warm-up"));
    }
    for (host, guest) in &args.extra_file {
        builder = builder.extra_file(open(host)?, guest);
    }
    let shell = |command: &OsString| Overrides {
        entrypoint: Some(SHELL[0].into()),
        args: vec![SHELL[1].into(), command.clone()],
        env: env.clone(),
        ..Overrides::default()
    };
    for command in &args.warmup {
        builder = builder.warm_up(Launch::new(config, shell(&command.into()))?);
    }
    for script in &args.warmup_file {
        let launch = Launch::new(config, shell(&script.into()))?;
        builder = builder.warm_up_by_script(open(script)?, launch);
    }
    if let Some(trigger) = trigger(&args.ready) {
        let overrides = Overrides { args: args.command.clone(), env, ..Overrides::default() };
        let launch = Launch::new(config, overrides).map_err(|error| match error {
            LaunchError::NoCommand => {
                Failure::from(error).hint("name one after the image: kiln bake IMAGE -- COMMAND")
            }
            other => other.into(),
        })?;
        builder = builder.service(launch, trigger, args.ready_timeout);
    }
    Ok(builder)
}

fn open(path: &Path) -> Result<HostFile, Failure> {
    HostFile::open(path).map_err(Failure::caller)
}

fn trigger(ready: &Ready) -> Option<Trigger> {
    let port = ready.port.map(Trigger::Port);
    let file = || ready.file.clone().map(Trigger::File);
    let log = || ready.log.clone().map(Trigger::Log);
    port.or_else(file).or_else(log)
}
