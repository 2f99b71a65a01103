//! Machines made from snapshots, so that none boots twice.
//!
//! ```text
//! boot ─▶ park ─▶ base ─restore─▶ set up, warm up, park ─▶ template ─restore─▶ machine
//!         once per host and shape      once per image and wish                 every time
//! ```
//! A snapshot is known by the digest of everything it depends on ([`key`]), so one that fits is found or there is none, and
//! one that a host or a version of Kiln cannot use is not even tried. Should a monitor refuse one all the same, it is made
//! anew, once.

mod bake;
mod content;
mod error;
mod key;
mod park;
mod restore;
mod service;

use kiln_oci::Image;
use kiln_store::{Session, Snapshot, SnapshotCommands, SnapshotImage, SnapshotRecord, Store, StoreError};
use kiln_support::digest::{Digest, Hasher};
use tokio::try_join;

pub(crate) use content::Content;
pub use content::{HostFile, HostFileError, LogPattern, LogPatternError, Trigger};
pub use error::{BakeError, SnapshotError};
pub(crate) use park::{go_on, park, state_order};
pub use restore::verify;
pub(crate) use restore::{claim, is_hostname, make, scratch, stand};

use crate::baked::Member;
use crate::disk::Disk;
use crate::monitor::{Monitor, RestoreTimes};
use crate::vm::boot::blocking;
use crate::vm::{VmBuilder, VmError};
use key::Keys;

/// Starts writing to a store, which may have to wait for one that collects what is in it.
pub(crate) async fn session(store: &Store) -> Result<Session, BakeError> {
    let store = store.clone();
    blocking(move || store.session()).await.map_err(BakeError::Store)
}

/// Opens a snapshot, which may have to wait likewise.
pub(crate) async fn open(store: &Store, key: &Digest) -> Result<Option<Snapshot>, StoreError> {
    let (store, key) = (store.clone(), *key);
    blocking(move || store.open_snapshot(&key)).await
}

/// Makes a snapshot known, after all it is made of, which may have to wait likewise.
pub(crate) async fn put(session: &Session, record: &SnapshotRecord) -> Result<(), BakeError> {
    let (session, record) = (session.clone(), record.clone());
    blocking(move || session.put_snapshot(&record)).await.map_err(BakeError::Store)
}

/// A machine that was made from a snapshot.
pub(crate) struct Restored {
    pub(crate) monitor: Monitor,
    pub(crate) times: RestoreTimes,
    /// The disk for its changes.
    pub(crate) scratch: Disk,
    /// What it was made from.
    pub(crate) record: SnapshotRecord,
}

/// Where snapshots are kept, and of which image.
#[derive(Clone, Debug)]
pub(crate) struct Snapshots {
    store: Store,
    image: SnapshotImage,
    /// As [`root_of`] has it.
    content: Digest,
}

/// The digest over the objects that an image's disk is made of.
pub(crate) fn root_of(image: &Image) -> Digest {
    let mut root = Hasher::new();
    for object in image.objects() {
        root.update(object.0.as_bytes());
    }
    root.finish()
}

impl Snapshots {
    pub(crate) fn new(store: &Store, image: &Image) -> Self {
        Self {
            store: store.clone(),
            image: SnapshotImage { reference: image.name.clone(), manifest: image.digest },
            content: root_of(image),
        }
    }
}

/// What a start does before its machine can be made from a snapshot.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Bake<'a> {
    /// Another process makes what is needed; this one waits for it.
    WaitingForAnother,
    /// A guest boots, to be saved: once for this host, kernel, memory size and number of vCPUs.
    BootingBase,
    /// The image is mounted in a restored guest, to be saved.
    BakingTemplate,
    /// What is made is in the store; the machine is made from it next.
    Done,
    /// A snapshot in the store could not be used and is made anew.
    Refused(&'a SnapshotError),
    /// No snapshot can be made or used: the machine boots.
    Impossible(&'a VmError),
}

/// Makes a machine from the template of its image, which is baked where there is none, or none that this host can use.
pub(crate) async fn start(builder: &VmBuilder, snapshots: &Snapshots) -> Result<Restored, VmError> {
    let keys = Keys::of(builder, snapshots)?;
    let template = bake::template(builder, snapshots, &keys, None).await?;
    match restore::machine(builder, &template).await {
        Err(VmError::Snapshot(error)) if error.is_the_snapshots() => {
            builder.tell_bake(Bake::Refused(&error));
            let template = bake::template(builder, snapshots, &keys, Some(&template.record)).await?;
            // What was refused has no use any more; if it cannot be removed now, the next collection will.
            let store = snapshots.store.clone();
            let _ = blocking(move || store.collect()).await;
            restore::machine(builder, &template).await
        }
        outcome => outcome,
    }
}

/// Makes a machine from this snapshot and no other.
pub(crate) async fn start_from(
    builder: &VmBuilder,
    store: &Store,
    record: &SnapshotRecord,
) -> Result<Restored, VmError> {
    let snapshot = open(store, &record.key).await.map_err(BakeError::Store)?;
    restore::machine(builder, &snapshot.ok_or(SnapshotError::Gone)?).await
}

/// Makes a machine from a copy of another.
pub(crate) async fn start_from_copy(builder: &VmBuilder, copy: &Snapshot) -> Result<Restored, VmError> {
    restore::machine(builder, copy).await
}

/// What a template is called, and how commands run in its machines, where that is not as the image says.
#[derive(Clone, Debug)]
pub(crate) struct Naming {
    pub(crate) name: String,
    pub(crate) commands: Option<SnapshotCommands>,
}

/// Makes sure that there is a template, and gives it a name.
pub(crate) async fn bake(
    builder: &VmBuilder,
    snapshots: &Snapshots,
    naming: Option<Naming>,
) -> Result<SnapshotRecord, VmError> {
    let keys = Keys::of(builder, snapshots)?;
    let Snapshot { record, .. } = named(builder, snapshots, &keys, None, naming).await?;
    Ok(record)
}

/// The template of the builder's image, for any number of machines to be made from, and the first of them, which waits: so it is known
/// that this host can use it.
///
/// # Panics
/// When [`VmBuilder::snapshots`] was not called.
pub(crate) async fn obtain(
    builder: &VmBuilder,
    naming: Option<Naming>,
) -> Result<(Snapshot, Member), VmError> {
    let snapshots = builder.snapshots.as_ref().expect("the caller says which store takes the snapshot");
    let keys = Keys::of(builder, snapshots)?;
    let template = named(builder, snapshots, &keys, None, naming.clone()).await?;
    match first(builder, &template).await {
        // It is made anew, once, as for a machine that is started.
        Err(VmError::Snapshot(error)) if error.is_the_snapshots() => {
            builder.tell_bake(Bake::Refused(&error));
            let template = named(builder, snapshots, &keys, Some(&template.record), naming).await?;
            let first = first(builder, &template).await?;
            Ok((template, first))
        }
        outcome => outcome.map(|first| (template, first)),
    }
}

/// A machine of a template whose guest waits.
async fn first(builder: &VmBuilder, template: &Snapshot) -> Result<Member, VmError> {
    let (monitor, scratch) = try_join!(builder.spawn_monitor(), scratch(&builder.scratch, template))?;
    stand(&monitor, template, &[&builder.root, &scratch]).await?;
    Ok(Member { monitor, scratch })
}

/// The template, named if a name is given.
async fn named(
    builder: &VmBuilder,
    snapshots: &Snapshots,
    keys: &Keys,
    refused: Option<&SnapshotRecord>,
    naming: Option<Naming>,
) -> Result<Snapshot, VmError> {
    let mut template = bake::template(builder, snapshots, keys, refused).await?;
    if let Some(Naming { name, commands }) = naming {
        let (name, known) = (Some(name), &template.record);
        if name != known.name || commands != known.commands {
            template.record = SnapshotRecord { name, commands, ..template.record };
            put(&session(&snapshots.store).await?, &template.record).await?;
        }
    }
    Ok(template)
}
