//! An image that is ready to make machines of.

mod builder;
mod error;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_oci::Config;
use kiln_oci::Image as Pulled;
use kiln_protocol::mailbox::Bounds;
use kiln_store::{Snapshot, SnapshotImage, SnapshotRecord, Store};
use kiln_support::digest::Digest;
use tokio::try_join;

pub(crate) use builder::WarmUp;
pub use builder::{ImageBuilder, WarmingUp};
pub use error::ImageError;

use crate::disk::{Disk, Scratch};
use crate::launch::Launch;
use crate::monitor::{LineListener, Monitor, MonitorProgram};
use crate::pool::PoolBuilder;
use crate::snapshot;
use crate::vm::boot::{self, blocking, random_name};
use crate::vm::copying::{Guest, Origin};
use crate::vm::{Times, Vm, VmError};

/// An image whose machines need not boot: fetched, converted, and saved as a guest that is ready for commands. Clones are the same image.
///
/// One that was built holds a machine that waits, by which it is known that the snapshot can be used, for the first who wants one.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let image = kiln::Image::builder("python:3.12").memory_mib(512).build().await?;
/// let pool = image.pool().min(2).max(8).build();
/// let vm = pool.acquire().await?;
/// let output = vm.exec(["python3", "-c", "print(6 * 7)"]).output().await?;
/// assert_eq!(output.stdout, b"42\n");
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Image(Arc<Inner>);

struct Inner {
    program: MonitorProgram,
    warnings: Option<LineListener>,
    pulled: Pulled,
    /// How commands run in its machines unless told otherwise.
    commands: Arc<Launch>,
    root: Disk,
    root_objects: Option<Digest>,
    snapshot: Snapshot,
    scratch: Scratch,
    hostname: Option<String>,
    /// The machine that showed that the snapshot can be used, until somebody takes it.
    first: Mutex<Option<Member>>,
    spare: Mutex<Spare>,
}

/// The disk for the next guest of a machine that is recycled, a copy of the snapshot's that nobody has used. It is there for as long as the image.
#[derive(Default)]
struct Spare {
    disk: Option<Disk>,
    making: bool,
}

/// A spare disk that is being made, until it is there or nobody makes it any more.
struct SpareInMaking(Image);

impl Drop for SpareInMaking {
    fn drop(&mut self) {
        self.0.spare().making = false;
    }
}

/// A machine of an image that belongs to nobody.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) monitor: Monitor,
    pub(crate) scratch: Disk,
}

impl Image {
    /// Describes an image by what `kiln run` takes: `debian:12`, `ghcr.io/a/b@sha256:...`, `oci:PATH`, ...
    pub fn builder(reference: impl Into<String>) -> ImageBuilder {
        ImageBuilder::new(reference.into())
    }

    /// The image of a snapshot in a store, by its name or its key: one that was baked by that name, or a machine that was saved. Commands run in
    /// its machines as this library was told when it named or saved it: with that environment, as that user, in that directory.
    ///
    /// # Errors
    /// [`ImageError`], by what is missing or damaged.
    pub async fn from_snapshot(store: &Store, name: &str) -> Result<Self, ImageError> {
        builder::from_snapshot(store, name).await
    }

    /// Describes a pool of its machines.
    pub fn pool(&self) -> PoolBuilder {
        PoolBuilder::new(self.clone())
    }

    /// A machine of its own, made now.
    ///
    /// # Errors
    /// [`VmError`], by what went wrong.
    pub async fn start(&self) -> Result<Vm, VmError> {
        if let Some(first) = self.first()
            && let Ok(times) = self.claim(&first, Bounds::default()).await
        {
            return Ok(self.machine(first, times));
        }
        self.make(None, Bounds::default()).await
    }

    /// The name it was asked for by, in full.
    pub fn name(&self) -> &str {
        &self.0.pulled.name
    }

    /// The digest of its manifest: what it is.
    pub fn digest(&self) -> &Digest {
        &self.0.pulled.digest
    }

    /// How it says that it is run.
    pub fn config(&self) -> &Config {
        &self.0.pulled.config
    }

    /// The snapshot that its machines are made from.
    pub fn snapshot(&self) -> &SnapshotRecord {
        &self.0.snapshot.record
    }

    /// A monitor and a disk of which one of its machines can be made sooner.
    pub(crate) async fn shell(&self) -> Result<Member, VmError> {
        let shell = self.bare().await?;
        let SnapshotRecord { memory_mib, vcpus, .. } = self.0.snapshot.record;
        shell.monitor.prepare(memory_mib, vcpus).await?;
        Ok(shell)
    }

    /// A machine, in `shell` if there is one.
    pub(crate) async fn make(&self, shell: Option<Member>, bounds: Bounds) -> Result<Vm, VmError> {
        let member = match shell {
            Some(shell) => shell,
            None => self.bare().await?,
        };
        let disks = [&self.0.root, &member.scratch];
        let hostname = self.hostname()?;
        let times =
            snapshot::make(&member.monitor, &self.0.snapshot, &disks, None, &hostname, bounds).await?;
        Ok(self.machine(member, Times::Restore(times)))
    }

    /// A machine whose guest waits.
    pub(crate) async fn stand(&self) -> Result<Member, VmError> {
        let member = self.bare().await?;
        self.stand_in(&member).await?;
        Ok(member)
    }

    /// Gives a machine to the next guest, which waits in it: only the process, its memory mapping and its vCPUs are the same.
    pub(crate) async fn recycle(&self, Member { monitor, scratch: used }: Member) -> Result<Member, VmError> {
        let spare = self.spare().disk.take();
        let scratch = match spare {
            Some(spare) => spare,
            None => self.scratch().await?,
        };
        let member = Member { monitor, scratch };
        self.stand_in(&member).await?;
        // Neither is on anybody's way: to free what the guest before has written, and the disk of the one after the next.
        tokio::task::spawn_blocking(move || drop(used));
        self.make_spare();
        Ok(member)
    }

    fn make_spare(&self) {
        let mut spare = self.spare();
        if spare.disk.is_some() || std::mem::replace(&mut spare.making, true) {
            return;
        }
        drop(spare);
        let made = SpareInMaking(self.clone());
        tokio::spawn(async move {
            // Where there is no room for one, the next recycling says so.
            let disk = made.0.scratch().await.ok();
            made.0.spare().disk = disk;
        });
    }

    fn spare(&self) -> MutexGuard<'_, Spare> {
        self.0.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine that is left of making the image, if nobody has taken it.
    pub(crate) fn first(&self) -> Option<Member> {
        let first = self.0.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.filter(|first| !first.monitor.has_ended())
    }

    async fn stand_in(&self, member: &Member) -> Result<(), VmError> {
        snapshot::stand(&member.monitor, &self.0.snapshot, &[&self.0.root, &member.scratch]).await
    }

    /// What a machine is made in and with, and no machine yet.
    async fn bare(&self) -> Result<Member, VmError> {
        let monitor = boot::spawn(&self.0.program, self.0.warnings.as_ref());
        let (monitor, scratch) = try_join!(monitor, self.scratch())?;
        Ok(Member { monitor, scratch })
    }

    async fn scratch(&self) -> Result<Disk, VmError> {
        snapshot::scratch(&self.0.scratch, &self.0.snapshot).await
    }

    /// Lets a guest that waits go on as a machine of its own.
    pub(crate) async fn claim(&self, member: &Member, bounds: Bounds) -> Result<Times, VmError> {
        Ok(Times::Restore(snapshot::claim(&member.monitor, &self.hostname()?, bounds).await?))
    }

    /// Has a machine stand still as its last owner left it.
    pub(crate) async fn rest(&self, member: Member) -> Result<Member, VmError> {
        member.monitor.pause().await?;
        Ok(member)
    }

    /// Lets such a machine go on.
    pub(crate) async fn reuse(&self, member: &Member) -> Result<Times, VmError> {
        member.monitor.resume(None).await?;
        Ok(Times::Restore(member.monitor.times()))
    }

    /// The handle of a machine that is somebody's.
    pub(crate) fn machine(&self, Member { monitor, scratch }: Member, times: Times) -> Vm {
        let inner = &self.0;
        let image = SnapshotImage { reference: inner.pulled.name.clone(), manifest: inner.pulled.digest };
        let guest = Guest::Restored(Box::new(inner.snapshot.record.clone()));
        let commands = Some(Arc::clone(&inner.commands));
        Vm::new(
            monitor,
            Origin { guest, image: Some(image), root: inner.root_objects, scratch, commands },
            times,
        )
    }

    /// What the next machine is called.
    fn hostname(&self) -> Result<String, VmError> {
        if let Some(hostname) = &self.0.hostname {
            return Ok(hostname.clone());
        }
        random_name().map_err(VmError::Entropy)
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Image").field(&self.0.pulled.name).finish()
    }
}

/// The disk of an image's files.
async fn disk(pulled: &Pulled) -> Result<Disk, ImageError> {
    let pulled = pulled.clone();
    Ok(blocking(move || Disk::from_image(&pulled)).await?)
}
