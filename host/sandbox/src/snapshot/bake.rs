//! Making snapshots: each once, whoever asks for it and how many do at once.

use std::sync::Arc;
use std::time::Duration;

use kiln_store::{
    BakeLock, Draft, MAX_OBJECT_BYTES, ObjectId, Session, Snapshot, SnapshotKind, SnapshotRecord, Store,
    StoreError,
};
use kiln_support::digest::Digest;
use rustix::time::ClockId;

use super::content::{WarmUp, WarmUpByCode, words};
use super::key::Keys;
use super::park::{park, state_order};
use super::restore::restore;
use super::service::Running;
use super::{Bake, BakeError, Snapshots};
use crate::disk::{Disk, Scratch, ScratchError};
use crate::monitor::{Monitor, RestoreTimes};
use crate::vm::boot::{self, blocking, clock_ns, unix_s};
use crate::vm::copying::{Guest, Origin};
use crate::vm::{ExecBuilder, Phase, Times, Vm, VmBuilder, VmError};

/// How long the agent may take to freeze what runs, write out what is dirty, and park.
const PARK_LIMIT: Duration = Duration::from_mins(5);
/// The host name of guests that nobody sees.
const HOSTNAME: &str = "kiln";
/// How much of what a failed warm-up wrote is shown, in bytes.
const WARMUP_TAIL_BYTES: usize = 2000;

/// The template of the builder's image, baked when the store does not have it, or only `refused`.
pub(super) async fn template(
    builder: &VmBuilder,
    snapshots: &Snapshots,
    keys: &Keys,
    refused: Option<&SnapshotRecord>,
) -> Result<Snapshot, VmError> {
    let store = &snapshots.store;
    check_size(&builder.scratch)?;
    let _lock = match find_or_lock(builder, store, &keys.template, refused).await? {
        Found::Snapshot(snapshot) => return Ok(*snapshot),
        Found::Lock(lock) => lock,
    };
    let base = base(builder, store, &keys.base, None).await?;
    let baked = match bake_template(builder, snapshots, keys, &base).await {
        Err(VmError::Snapshot(error)) if error.is_the_snapshots() => {
            builder.tell_bake(Bake::Refused(&error));
            let base = self::base(builder, store, &keys.base, Some(&base.record)).await?;
            bake_template(builder, snapshots, keys, &base).await
        }
        outcome => outcome,
    }?;
    builder.tell(Phase::TemplateBaked, clock_ns(ClockId::Monotonic));
    builder.tell_bake(Bake::Done);
    Ok(baked)
}

/// Refuses before anything is done what the store would refuse at its end.
fn check_size(scratch: &Scratch) -> Result<(), BakeError> {
    match *scratch {
        Scratch::Disk { size_bytes, .. } if size_bytes > MAX_OBJECT_BYTES => {
            let what = "a scratch disk that is saved";
            Err(BakeError::Store(StoreError::TooLarge { what, bytes: size_bytes, limit: MAX_OBJECT_BYTES }))
        }
        _ => Ok(()),
    }
}

/// The base that templates of this shape are made from, likewise.
async fn base(
    builder: &VmBuilder,
    store: &Store,
    key: &Digest,
    refused: Option<&SnapshotRecord>,
) -> Result<Snapshot, VmError> {
    let _lock = match find_or_lock(builder, store, key, refused).await? {
        Found::Snapshot(snapshot) => return Ok(*snapshot),
        Found::Lock(lock) => lock,
    };
    builder.tell_bake(Bake::BootingBase);
    let baked = bake_base(builder, store, key).await?;
    builder.tell(Phase::BaseBaked, clock_ns(ClockId::Monotonic));
    Ok(baked)
}

/// What there is, or the right to make it.
enum Found {
    Snapshot(Box<Snapshot>),
    Lock(BakeLock),
}

async fn find_or_lock(
    builder: &VmBuilder,
    store: &Store,
    key: &Digest,
    refused: Option<&SnapshotRecord>,
) -> Result<Found, VmError> {
    if let Some(found) = find(store, key, refused).await? {
        return Ok(Found::Snapshot(Box::new(found)));
    }
    let lock = if let Some(lock) = store.try_bake_lock(key).map_err(BakeError::Store)? {
        lock
    } else {
        builder.tell_bake(Bake::WaitingForAnother);
        let (store, key) = (store.clone(), *key);
        blocking(move || store.bake_lock(&key)).await.map_err(BakeError::Store)?
    };
    // Who had the lock before may have made it.
    Ok(match find(store, key, refused).await? {
        Some(found) => Found::Snapshot(Box::new(found)),
        None => Found::Lock(lock),
    })
}

/// The snapshot with this key, unless it is the one that was refused.
async fn find(
    store: &Store,
    key: &Digest,
    refused: Option<&SnapshotRecord>,
) -> Result<Option<Snapshot>, BakeError> {
    match super::open(store, key).await {
        Ok(found) => Ok(found.filter(|found| Some(&found.record) != refused)),
        // A record that cannot be read stands for nothing: it is written anew.
        Err(StoreError::Damaged { .. }) => Ok(None),
        Err(error) => Err(BakeError::Store(error)),
    }
}

/// Boots a guest with disks that nothing is behind, and saves it.
async fn bake_base(builder: &VmBuilder, store: &Store, key: &Digest) -> Result<Snapshot, VmError> {
    let session = super::session(store).await?;
    let (kernel, initramfs) = builder.guest.digests().map_err(|source| BakeError::Host {
        action: "read",
        what: "the guest's kernel and initramfs".into(),
        source,
    })?;
    let disks = [Disk::placeholder(true), Disk::placeholder(false)];
    let (monitor, _) = boot::boot(builder, &[&disks[0], &disks[1]], |_, _| {}).await?;
    let record = Recipe { key: *key, kind: SnapshotKind::Base, kernel, initramfs };
    let record = save(builder, &session, monitor, record, None).await?;
    finish(&session, &record).await
}

/// Restores the base with the image's disk, makes it ready for commands, runs the warm-ups, and saves it.
async fn bake_template(
    builder: &VmBuilder,
    snapshots: &Snapshots,
    keys: &Keys,
    base: &Snapshot,
) -> Result<Snapshot, VmError> {
    builder.tell_bake(Bake::BakingTemplate);
    let session = super::session(&snapshots.store).await?;
    let (draft, scratch) = scratch(builder, &session).await?;
    let monitor = builder.spawn_monitor().await?;
    let (monitor, _) = restore(monitor, base, &[&builder.root, &scratch], None, HOSTNAME, |_, _| {}).await?;
    let monitor = boot::set_up(monitor, builder.setup(), HOSTNAME).await?;
    builder.content.write_files(&monitor).await?;
    for command in &builder.content.warmups {
        command.write_script(&monitor).await?;
        warm_up(&monitor, command).await?;
        command.remove_script(&monitor).await?;
    }
    let monitor = match &builder.content.code {
        Some(warm_up) => warm_up_by_code(monitor, warm_up).await?,
        None => monitor,
    };
    let mut service = match &builder.content.service {
        Some(service) => Some(Running::start(&monitor, service).await?),
        None => None,
    };
    let recipe = Recipe {
        key: keys.template,
        kind: SnapshotKind::Template,
        kernel: base.record.kernel,
        initramfs: base.record.initramfs,
    };
    let record = save(builder, &session, monitor, recipe, service.as_mut()).await?;
    let scratch = match draft {
        // The monitor is gone, and with it everybody who could write to the disk.
        Some(draft) => Some(blocking(move || draft.adopt()).await.map_err(BakeError::Store)?),
        None => None,
    };
    let service = builder.content.service.as_ref().map(|service| words(&service.launch));
    // One that takes the place of another is called as that was.
    let before = snapshots.store.snapshot(&keys.template).ok().flatten();
    let (name, commands) = before.map_or((None, None), |before| (before.name, before.commands));
    let (image, root) = (Some(snapshots.image.clone()), Some(snapshots.content));
    finish(&session, &SnapshotRecord { name, commands, scratch, service, image, root, ..record }).await
}

/// Puts the record, after all it names, and opens what it stands for while the session still keeps it.
async fn finish(session: &Session, record: &SnapshotRecord) -> Result<Snapshot, VmError> {
    super::put(session, record).await?;
    let opened = super::open(session.store(), &record.key).await.map_err(BakeError::Store)?;
    let missing = || StoreError::Missing { what: format!("snapshot {}", record.key) };
    Ok(opened.ok_or_else(missing).map_err(BakeError::Store)?)
}

/// The scratch disk of a guest to be saved, and the file of it that becomes an object.
async fn scratch(builder: &VmBuilder, session: &Session) -> Result<(Option<Draft>, Disk), VmError> {
    let Scratch::Disk { folder, size_bytes } = &builder.scratch else {
        return Ok((None, Disk::placeholder(false)));
    };
    let draft = session.new_draft().map_err(BakeError::Store)?;
    let file = draft.file().try_clone();
    let file = file.map_err(|source| ScratchError::File { folder: folder.clone(), source })?;
    let size_bytes = *size_bytes;
    let formatted = blocking(move || kiln_rootfs::scratch(&file, size_bytes).map(|()| file)).await;
    let file = formatted.map_err(ScratchError::from)?;
    Ok((Some(draft), Disk::writable(file, size_bytes)))
}

async fn warm_up(monitor: &Monitor, warmup: &WarmUp) -> Result<(), VmError> {
    let shown = || warmup.shown();
    let launch = &warmup.launch;
    let exec = ExecBuilder::new(monitor, launch.argv.clone())
        .env(launch.env.iter())
        .cwd(&launch.workdir)
        .user(&launch.user)
        .for_warm_up();
    let output = exec
        .output()
        .await
        .map_err(|source| BakeError::Warmup { command: shown(), source: Box::new(source) })?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let tail = String::from_utf8_lossy(&said[said.len().saturating_sub(WARMUP_TAIL_BYTES)..]).into_owned();
    Err(BakeError::WarmupFailed { command: shown(), status: output.status, output: tail }.into())
}

/// Gives the guest to the caller's code, and takes it back.
async fn warm_up_by_code(monitor: Monitor, warm_up: &WarmUpByCode) -> Result<Monitor, VmError> {
    let origin = Origin {
        guest: Guest::Baking,
        image: None,
        root: None,
        scratch: Disk::placeholder(false),
        commands: Some(Arc::clone(&warm_up.launch)),
    };
    let vm = Vm::new(monitor, origin, Times::Restore(RestoreTimes::default()));
    let failed = |source| BakeError::Code { tag: warm_up.tag.clone(), source };
    (warm_up.code)(&vm).await.map_err(failed)?;
    vm.resume().await?;
    vm.into_monitor().ok_or_else(|| failed("it still copies its machine".into()).into())
}

/// What a record says that saving does not find out.
struct Recipe {
    key: Digest,
    kind: SnapshotKind,
    kernel: Digest,
    initramfs: Digest,
}

/// Parks a guest, saves it, and ends its machine. What is saved is in the store then, and the record of it is not.
async fn save(
    builder: &VmBuilder,
    session: &Session,
    monitor: Monitor,
    recipe: Recipe,
    service: Option<&mut Running<'_>>,
) -> Result<SnapshotRecord, VmError> {
    let monitor = match service {
        Some(service) => service.until(parked(monitor)).await?,
        None => parked(monitor).await?,
    };
    let written = write(session, &monitor, &recipe).await;
    // It is waited for either way: while it lives, it keeps the files it was given, and their room.
    monitor.stop().await;
    let (memory, state) = written?;
    let Recipe { key, kind, kernel, initramfs } = recipe;
    Ok(SnapshotRecord {
        key,
        kind,
        name: None,
        image: None,
        root: None,
        service: None,
        commands: None,
        memory,
        state,
        scratch: None,
        memory_mib: builder.memory_mib,
        vcpus: builder.vcpus,
        kernel,
        initramfs,
        created_unix_s: unix_s(),
    })
}

/// Writes a parked guest to the store: its memory, and its state, which names the memory.
async fn write(
    session: &Session,
    monitor: &Monitor,
    recipe: &Recipe,
) -> Result<(ObjectId, Digest), BakeError> {
    let memory = session.new_draft().map_err(BakeError::Store)?;
    monitor.save_memory(memory.file()).await.map_err(BakeError::Save)?;
    let memory = blocking(move || memory.adopt()).await.map_err(BakeError::Store)?;
    let state = session.new_draft().map_err(BakeError::Store)?;
    let order = state_order(&recipe.kernel, &recipe.initramfs, memory);
    monitor.save_state(order, state.file()).await.map_err(BakeError::Save)?;
    let state = blocking(move || state.adopt_as_blob()).await.map_err(BakeError::Store)?;
    Ok((memory, state))
}

/// Has the agent park; a guest that does not is of no use.
async fn parked(monitor: Monitor) -> Result<Monitor, VmError> {
    match tokio::time::timeout(PARK_LIMIT, park(&monitor, 0)).await {
        Ok(parked) => Ok(parked.map(|_| monitor)?),
        Err(_) => Err(BakeError::ParkOverdue(monitor.stop().await).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_larger_than_any_object_is_refused_before_it_is_made() {
        let disk = |size_bytes| Scratch::Disk { folder: "/nonexistent".into(), size_bytes };
        assert!(check_size(&disk(MAX_OBJECT_BYTES)).is_ok());
        assert!(matches!(check_size(&disk(MAX_OBJECT_BYTES + 1)), Err(BakeError::Store(_))));
        assert!(check_size(&Scratch::ReadOnly).is_ok());
    }
}
