//! The process that a VM belongs to.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln::detached::{Keeping, Machines, Origin, ScratchKind, VmRecord};
use kiln::image::Image;
use kiln::store::Store;
use kiln::{Scratch, SnapshotError, Standstill, Vm, VmBuilder};
use tokio::signal::unix::{SignalKind, signal};

use super::start::Word;
use crate::failure::Failure;
use crate::{Context, images, terminal};

/// The most warnings that are written to a VM's log: a guest can cause as many as it likes.
const WARNINGS_MAX: usize = 1000;

/// Keeps a VM until it ends. Whoever started this process reads one [`Word`] from its stdout.
///
/// # Errors
/// When the VM cannot be started, which has been said on stdout, or kept.
pub(crate) async fn keep(context: &Context, machines: &Machines, name: &str) -> Result<(), Failure> {
    // A session of its own: no terminal's signals, and no end with whoever started it. One that leads its group already has
    // been started by hand.
    let _ = rustix::process::setsid();
    let (keeping, forked) = match start(context, machines, name).await {
        Ok(started) => started,
        Err(failure) => {
            let (code, refused) = (failure.exit_code(), failure.refused());
            say(&Word::Failed { report: failure.report(), code, refused });
            return Err(failure);
        }
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::host)?;
    let told_to_end = async move {
        let _ = terminate.recv().await;
    };
    let forked_ns =
        forked.map(|standstill| (standstill.frozen.as_nanos() as u64, standstill.still.as_nanos() as u64));
    say(&Word::Ready { forked_ns });
    // Nothing holds this process to where it was started.
    let _ = rustix::process::chdir("/");
    Ok(keeping.serve(told_to_end).await?)
}

/// Says the one word, and lets go of who waits for it.
fn say(word: &Word) {
    // A reader that has gone away needs no word.
    if let Ok(text) = serde_json::to_vec(word) {
        let _ = io::stdout().write_all(&text).and_then(|()| io::stdout().flush());
    }
    if let Ok(null) = OpenOptions::new().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

async fn start(
    context: &Context,
    machines: &Machines,
    name: &str,
) -> Result<(Keeping, Option<Standstill>), Failure> {
    let life = machines.keep(name)?;
    let store = images::store(context)?;
    let (builder, image) = builder(context, &store, life.record())?;
    let mut forked = None;
    let builder = match &life.record().origin {
        Origin::Image if life.record().boots => builder,
        Origin::Image => builder.snapshots(&store, &image).on_bake(|step| {
            if let kiln::Bake::Impossible(why) = step {
                terminal::warn(&format!("booting without a snapshot: {why}"));
            }
        }),
        Origin::Snapshot { key } => {
            let record = store.snapshot(key)?.ok_or(kiln::VmError::Snapshot(SnapshotError::Gone))?;
            builder.from_snapshot(&store, record, &image)
        }
        Origin::Fork { of } => {
            let (copy, standstill) = machines.reach(of)?.copy().await?;
            forked = Some(standstill);
            builder.from_copy(copy, &image)
        }
    };
    let vm = builder.start().await?;
    Ok((Keeping::begin(vm, life, store).await?, forked))
}

/// Describes the machine of a record, and its image; what it is made from is still to be said.
///
/// # Errors
/// When there is no guest, or the image is not there any more.
pub(super) fn builder(
    context: &Context,
    store: &Store,
    record: &VmRecord,
) -> Result<(VmBuilder, Image), Failure> {
    let guest = context.guest()?;
    let guest = match &record.kernel {
        Some(path) => guest.with_kernel(path).map_err(Failure::caller)?,
        None => guest,
    };
    let image = kiln::image::open(store, &record.image.reference, &record.image.manifest)?;
    let scratch = match record.scratch {
        ScratchKind::Disk { bytes } => Scratch::Disk { folder: store.root().to_owned(), size_bytes: bytes },
        ScratchKind::Memory => Scratch::Memory,
        ScratchKind::ReadOnly => Scratch::ReadOnly,
    };
    let warnings = AtomicUsize::new(0);
    let builder = Vm::builder(guest, images::disk(&image)?)
        .monitor_program(context.monitor())
        .memory_mib(record.memory_mib)
        .vcpus(record.vcpus)
        .hostname(record.hostname.as_ref().unwrap_or(&record.name))
        .scratch(scratch)
        .command_is_process_1(record.command_is_process_1)
        .working_directory(record.main.as_ref().map_or("", |main| &main.working_directory))
        .volumes(record.volumes.clone())
        .on_warning(move |line| {
            if warnings.fetch_add(1, Ordering::Relaxed) < WARNINGS_MAX {
                terminal::warn(line);
            }
        });
    Ok((builder, image))
}
