//! What a pool is to be.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_protocol::mailbox::Bounds;
use kiln_store::SnapshotRecord;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::admission::Admission;
use super::seats::{Role, Seat};
use super::{Inner, Owner, Pool, SizeError, tend};
use crate::baked::Image;

/// The most machines of a pool.
const MACHINES_MAX: usize = 4096;
/// The most processes that wait without a guest.
const SHELLS_MAX: usize = 64;

/// The least memory for the processes of a machine, in MiB.
const MEMORY_MIN_MIB: u32 = 8;

/// What becomes of a machine that comes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnRelease {
    /// Its process, memory mapping and vCPUs go to a fresh guest; of the guest before nothing is left in them. A guest that has taken its
    /// monitor over, which the jail holds, would have that of the next.
    #[default]
    Restore,
    /// It ends, process and all, and another is made: some milliseconds of processor time each.
    Replace,
    /// It stands still, and the next owner has it as the last one left it: files, processes, secrets and all.
    Keep,
}

/// What a pool is to be. Made by [`Image::pool`].
#[derive(Debug)]
#[must_use]
pub struct PoolBuilder {
    image: Image,
    options: Options,
    memory_mib: Option<u32>,
    vcpus: Option<u32>,
}

#[derive(Clone, Debug)]
pub(super) struct Options {
    pub(super) min: usize,
    pub(super) max: usize,
    pub(super) shells: usize,
    pub(super) idle_timeout: Option<Duration>,
    pub(super) acquire_timeout: Duration,
    pub(super) restore_timeout: Duration,
    pub(super) on_release: OnRelease,
}

impl PoolBuilder {
    pub(crate) fn new(image: Image) -> Self {
        let options = Options {
            min: 1,
            max: 16,
            shells: 1,
            idle_timeout: Some(Duration::from_mins(5)),
            acquire_timeout: Duration::from_secs(30),
            restore_timeout: Duration::from_secs(30),
            on_release: OnRelease::Restore,
        };
        Self { image, options, memory_mib: None, vcpus: None }
    }

    /// How many machines wait at the least, as far as `max` allows; 1 by default.
    pub fn min(mut self, machines: usize) -> Self {
        self.options.min = machines;
        self
    }

    /// How many machines there are at the most, those that are leased among them; 16 by default, 4096 at the most.
    pub fn max(mut self, machines: usize) -> Self {
        self.options.max = machines;
        self
    }

    /// How many monitor processes wait without a guest, some 2 MiB each, so that a machine that has to be made on somebody's
    /// way is made in one of them; 1 by default, 64 at the most.
    pub fn shells(mut self, processes: usize) -> Self {
        self.options.shells = processes;
        self
    }

    /// After what time a waiting machine ends that is not needed to have `min` of them; 5 minutes by default, `None` for never.
    pub fn idle_timeout(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.options.idle_timeout = limit.into();
        self
    }

    /// How long an acquisition may wait in line; 30 s by default. What it takes to make or claim a machine then has a limit of its own,
    /// [`restore_timeout`](Self::restore_timeout).
    pub fn acquire_timeout(mut self, limit: Duration) -> Self {
        self.options.acquire_timeout = limit;
        self
    }

    /// How long it may take to make a machine, to claim or to recycle one; 30 s by default.
    pub fn restore_timeout(mut self, limit: Duration) -> Self {
        self.options.restore_timeout = limit;
        self
    }

    /// Whether a machine that comes back gives way to a fresh guest: [`OnRelease::Restore`], as by default, or [`OnRelease::Keep`].
    pub fn restore_on_release(self, yes: bool) -> Self {
        self.on_release(if yes { OnRelease::Restore } else { OnRelease::Keep })
    }

    /// What becomes of a machine that comes back.
    pub fn on_release(mut self, what: OnRelease) -> Self {
        self.options.on_release = what;
        self
    }

    /// How much memory the processes of a machine may have together, in MiB: from 8 to what the image was built with, which it is by default.
    /// What takes more is killed. `docs/guide/library.md` has what counts.
    ///
    /// The guest's kernel holds it, against the guest's root too. What holds against a guest whose kernel was taken over is what the
    /// image was built with.
    ///
    /// A size that cannot be is refused by [`Pool::acquire`].
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = Some(mib);
        self
    }

    /// How many vCPUs the processes of a machine run on: from 1 to what the image was built with, which it is by default. The rest as with
    /// [`memory_mib`](Self::memory_mib).
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = Some(vcpus);
        self
    }

    /// Makes the pool; its machines are made in the background.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn build(self) -> Pool {
        let Self { image, mut options, memory_mib, vcpus } = self;
        let bounds = bounds(memory_mib, vcpus, image.snapshot());
        if bounds.is_err() {
            (options.min, options.shells) = (0, 0);
        }
        options.max = options.max.clamp(1, MACHINES_MAX);
        options.min = options.min.min(options.max);
        options.shells = options.shells.min(SHELLS_MAX);
        let inner = Arc::new(Inner {
            image,
            options,
            bounds,
            admission: Admission::default(),
            runtime: Handle::current(),
            state: Mutex::default(),
            changed: Notify::new(),
            moved: Notify::new(),
        });
        if inner.bounds.is_ok()
            && let Some(first) = inner.image.first()
        {
            inner.watch(&first.monitor);
            let seat = Seat::in_pool(&inner, &mut inner.lock().counts, Role::Making);
            inner.put(first, seat, false);
        }
        inner.runtime.spawn(tend(Arc::clone(&inner)));
        inner.changed.notify_one();
        Pool { owner: Arc::new(Owner { inner }) }
    }
}

/// What the processes of machines of a snapshot are to have; nothing where that is all there is.
fn bounds(
    memory_mib: Option<u32>,
    vcpus: Option<u32>,
    snapshot: &SnapshotRecord,
) -> Result<Bounds, SizeError> {
    let within = |of, asked: Option<u32>, least, most| match asked {
        None => Ok(0),
        Some(asked) if asked == most => Ok(0),
        Some(asked) if (least..most).contains(&asked) => Ok(asked),
        Some(asked) => Err(SizeError { of, asked, least, most }),
    };
    Ok(Bounds {
        memory_mib: within("MiB of memory", memory_mib, MEMORY_MIN_MIB, snapshot.memory_mib)?,
        vcpus: within("vCPUs", vcpus, 1, snapshot.vcpus)?,
    })
}
