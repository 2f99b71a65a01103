//! Machines of one image that wait for whoever needs one.
//!
//! ```text
//!            ┌──────────── making ◀──── nobody waits, and somebody asks
//!            ▼               │
//! waiting ─acquire─▶ leased ◀┘     dropped ─▶ recycled ─▶ waiting
//!    └─ too long ─▶ ended  └─ stopped, or died ─▶ gone; another is made where one is missing
//! ```
//! A machine that waits is restored and stands still where its agent looks for who it is to be: what is left to do for an
//! acquisition is to tell it. A machine that comes back gives its process, memory and vCPUs to the next guest, and nothing else.
//! Who comes when all are taken waits in line.

mod admission;
mod builder;
mod error;
mod seats;

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kiln_protocol::mailbox::Bounds;
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};

use crate::baked::{Image, Member};
use crate::monitor::Monitor;
use crate::vm::{Machine, Times, Vm, VmError};
use admission::Admission;
use builder::Options;
pub use builder::{OnRelease, PoolBuilder};
pub use error::{PoolError, SizeError};
use seats::{Counts, Role, Seat};

/// How many machines may be made at a time on the way of an acquisition; more would only make all of them late.
const MAKING_MAX: usize = 4;
/// How many machines that died in wait an acquisition passes over.
const DEAD_MAX: usize = 8;
/// The most who wait in line.
const WAITING_MAX: usize = 10_000;

/// Machines of one image, ready to be acquired. Clones are the same pool; with the last of them its waiting machines end, while
/// those that are leased live on with their owners.
#[derive(Clone, Debug)]
pub struct Pool {
    owner: Arc<Owner>,
}

/// Whose end is the end of the pool.
#[derive(Debug)]
struct Owner {
    inner: Arc<Inner>,
}

/// What the pool's handles and its machines share.
pub(crate) struct Inner {
    image: Image,
    options: Options,
    /// What its machines' processes may have; none is made when that is more than there is.
    bounds: Result<Bounds, SizeError>,
    admission: Admission,
    runtime: Handle,
    state: Mutex<State>,
    /// Told when there is something to tend to, or the pool is closed.
    changed: Notify,
    /// Told when any figure of the pool's has changed.
    moved: Notify,
}

#[derive(Debug, Default)]
struct State {
    counts: Counts,
    /// The one that waits longest first.
    idle: VecDeque<Idle>,
    shells: Vec<Member>,
    making_shells: usize,
    line: VecDeque<oneshot::Sender<Turn>>,
    /// The last attempt to make one that nobody waits for failed, and nobody has asked since.
    discouraged: bool,
    closed: bool,
    totals: Totals,
}

/// What has happened since the pool was made.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    acquired: u64,
    made: u64,
    recycled: u64,
    failed: u64,
}

/// A machine that waits.
#[derive(Debug)]
struct Idle {
    member: Member,
    since: Instant,
    /// It was used, and is as its last owner left it.
    used: bool,
    seat: Seat,
}

/// What who waits in line is given.
#[derive(Debug)]
enum Turn {
    /// A machine.
    Machine(Idle),
    /// The place for one, to be made.
    Place(Seat),
}

/// A machine of a pool that somebody has. Dropping it gives the machine back; so it goes after all else that holds the machine.
#[derive(Debug)]
pub(crate) struct Lease {
    inner: Arc<Inner>,
    held: Option<(Arc<Machine>, Seat)>,
}

/// How a pool is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Machines that wait.
    pub idle: usize,
    /// Machines that somebody has.
    pub leased: usize,
    /// Machines that are being made.
    pub making: usize,
    /// Machines that are given to their next guest.
    pub recycling: usize,
    /// Those who wait for a machine.
    pub waiting: usize,
    /// Monitor processes without a guest.
    pub shells: usize,
    /// Acquisitions so far.
    pub acquired: u64,
    /// Machines made so far.
    pub made: u64,
    /// Machines recycled so far.
    pub recycled: u64,
    /// Machines that could not be made or recycled so far.
    pub failed: u64,
}

impl PoolStats {
    /// All machines, whatever they do.
    pub fn total(&self) -> usize {
        self.idle + self.leased + self.making + self.recycling
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        drop(self.inner.close());
    }
}

impl Pool {
    /// A machine of its own for the caller, whose guest has acknowledged who it is; it comes back when it is dropped.
    ///
    /// One that waits is there at once. If none does and there may be more, one is made on the way; otherwise the caller waits in line.
    /// Dropping the future gives up the place.
    ///
    /// # Errors
    /// [`PoolError`]
    pub async fn acquire(&self) -> Result<Vm, PoolError> {
        self.owner.inner.acquire().await
    }

    /// Waits until the pool's figures are as `is_so` wants them, and returns them.
    pub async fn until(&self, is_so: impl Fn(&PoolStats) -> bool) -> PoolStats {
        let inner = &self.owner.inner;
        loop {
            let mut moved = std::pin::pin!(inner.moved.notified());
            moved.as_mut().enable();
            let stats = inner.stats();
            if is_so(&stats) {
                return stats;
            }
            moved.await;
        }
    }

    /// How the pool is doing. Cost: a lock and a copy.
    pub fn stats(&self) -> PoolStats {
        self.owner.inner.stats()
    }

    /// The image its machines are of.
    pub fn image(&self) -> &Image {
        &self.owner.inner.image
    }

    /// Closes the pool and waits until nothing is left of it: who waits in line is sent away, machines that wait end, and those that are
    /// leased are waited for.
    pub async fn shutdown(&self) {
        let inner = &self.owner.inner;
        let Leaving { idle, shells } = inner.close();
        for Idle { member, seat, .. } in idle {
            inner.end(member.monitor, seat);
        }
        for shell in shells {
            shell.monitor.stop().await;
        }
        self.until(|stats| stats.total() == 0 && inner.lock().making_shells == 0).await;
    }
}

/// What a pool had when it was closed.
struct Leaving {
    idle: VecDeque<Idle>,
    shells: Vec<Member>,
}

impl Inner {
    fn stats(&self) -> PoolStats {
        let state = self.lock();
        let Totals { acquired, made, recycled, failed } = state.totals;
        PoolStats {
            idle: state.counts.of(Role::Idle),
            leased: state.counts.of(Role::Leased),
            making: state.counts.of(Role::Making),
            recycling: state.counts.of(Role::Recycling),
            waiting: state.line.len(),
            shells: state.shells.len(),
            acquired,
            made,
            recycled,
            failed,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes everything out of the pool. What is returned must be dropped without its lock.
    fn close(&self) -> Leaving {
        let mut state = self.lock();
        state.closed = true;
        // Whoever waits learns it by the end of its place in line.
        state.line.clear();
        let leaving =
            Leaving { idle: std::mem::take(&mut state.idle), shells: std::mem::take(&mut state.shells) };
        drop(state);
        self.changed.notify_one();
        leaving
    }

    async fn acquire(self: &Arc<Self>) -> Result<Vm, PoolError> {
        let bounds = self.bounds?;
        let Options { acquire_timeout, max, .. } = self.options;
        let mut passed_over = 0;
        loop {
            let turn = tokio::time::timeout(acquire_timeout, self.turn()).await;
            let turn = turn.unwrap_or(Err(PoolError::Exhausted { after: acquire_timeout, max }))?;
            let Idle { member, used, seat, .. } = match turn {
                Turn::Machine(idle) => idle,
                Turn::Place(seat) => {
                    let vm = self.make_on_the_way(bounds).await?;
                    return Ok(self.lease(vm, seat));
                }
            };
            let claiming = Claiming { inner: self, held: Some((member, seat)) };
            let claimed = claiming.claim(used).await;
            let (member, seat) = claiming.into_held();
            match claimed {
                Ok(times) => return Ok(self.lease(self.image.machine(member, times), seat)),
                Err(error) => {
                    // One that died while it waited is nobody's loss.
                    let died = member.monitor.has_ended();
                    self.end(member.monitor, seat);
                    passed_over += 1;
                    if !died || passed_over > DEAD_MAX {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn lease(self: &Arc<Self>, vm: Vm, mut seat: Seat) -> Vm {
        seat.take(Role::Leased);
        self.lock().totals.acquired += 1;
        // Another may be missing now.
        self.changed.notify_one();
        vm.leased(|machine| Lease { inner: Arc::clone(self), held: Some((machine, seat)) })
    }

    /// A machine that waits, or the place for one, as soon as it is this caller's turn.
    async fn turn(self: &Arc<Self>) -> Result<Turn, PoolError> {
        let receiver = {
            let mut state = self.lock();
            if state.closed {
                return Err(PoolError::Closed);
            }
            state.discouraged = false;
            if state.line.is_empty() {
                if let Some(idle) = state.idle.pop_back() {
                    return Ok(Turn::Machine(idle));
                }
                if self.has_place(&state) {
                    return Ok(Turn::Place(Seat::in_pool(self, &mut state.counts, Role::Making)));
                }
            }
            if state.line.len() >= WAITING_MAX {
                return Err(PoolError::Crowded { waiting: WAITING_MAX });
            }
            let (sender, receiver) = oneshot::channel();
            state.line.push_back(sender);
            receiver
        };
        self.moved.notify_waiters();
        // A machine that was given to one who has gone is given to the next.
        let mut place = InLine { inner: self, receiver };
        (&mut place.receiver).await.map_err(|_| PoolError::Closed)
    }

    /// Whether one more may be made on somebody's way.
    fn has_place(&self, state: &State) -> bool {
        state.counts.total() < self.options.max && state.counts.of(Role::Making) < MAKING_MAX
    }

    /// Gives turns to those in line, as far as there is something to give.
    fn serve(self: &Arc<Self>) {
        let mut homeless = None;
        {
            let mut state = self.lock();
            while !state.line.is_empty() && homeless.is_none() {
                let turn = if let Some(idle) = state.idle.pop_back() {
                    Turn::Machine(idle)
                } else if self.has_place(&state) {
                    Turn::Place(Seat::in_pool(self, &mut state.counts, Role::Making))
                } else {
                    break;
                };
                let Some(first) = state.line.pop_front() else { break };
                match first.send(turn) {
                    Ok(()) => {}
                    Err(Turn::Machine(idle)) => state.idle.push_back(idle),
                    // A seat is given up without the lock, and then there is a place again.
                    Err(place @ Turn::Place(_)) => homeless = Some(place),
                }
            }
        }
        self.moved.notify_waiters();
        drop(homeless);
    }

    /// Makes a machine while somebody waits for it, in a shell when there is one.
    async fn make_on_the_way(self: &Arc<Self>, bounds: Bounds) -> Result<Vm, PoolError> {
        self.check_memory()?;
        let shell = self.lock().shells.pop().filter(|shell| !shell.monitor.has_ended());
        let made = self.in_time(self.image.make(shell, bounds)).await;
        let mut state = self.lock();
        match &made {
            Ok(_) => state.totals.made += 1,
            Err(_) => state.totals.failed += 1,
        }
        drop(state);
        if let Ok(vm) = &made {
            self.watch(vm.monitor());
        }
        made
    }

    /// Whether the host has the memory for those that are being made.
    fn check_memory(&self) -> Result<(), PoolError> {
        let making = self.lock().counts.of(Role::Making);
        self.admission.check(making)
    }

    /// Has the pool looked after when a machine ends, so that one that ends while it waits is made up for.
    fn watch(self: &Arc<Self>, monitor: &Monitor) {
        let (pool, mut ended) = (Arc::downgrade(self), monitor.death_watch());
        self.runtime.spawn(async move {
            ended.ended().await;
            if let Some(pool) = pool.upgrade() {
                pool.changed.notify_one();
            }
        });
    }

    async fn in_time<T>(&self, making: impl Future<Output = Result<T, VmError>>) -> Result<T, PoolError> {
        match tokio::time::timeout(self.options.restore_timeout, making).await {
            Ok(made) => Ok(made?),
            Err(_) => Err(VmError::RestoreOverdue(self.options.restore_timeout).into()),
        }
    }

    /// Adds a machine to those that wait, or gives it to the first in line.
    fn put(self: &Arc<Self>, member: Member, mut seat: Seat, used: bool) {
        seat.take(Role::Idle);
        self.give(Idle { member, since: Instant::now(), used, seat });
    }

    fn give(self: &Arc<Self>, idle: Idle) {
        let mut state = self.lock();
        if state.closed {
            drop(state);
            return self.end(idle.member.monitor, idle.seat);
        }
        state.idle.push_back(idle);
        drop(state);
        self.serve();
        self.changed.notify_one();
    }

    /// Ends a machine, and gives up its place when nothing is left of it.
    fn end(&self, monitor: Monitor, seat: Seat) {
        self.runtime.spawn(async move {
            monitor.stop().await;
            drop(seat);
        });
    }

    /// Makes one that is to wait.
    async fn grow(self: Arc<Self>, seat: Seat) {
        let standing = async {
            self.check_memory()?;
            self.in_time(self.image.stand()).await
        };
        if let Ok(member) = standing.await {
            self.lock().totals.made += 1;
            self.watch(&member.monitor);
            self.put(member, seat, false);
        } else {
            let mut state = self.lock();
            state.totals.failed += 1;
            state.discouraged = true;
            drop(state);
            drop(seat);
        }
    }

    async fn prepare_shell(self: Arc<Self>) {
        let shell = self.in_time(self.image.shell()).await;
        let surplus = {
            let mut state = self.lock();
            match shell {
                Ok(shell) if !state.closed => {
                    state.shells.push(shell);
                    None
                }
                Ok(shell) => Some(shell),
                Err(_) => {
                    state.totals.failed += 1;
                    state.discouraged = true;
                    None
                }
            }
        };
        if let Some(shell) = surplus {
            shell.monitor.stop().await;
        }
        self.lock().making_shells -= 1;
        self.moved.notify_waiters();
        self.changed.notify_one();
    }

    /// Takes a machine back.
    fn take_back(self: Arc<Self>, machine: Arc<Machine>, seat: Seat) {
        machine.monitor.change_owner();
        let Machine { monitor, origin, .. } = match Arc::try_unwrap(machine) {
            Ok(machine) => machine,
            // Something of its last owner's is under way, such as a copy, with which it ends.
            Err(machine) => {
                let mut ended = machine.monitor.death_watch();
                drop(machine);
                self.runtime.spawn(async move {
                    ended.ended().await;
                    drop(seat);
                });
                return;
            }
        };
        self.renew(Member { monitor, scratch: origin.scratch }, seat);
    }

    /// Makes of a machine that was used what the next one is to have.
    fn renew(self: Arc<Self>, member: Member, mut seat: Seat) {
        let on_release = self.options.on_release;
        if self.lock().closed || member.monitor.has_ended() || on_release == OnRelease::Replace {
            return self.end(member.monitor, seat);
        }
        seat.take(Role::Recycling);
        let runtime = self.runtime.clone();
        runtime.spawn(async move {
            // Not while its owner drops it.
            self.admission.measure(member.monitor.process_id());
            let keeps = on_release == OnRelease::Keep;
            let recycled = if keeps {
                self.in_time(self.image.rest(member)).await
            } else {
                self.in_time(self.image.recycle(member)).await
            };
            if let Ok(member) = recycled {
                self.lock().totals.recycled += 1;
                self.put(member, seat, keeps);
            } else {
                self.lock().totals.failed += 1;
                drop(seat);
            }
        });
    }

    /// Starts what is missing and ends what is too much. Says when to look again at the latest.
    fn tend(self: &Arc<Self>) -> Option<Instant> {
        self.serve();
        let (mut seats, mut shells) = (Vec::new(), 0);
        let (surplus, next) = {
            let mut state = self.lock();
            if state.closed {
                return None;
            }
            let now = Instant::now();
            let due = |idle: &Idle| self.options.idle_timeout.and_then(|limit| idle.since.checked_add(limit));
            let (mut surplus, living): (VecDeque<_>, VecDeque<_>) =
                state.idle.drain(..).partition(|idle| idle.member.monitor.has_ended());
            state.idle = living;
            while state.idle.len() > self.options.min
                && state.idle.front().and_then(due).is_some_and(|due| due <= now)
            {
                surplus.extend(state.idle.pop_front());
            }
            // Those that are to end still have their seats, and wait no more.
            let at_home = |state: &State| state.counts.at_home().saturating_sub(surplus.len());
            while !state.discouraged
                && state.counts.total() < self.options.max
                && state.counts.of(Role::Making) < MAKING_MAX
                && at_home(&state) < self.options.min
            {
                seats.push(Seat::in_pool(self, &mut state.counts, Role::Making));
            }
            while !state.discouraged
                && state.making_shells < MAKING_MAX
                && state.shells.len() + state.making_shells < self.options.shells
            {
                state.making_shells += 1;
                shells += 1;
            }
            let may_go = state.idle.len() > self.options.min;
            (surplus, state.idle.front().and_then(due).filter(|_| may_go))
        };
        // A runtime that shuts down drops what is spawned, seats too, so the pool is not locked now.
        for seat in seats {
            self.runtime.spawn(Arc::clone(self).grow(seat));
        }
        for _ in 0..shells {
            self.runtime.spawn(Arc::clone(self).prepare_shell());
        }
        for Idle { member, seat, .. } in surplus {
            self.end(member.monitor, seat);
        }
        next
    }
}

/// Looks after a pool until it is closed.
async fn tend(pool: Arc<Inner>) {
    while !pool.lock().closed {
        let next = pool.tend();
        let changed = pool.changed.notified();
        match next {
            Some(at) => drop(tokio::time::timeout_at(at.into(), changed).await),
            None => changed.await,
        }
    }
}

/// A place in line.
struct InLine<'a> {
    inner: &'a Arc<Inner>,
    receiver: oneshot::Receiver<Turn>,
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.receiver.close();
        match self.receiver.try_recv() {
            Ok(Turn::Machine(idle)) => self.inner.give(idle),
            Ok(Turn::Place(seat)) => drop(seat),
            Err(_) => {
                self.inner.lock().line.retain(|sender| !sender.is_closed());
                self.inner.moved.notify_waiters();
            }
        }
    }
}

/// A machine that somebody is about to have. Who gives up before he has it leaves it to be made new.
struct Claiming<'a> {
    inner: &'a Arc<Inner>,
    held: Option<(Member, Seat)>,
}

impl Claiming<'_> {
    async fn claim(&self, used: bool) -> Result<Times, PoolError> {
        let Some((member, _)) = &self.held else { return Err(PoolError::Closed) };
        let (image, bounds) = (&self.inner.image, self.inner.bounds?);
        let claimed =
            async { if used { image.reuse(member).await } else { image.claim(member, bounds).await } };
        self.inner.in_time(claimed).await
    }

    fn into_held(mut self) -> (Member, Seat) {
        self.held.take().expect("held from the beginning to here")
    }
}

impl Drop for Claiming<'_> {
    fn drop(&mut self) {
        let Some((member, seat)) = self.held.take() else { return };
        match self.inner.options.on_release {
            // It may be on its way to be another, and whoever is to keep it would have to wait for that.
            OnRelease::Keep => self.inner.end(member.monitor, seat),
            OnRelease::Restore | OnRelease::Replace => Arc::clone(self.inner).renew(member, seat),
        }
    }
}

impl Lease {
    /// Keeps the machine from coming back: it leaves the pool when what is returned is dropped.
    pub(crate) fn forfeit(mut self) -> impl Sized + Send {
        self.held.take().map(|(_, seat)| seat)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some((machine, seat)) = self.held.take() {
            Arc::clone(&self.inner).take_back(machine, seat);
        }
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Pool").field("image", &self.image).finish_non_exhaustive()
    }
}
