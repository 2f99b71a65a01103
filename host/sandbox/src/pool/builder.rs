//! What a pool is to be.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::admission::Admission;
use super::{Inner, Owner, Pool, tend};
use crate::baked::Image;

/// The most machines of a pool.
const MACHINES_MAX: usize = 4096;

/// What a pool is to be. Made by [`Image::pool`].
#[derive(Debug)]
#[must_use]
pub struct PoolBuilder {
    image: Image,
    options: Options,
}

#[derive(Clone, Debug)]
pub(super) struct Options {
    pub(super) min: usize,
    pub(super) max: usize,
    pub(super) shells: usize,
    pub(super) idle_timeout: Option<Duration>,
    pub(super) acquire_timeout: Duration,
    pub(super) restore_timeout: Duration,
    pub(super) restore_on_release: bool,
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
            restore_on_release: true,
        };
        Self { image, options }
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
    /// way is made in one of them; 1 by default.
    pub fn shells(mut self, processes: usize) -> Self {
        self.options.shells = processes;
        self
    }

    /// After what time a waiting machine ends that is not needed to have `min` of them; 5 minutes by default, `None` for never.
    pub fn idle_timeout(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.options.idle_timeout = limit.into();
        self
    }

    /// How long an acquisition may take, its place in line and the making of a machine included; 30 s by default.
    pub fn acquire_timeout(mut self, limit: Duration) -> Self {
        self.options.acquire_timeout = limit;
        self
    }

    /// How long it may take to make a machine, or to recycle one; 30 s by default.
    pub fn restore_timeout(mut self, limit: Duration) -> Self {
        self.options.restore_timeout = limit;
        self
    }

    /// Whether a machine that comes back gives way to a fresh guest, which is so by default. Otherwise the next owner has it as
    /// the last one left it: files, processes, secrets and all; it stands still in between.
    pub fn restore_on_release(mut self, yes: bool) -> Self {
        self.options.restore_on_release = yes;
        self
    }

    /// Makes the pool; its machines are made in the background.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn build(self) -> Pool {
        let Self { image, mut options } = self;
        options.max = options.max.clamp(1, MACHINES_MAX);
        options.min = options.min.min(options.max);
        let inner = Arc::new(Inner {
            image,
            options,
            admission: Admission::default(),
            runtime: Handle::current(),
            state: Mutex::default(),
            changed: Notify::new(),
            left: Notify::new(),
        });
        inner.runtime.spawn(tend(Arc::clone(&inner)));
        inner.changed.notify_one();
        Pool { owner: Arc::new(Owner { inner }) }
    }
}
