//! `kiln run -d`: a VM that stays for as long as its command runs.

use kiln::detached::{Machines, MainCommand, Origin, VmRecord};
use kiln::launch::Launch;

use super::create;
use crate::args::Run;
use crate::failure::Failure;
use crate::{Context, images, print, run};

/// Starts a VM with a command, and prints its id.
///
/// # Errors
/// When the VM or its command cannot be started; there is no VM then.
pub(crate) async fn run(context: &Context, machines: &Machines, args: Run) -> Result<u8, Failure> {
    let env = args.flags.environment()?;
    // A name that cannot be had is told before an image is fetched.
    if let Some(name) = &args.name {
        drop(machines.create(name)?);
    }
    let store = images::store(context)?;
    let (saved, image) = run::image(context, &store, &args).await?;
    let launch = Launch::new(&image.config, run::overrides(&args, env, saved.as_ref()))?;
    let timeout_ms = args.timeout.map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX));
    let (terminal, stdin) = (args.flags.tty, args.flags.interactive);
    let main = MainCommand { terminal, stdin, timeout_ms, ..launch.into() };
    let blank = create::blank(machines, args.name, &image)?;
    let record = match saved {
        Some(saved) => VmRecord {
            origin: Origin::Snapshot { key: saved.key },
            memory_mib: saved.memory_mib,
            vcpus: saved.vcpus,
            scratch: create::saved_scratch(&store, &saved)?,
            defaults: create::saved_defaults(&saved, &blank.defaults),
            ..blank
        },
        None => create::shaped(context, blank, &args.machine)?,
    };
    let record = VmRecord {
        main: Some(main),
        ports: args.publish.into_iter().map(Into::into).collect(),
        hostname: args.hostname,
        command_is_process_1: !args.machine.init,
        boots: args.no_snapshot,
        remove_when_ended: args.rm,
        ..record
    };
    let record = create::put_and_start(context, machines, record).await?;
    print(&format!("{}\n", record.id))?;
    Ok(0)
}
