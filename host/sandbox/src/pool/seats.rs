//! How many machines a pool has, and in which role each is: counted by what they hold.

use std::sync::Arc;

use super::Inner;

/// What a machine of a pool is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Making,
    Idle,
    Leased,
    Recycling,
}

/// How many are in each role.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts([usize; 4]);

impl Counts {
    pub(super) fn of(&self, role: Role) -> usize {
        self.0[role as usize]
    }

    /// All of them.
    pub(super) fn total(&self) -> usize {
        self.0.iter().sum()
    }

    /// Those that wait, or will without anybody's doing.
    pub(super) fn at_home(&self) -> usize {
        self.total() - self.of(Role::Leased)
    }
}

/// One machine's place in its pool, from before it is made until it is gone. Must not be dropped, or change its role, while the pool is locked.
pub(super) struct Seat {
    pool: Arc<Inner>,
    role: Role,
}

impl Seat {
    /// Takes a place in the pool whose counts these are.
    pub(super) fn in_pool(pool: &Arc<Inner>, counts: &mut Counts, role: Role) -> Self {
        counts.0[role as usize] += 1;
        Self { pool: Arc::clone(pool), role }
    }

    pub(super) fn take(&mut self, role: Role) {
        let mut state = self.pool.lock();
        state.counts.0[self.role as usize] -= 1;
        state.counts.0[role as usize] += 1;
        self.role = role;
        drop(state);
        self.pool.moved.notify_waiters();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.pool.lock().counts.0[self.role as usize] -= 1;
        self.pool.moved.notify_waiters();
        self.pool.changed.notify_one();
    }
}

impl std::fmt::Debug for Seat {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Seat").field(&self.role).finish()
    }
}
