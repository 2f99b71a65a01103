//! The machine a command line asks for.

use kiln::image::Image;
use kiln::store::Store;
use kiln::{Bake, Scratch, Vm, VmBuilder, VmError};

use crate::args::MachineFlags;
use crate::events::EventLog;
use crate::failure::Failure;
use crate::progress::Spinner;
use crate::{Context, images, terminal};

/// Describes the machine.
///
/// # Errors
/// When there is no guest, or the image is not whole.
pub(crate) fn builder(
    context: &Context,
    flags: &MachineFlags,
    store: &Store,
    image: &Image,
    events: &EventLog,
) -> Result<VmBuilder, Failure> {
    let guest = context.guest()?;
    let guest = match &flags.kernel {
        Some(path) => guest.with_kernel(path).map_err(Failure::caller)?,
        None => guest,
    };
    let scratch = if flags.read_only {
        Scratch::ReadOnly
    } else if flags.scratch_in_memory {
        Scratch::Memory
    } else {
        Scratch::Disk { folder: store.root().to_owned(), size_bytes: flags.scratch_size }
    };
    let events = events.clone();
    Ok(Vm::builder(guest, images::disk(image)?)
        .memory_mib(flags.memory.0)
        .vcpus(flags.cpus)
        .scratch(scratch)
        .volumes(image.config.volumes.clone())
        .command_is_process_1(!flags.init)
        .on_warning(terminal::warn)
        .on_phase(move |phase, nanoseconds| events.at(phase.name(), nanoseconds)))
}

/// Has the machine made from a snapshot, and says what that takes where it takes long.
pub(crate) fn with_snapshots(
    context: &Context,
    builder: VmBuilder,
    store: &Store,
    image: &Image,
    spinner: Spinner,
) -> VmBuilder {
    let (quiet, verbose) = (context.global.quiet, context.global.verbose > 0);
    let name = image.name.clone();
    builder.snapshots(store, image).on_bake(move |step| match step {
        Bake::WaitingForAnother => spinner.step(&format!("waiting for another bake of {name}")),
        Bake::BootingBase => spinner.step("booting the guest once for this host (first time only)"),
        Bake::BakingTemplate => spinner.step(&format!("baking {name}")),
        Bake::Done => spinner.back(),
        Bake::Refused(why) if verbose => {
            terminal::note(&format!("baking {name} anew: {}", terminal::printable(&with_causes(why))));
        }
        Bake::Impossible(why) if !quiet && (verbose || is_worth_a_warning(why)) => {
            terminal::warn(&format!("booting without a snapshot: {}", with_causes(why)));
        }
        _ => {}
    })
}

/// A guest that cannot be saved is that every time; a host that is short of something can be helped.
fn is_worth_a_warning(why: &VmError) -> bool {
    matches!(why, VmError::Bake(error) if error.is_hosts())
}

/// An error and what caused it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let line = error.to_string();
        // Some errors already say their cause.
        if !text.contains(&line) {
            text = format!("{text}: {line}");
        }
        cause = error.source();
    }
    text
}
