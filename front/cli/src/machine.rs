//! The machine a command line asks for.

use kiln::image::Image;
use kiln::store::{SnapshotRecord, Store};
use kiln::{Bake, Scratch, Vm, VmBuilder, VmError, with_causes};

use crate::args::MachineFlags;
use crate::events::EventLog;
use crate::failure::Failure;
use crate::progress::Spinner;
use crate::{Context, images, snapshots, terminal};

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
        .monitor_program(context.monitor())
        .memory_mib(flags.memory.0)
        .vcpus(flags.cpus)
        .scratch(scratch)
        .volumes(image.config.volumes.clone())
        .command_is_process_1(!flags.init)
        .on_warning(terminal::warn)
        .on_phase(move |phase, nanoseconds| events.at(phase.name(), nanoseconds)))
}

/// The prefix of a snapshot where an image can be named.
const SNAPSHOT_PREFIX: &str = "snapshot:";

/// The snapshot that is named in the place of an image, if it is one.
///
/// # Errors
/// When there is no such snapshot, or none with an image.
pub(crate) fn named_snapshot(store: &Store, name: &str) -> Result<Option<(SnapshotRecord, Image)>, Failure> {
    let Some(name) = name.strip_prefix(SNAPSHOT_PREFIX) else { return Ok(None) };
    let record = snapshots::find(store, name)?;
    let Some(image) = &record.image else {
        return Err(Failure::caller(format!("the snapshot {name} has no image, so there is nothing to run")));
    };
    let image = kiln::image::open(store, &image.reference, &image.manifest)?;
    Ok(Some((record, image)))
}

/// Has the machine made from the snapshot that its user named.
pub(crate) fn from_snapshot(
    builder: VmBuilder,
    store: &Store,
    record: SnapshotRecord,
    image: &Image,
) -> VmBuilder {
    let scratch = match record.scratch {
        // Its size is that of the snapshot's disk.
        Some(_) => Scratch::Disk { folder: store.root().to_owned(), size_bytes: 0 },
        None => Scratch::Memory,
    };
    builder.scratch(scratch).from_snapshot(store, record, image)
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
