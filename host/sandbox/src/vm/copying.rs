//! Copies of a machine that runs: into a store as a snapshot, or into files that nobody else has, for another machine.
//!
//! ```text
//! running ──memory written──▶ running ──park──▶ parked ──rest and disk written──▶ running      state written, named, recorded
//!           while it goes on            frozen    still                              while the machine goes on
//! ```
//! A copy is taken of a guest that is parked, so whoever is made from it becomes a machine of its own before anything of a
//! user's runs. The source is told of nothing: its processes were frozen for a moment. That moment is measured.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_control::Portion;
use kiln_store::{ObjectId, Snapshot, SnapshotImage, SnapshotKind, SnapshotRecord, Store, StoreError};
use kiln_support::digest::{Digest, Hasher};

use super::boot::{blocking, joined, random, unix_s};
use super::{Machine, Times, Vm, VmError};
use crate::GuestBundle;
use crate::disk::{Disk, nameless_file};
use crate::launch::Launch;
use crate::monitor::Monitor;
use crate::snapshot::{self, BakeError, go_on, park, state_order};

/// How long a guest may take to freeze what runs in it, write out what is dirty, and park.
const PARK_LIMIT: Duration = Duration::from_mins(2);

/// What a machine was made of, as far as a copy of it needs to know.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) guest: Guest,
    pub(crate) image: Option<SnapshotImage>,
    /// What its root disk is made of.
    pub(crate) root: Option<Digest>,
    pub(crate) scratch: Disk,
    /// How commands run in it unless told otherwise.
    pub(crate) commands: Option<Arc<Launch>>,
}

/// Which guest a machine is of.
#[derive(Debug)]
pub(crate) enum Guest {
    Booted {
        bundle: GuestBundle,
        memory_mib: u32,
        vcpus: u32,
    },
    Restored(Box<SnapshotRecord>),
    /// One that is being baked, which is no machine of anybody's yet.
    Baking,
}

/// A copy of a machine in files that no folder lists. Any number of machines can be made from it, one after the other.
#[derive(Debug)]
pub struct MachineCopy(pub(crate) Snapshot);

/// For how long a machine that was copied did nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standstill {
    /// From the request to the guest until it went on: its processes ran for none of this at its longest.
    pub frozen: Duration,
    /// How long of it the machine itself stood still.
    pub still: Duration,
}

/// The files of a machine that are one moment's.
struct Files {
    memory: File,
    scratch: Option<File>,
}

impl Vm {
    pub(crate) fn new(monitor: Monitor, origin: Origin, times: Times) -> Self {
        let machine = Arc::new(Machine { monitor, origin, paused: tokio::sync::Mutex::default() });
        Self { machine, times, lease: None }
    }

    /// Saves the machine to a store, where it is called `name` if one is given, and lets it go on. The record of it is there
    /// when this returns, or nothing is.
    ///
    /// A copy that was begun is finished even if this future is dropped, so that the machine goes on.
    ///
    /// # Errors
    /// [`VmError::Paused`]; [`VmError::Bake`] when the guest cannot park or the store cannot take it. The machine goes on.
    pub async fn snapshot(
        &self,
        store: &Store,
        name: Option<String>,
    ) -> Result<(SnapshotRecord, Standstill), VmError> {
        let (machine, store) = (Arc::clone(&self.machine), store.clone());
        finish(async move { machine.save_to(&store, name).await }).await
    }

    /// Copies the machine into files without a name in `folder`, for [`VmBuilder::from_copy`](super::VmBuilder::from_copy) to make
    /// others from, and lets it go on. Two machines of which one is a copy of the other are a fork.
    ///
    /// A copy that was begun is finished even if this future is dropped, so that the machine goes on.
    ///
    /// # Errors
    /// [`VmError::Paused`]; [`VmError::Bake`] when the guest cannot park or the host is out of space. The machine goes on.
    pub async fn copy(&self, folder: impl Into<PathBuf>) -> Result<(MachineCopy, Standstill), VmError> {
        let (machine, folder) = (Arc::clone(&self.machine), folder.into());
        finish(async move { machine.copy_to(folder).await }).await
    }
}

impl MachineCopy {
    /// What the copy is of.
    pub fn record(&self) -> &SnapshotRecord {
        &self.0.record
    }

    /// Its parts, to be given to another process.
    pub fn into_parts(self) -> (SnapshotRecord, Vec<OwnedFd>) {
        let Snapshot { record, memory, state, scratch } = self.0;
        (record, [memory, state].into_iter().chain(scratch).map(OwnedFd::from).collect())
    }

    /// The copy whose parts these are; `None` when one is missing.
    pub fn from_parts(record: SnapshotRecord, files: Vec<OwnedFd>) -> Option<Self> {
        let mut files = files.into_iter().map(File::from);
        let (memory, state, scratch) = (files.next()?, files.next()?, files.next());
        (scratch.is_some() == record.scratch.is_some() && files.next().is_none()).then_some(Self(Snapshot {
            record,
            memory,
            state,
            scratch,
        }))
    }
}

/// Does what must not end in the middle, whoever waits for it.
async fn finish<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    joined(tokio::spawn(work)).await
}

impl Machine {
    async fn save_to(
        self: Arc<Self>,
        store: &Store,
        name: Option<String>,
    ) -> Result<(SnapshotRecord, Standstill), VmError> {
        let session = snapshot::session(store).await?;
        // What is restored needs the image, and from the record on the store keeps it.
        if let Some(image) = &self.origin.image {
            let (session, manifest) = (session.clone(), image.manifest);
            if blocking(move || session.use_image(&manifest)).await.map_err(BakeError::Store)?.is_none() {
                let what = format!("the machine's image {}", image.reference);
                return Err(BakeError::Store(StoreError::Missing { what }).into());
            }
        }
        let memory = session.new_draft().map_err(BakeError::Store)?;
        let scratch =
            self.has_scratch().then(|| session.new_draft()).transpose().map_err(BakeError::Store)?;
        let files = Files {
            memory: duplicate(memory.file())?,
            scratch: scratch.as_ref().map(|draft| duplicate(draft.file())).transpose()?,
        };
        let state = session.new_draft().map_err(BakeError::Store)?;
        // Nobody else saves the machine before its state has been written.
        let paused = self.paused.lock().await;
        let standstill = self.write(*paused, files).await?;
        let memory = blocking(move || memory.adopt()).await.map_err(BakeError::Store)?;
        let record = self.record(memory)?;
        self.write_state(&record, state.file()).await?;
        drop(paused);
        let state = blocking(move || state.adopt_as_blob()).await.map_err(BakeError::Store)?;
        let scratch = match scratch {
            Some(draft) => Some(blocking(move || draft.adopt()).await.map_err(BakeError::Store)?),
            None => None,
        };
        let record = SnapshotRecord { key: key(&state, scratch), name, state, scratch, ..record };
        snapshot::put(&session, &record).await?;
        Ok((record, standstill))
    }

    async fn copy_to(self: Arc<Self>, folder: PathBuf) -> Result<(MachineCopy, Standstill), VmError> {
        let file = || {
            nameless_file(&folder).map_err(|source| BakeError::Host {
                action: "make a file in",
                what: folder.display().to_string(),
                source,
            })
        };
        let (memory, state) = (file()?, file()?);
        let scratch = self.has_scratch().then(file).transpose()?;
        let files =
            Files { memory: duplicate(&memory)?, scratch: scratch.as_ref().map(duplicate).transpose()? };
        let paused = self.paused.lock().await;
        let standstill = self.write(*paused, files).await?;
        // Nobody looks for what has no name in a store; a name of its own keeps its parts together.
        let name = || Ok::<_, VmError>(Digest::from_bytes(random()?));
        let record = self.record(ObjectId(name()?))?;
        self.write_state(&record, &state).await?;
        drop(paused);
        let scratch_name = scratch.is_some().then(name).transpose()?.map(ObjectId);
        let record = SnapshotRecord { key: name()?, state: name()?, scratch: scratch_name, ..record };
        Ok((MachineCopy(Snapshot { record, memory, state, scratch }), standstill))
    }

    /// Parks the guest, writes its memory and its disk, and lets it go on.
    async fn write(self: &Arc<Self>, is_paused: bool, files: Files) -> Result<Standstill, VmError> {
        if is_paused {
            return Err(VmError::Paused);
        }
        if matches!(self.origin.guest, Guest::Baking) {
            return Err(VmError::Baking);
        }
        // Most of it is copied while the guest runs.
        self.monitor.save_portion(Portion::Ahead, &files.memory).await.map_err(BakeError::Save)?;
        let _alone = self.monitor.requests.write().await;
        let asked = Instant::now();
        let parked_ns = self.park().await?;
        let written = self.write_parked(files).await;
        let entered = go_on(&self.monitor).await?;
        let frozen = asked.elapsed();
        written?;
        Ok(Standstill { frozen, still: Duration::from_nanos(entered.entered_ns.saturating_sub(parked_ns)) })
    }

    /// Writes memory and disk of a parked guest, both at a time.
    async fn write_parked(&self, files: Files) -> Result<(), BakeError> {
        let Files { memory, scratch } = files;
        let disk = async {
            let (Some(to), Some(extent)) = (scratch, self.origin.scratch.extents.first()) else {
                return Ok(());
            };
            let error =
                |source| BakeError::Host { action: "copy", what: "the machine's disk".into(), source };
            let from = extent.data.try_clone().map_err(error)?;
            blocking(move || kiln_support::sparse::copy(&from, &to)).await.map_err(error)
        };
        let memory =
            async { self.monitor.save_portion(Portion::Rest, &memory).await.map_err(BakeError::Save) };
        // Both to their end: nothing may write to the files once their owner has them back.
        let (memory, disk) = tokio::join!(memory, disk);
        memory.and(disk.map(|()| Duration::ZERO)).map(drop)
    }

    /// Writes the state that goes with the memory that was written last.
    async fn write_state(&self, record: &SnapshotRecord, file: &File) -> Result<(), BakeError> {
        let order = state_order(&record.kernel, &record.initramfs, record.memory);
        self.monitor.save_state(order, file).await.map(drop).map_err(BakeError::Save)
    }

    /// Has the agent park, and says when it did. A guest that parks when nobody waits any more goes on at once.
    async fn park(self: &Arc<Self>) -> Result<u64, BakeError> {
        let before = self.monitor.parks();
        let machine = Arc::clone(self);
        let mut parking = Box::pin(async move { park(&machine.monitor, before).await });
        if let Ok(parked) = tokio::time::timeout(PARK_LIMIT, parking.as_mut()).await {
            return parked;
        }
        let machine = Arc::clone(self);
        tokio::spawn(async move {
            if parking.await.is_ok() {
                let _ = go_on(&machine.monitor).await;
            }
        });
        Err(BakeError::ParkTooSlow)
    }

    fn has_scratch(&self) -> bool {
        !self.origin.scratch.extents.is_empty()
    }

    /// A record of the machine as it is now, of which only the memory has its name.
    fn record(&self, memory: ObjectId) -> Result<SnapshotRecord, VmError> {
        let (memory_mib, vcpus, kernel, initramfs, service, commands) = match &self.origin.guest {
            Guest::Booted { bundle, memory_mib, vcpus } => {
                let (kernel, initramfs) = bundle.digests().map_err(|source| BakeError::Host {
                    action: "read",
                    what: "the guest's kernel and initramfs".into(),
                    source,
                })?;
                (*memory_mib, *vcpus, kernel, initramfs, None, None)
            }
            Guest::Restored(from) => {
                let (service, commands) = (from.service.clone(), from.commands.clone());
                (from.memory_mib, from.vcpus, from.kernel, from.initramfs, service, commands)
            }
            Guest::Baking => return Err(VmError::Baking),
        };
        Ok(SnapshotRecord {
            key: Digest::EMPTY,
            kind: SnapshotKind::Saved,
            name: None,
            image: self.origin.image.clone(),
            root: self.origin.root,
            service,
            commands: self.origin.commands.as_deref().map(Into::into).or(commands),
            memory,
            state: Digest::EMPTY,
            scratch: None,
            memory_mib,
            vcpus,
            kernel,
            initramfs,
            created_unix_s: unix_s(),
        })
    }
}

/// What a saved machine is known by: its state, which names its memory, and its disk.
fn key(state: &Digest, scratch: Option<ObjectId>) -> Digest {
    let mut key = Hasher::new();
    key.update(b"kiln saved machine");
    key.update(state.as_bytes());
    if let Some(scratch) = scratch {
        key.update(scratch.0.as_bytes());
    }
    key.finish()
}

fn duplicate(file: &File) -> Result<File, BakeError> {
    file.try_clone().map_err(|source| BakeError::Host {
        action: "duplicate",
        what: "a file of the copy".into(),
        source,
    })
}
