//! `kiln bake`.

use kiln::launch::{Launch, Overrides};

use crate::args::Bake;
use crate::events::EventLog;
use crate::failure::Failure;
use crate::{Context, environment, images, machine, print, progress, snapshots};

/// What a warm-up is handed to.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];

/// Bakes an image and prints the snapshot's key.
///
/// # Errors
/// When there is no such image, or it cannot be baked.
pub(crate) async fn bake(context: &Context, args: Bake) -> Result<(), Failure> {
    let events = EventLog::open(None, context.global.verbose > 0)?;
    let env = environment::words(&[], &args.env, |name| std::env::var_os(name)).map_err(Failure::caller)?;
    let store = images::store(context)?;
    let image = images::obtain(context, &store, &args.image, &args.source, args.pull, false).await?;
    let spinner = progress::spinner(context, format!("looking for {}", args.image));
    let mut builder = machine::builder(context, &args.machine, &store, &image, &events)?;
    for command in &args.warmup {
        let overrides = Overrides {
            entrypoint: Some(SHELL[0].into()),
            args: vec![SHELL[1].into(), command.into()],
            env: env.clone(),
            ..Overrides::default()
        };
        builder = builder.warm_up(Launch::new(&image.config, overrides)?);
    }
    let builder = machine::with_snapshots(context, builder, &store, &image, spinner.clone());
    let snapshot = builder.bake(args.name).await?;
    drop(spinner);
    if args.json {
        return print(&format!("{:#}\n", snapshots::describe(&store, &snapshot)));
    }
    print(&format!("{}\n", snapshot.key))
}
