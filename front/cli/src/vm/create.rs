//! Making VMs: from an image, from a snapshot, from one that runs.

use std::ffi::OsString;

use kiln::detached::{Defaults, Machines, Origin, ScratchKind, State, VmRecord};
use kiln::image::Image;
use kiln::store::{SnapshotCommands, SnapshotImage, SnapshotKind, SnapshotRecord, Store};

use super::args::Create;
use super::{names, start};
use crate::args::MachineFlags;
use crate::failure::Failure;
use crate::{Context, images, print, snapshots};

/// `kiln vm create`.
///
/// # Errors
/// When there is no such image, or the name is taken.
pub(crate) async fn create(context: &Context, machines: &Machines, args: Create) -> Result<(), Failure> {
    let Create { name, publish, machine, source, pull, image } = args;
    // A name that cannot be had is told before an image is fetched.
    if let Some(name) = &name {
        drop(machines.create(name)?);
    }
    let store = images::store(context)?;
    let image = images::obtain(context, &store, &image, &source, pull, false).await?;
    let ports = publish.into_iter().map(Into::into).collect();
    let record = VmRecord { ports, ..blank(machines, name, &image)? };
    let record = put(machines, shaped(context, record, &machine)?)?;
    print(&format!("{}\n", record.name))
}

/// The record with the machine that a command line asks for.
///
/// # Errors
/// When it names a kernel that is none.
pub(super) fn shaped(
    context: &Context,
    record: VmRecord,
    machine: &MachineFlags,
) -> Result<VmRecord, Failure> {
    let kernel = match &machine.kernel {
        Some(path) => {
            context.guest()?.with_kernel(path).map_err(Failure::caller)?;
            Some(std::path::absolute(path).map_err(Failure::host)?)
        }
        None => None,
    };
    let (memory_mib, vcpus) = (machine.memory.0, machine.cpus);
    Ok(VmRecord { kernel, scratch: scratch(machine), memory_mib, vcpus, ..record })
}

/// `kiln vm restore`.
///
/// # Errors
/// When there is no such snapshot, the name is taken, or the VM does not start.
pub(crate) async fn restore(
    context: &Context,
    machines: &Machines,
    name: Option<String>,
    snapshot: &str,
) -> Result<(), Failure> {
    let store = images::store(context)?;
    let saved = snapshots::find(&store, snapshot)?;
    let image = match &saved.image {
        Some(image) if saved.kind == SnapshotKind::Saved => image,
        _ => {
            let what = format!("the snapshot {snapshot} is not of a VM but a {}", saved.kind.name());
            return Err(Failure::caller(what).hint("make a VM from its image: kiln vm create IMAGE"));
        }
    };
    let image = kiln::image::open(&store, &image.reference, &image.manifest)?;
    let blank = blank(machines, name, &image)?;
    let record = VmRecord {
        origin: Origin::Snapshot { key: saved.key },
        memory_mib: saved.memory_mib,
        vcpus: saved.vcpus,
        scratch: saved_scratch(&store, &saved)?,
        defaults: saved_defaults(&saved, &blank.defaults),
        ..blank
    };
    let record = put_and_start(context, machines, record).await?;
    print(&format!("{}\n", record.name))
}

/// Where the changes of a machine go that is made from a snapshot.
///
/// # Errors
/// When the snapshot's disk is missing.
pub(super) fn saved_scratch(store: &Store, saved: &SnapshotRecord) -> Result<ScratchKind, Failure> {
    Ok(match saved.scratch {
        Some(id) => ScratchKind::Disk { bytes: store.object(id)?.length() },
        None => ScratchKind::Memory,
    })
}

/// How commands run in a machine that is made from a snapshot, of an image that says `defaults`.
pub(super) fn saved_defaults(saved: &SnapshotRecord, defaults: &Defaults) -> Defaults {
    let Some(SnapshotCommands { env, user, working_directory }) = &saved.commands else {
        return defaults.clone();
    };
    let env = env.iter().map(|word| OsString::from(word).to_string_lossy().into_owned()).collect();
    Defaults { env, user: user.clone(), working_directory: working_directory.clone() }
}

/// `kiln vm fork`.
///
/// # Errors
/// When there is no such VM or it does not run, the name is taken, or the second does not start.
pub(crate) async fn fork(
    context: &Context,
    machines: &Machines,
    name: Option<String>,
    vm: &str,
) -> Result<(), Failure> {
    let source = machines.find(machines.reach(vm)?.name())?;
    if source.state == State::Paused {
        return Err(
            Failure::caller(format!("the VM {vm} is paused")).hint(format!("let it go on: kiln resume {vm}"))
        );
    }
    let fresh = named(machines, name)?;
    let VmRecord { memory_mib, vcpus, scratch, kernel, volumes, defaults, .. } = source;
    let origin = Origin::Fork { of: source.name };
    let record = VmRecord::new(fresh.id, fresh.name, source.image, origin);
    let record = VmRecord { memory_mib, vcpus, scratch, kernel, volumes, defaults, ..record };
    let record = put_and_start(context, machines, record).await?;
    print(&format!("{}\n", record.name))
}

/// Makes a VM known and starts it. One that cannot start is not there either.
///
/// # Errors
/// When the name is taken, or the VM does not start.
pub(super) async fn put_and_start(
    context: &Context,
    machines: &Machines,
    record: VmRecord,
) -> Result<VmRecord, Failure> {
    let record = put(machines, record)?;
    let started = async {
        start::bake(context, &record).await?;
        start::keeper(context, machines, &record).await
    };
    if let Err(failure) = started.await {
        // The first failure is the one to report.
        let _ = machines.remove(&record.name);
        return Err(failure);
    }
    Ok(record)
}

fn put(machines: &Machines, record: VmRecord) -> Result<VmRecord, Failure> {
    machines.create(&record.name)?.put(&record)?;
    Ok(record)
}

/// A VM that was named.
struct Named {
    id: String,
    name: String,
}

fn named(machines: &Machines, name: Option<String>) -> Result<Named, Failure> {
    let id = kiln::random_name().map_err(Failure::host)?;
    Ok(Named { name: name.map_or_else(|| names::fresh(machines), Ok)?, id })
}

/// The record of a VM of which only the image is known.
///
/// # Errors
/// When no name can be made up.
pub(super) fn blank(machines: &Machines, name: Option<String>, image: &Image) -> Result<VmRecord, Failure> {
    let Named { id, name } = named(machines, name)?;
    let config = &image.config;
    let defaults = Defaults {
        env: config.env.clone(),
        user: config.user.clone(),
        working_directory: config.working_dir.clone(),
    };
    let of = SnapshotImage { reference: image.name.clone(), manifest: image.digest };
    Ok(VmRecord { volumes: config.volumes.clone(), defaults, ..VmRecord::new(id, name, of, Origin::Image) })
}

fn scratch(machine: &MachineFlags) -> ScratchKind {
    if machine.read_only {
        ScratchKind::ReadOnly
    } else if machine.scratch_in_memory {
        ScratchKind::Memory
    } else {
        ScratchKind::Disk { bytes: machine.scratch_size }
    }
}
