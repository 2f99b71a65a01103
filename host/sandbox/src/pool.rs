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

use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};

use crate::baked::{Image, Member};
use crate::monitor::Monitor;
use crate::vm::{Machine, Vm, VmError};
use admission::Admission;
use builder::Options;
pub use builder::PoolBuilder;
pub use error::PoolError;
use seats::{Counts, Role, Seat};

/// How many machines may be made at a time on the way of an acquisition; more would only make all of them late.
const MAKING_MAX: usize = 4;
/// How many machines that died in wait an acquisition passes over.
const DEAD_MAX: usize = 8;

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
    admission: Admission,
    runtime: Handle,
    state: Mutex<State>,
    /// Told when there is something to tend to, or the pool is closed.
    changed: Notify,
    /// Told when a machine has left.
    left: Notify,
}

#[derive(Debug, Default)]
struct State {
    counts: Counts,
    /// The one that waits longest first.
    idle: VecDeque<Idle>,
    shells: Vec<Monitor>,
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
        let inner = &self.owner.inner;
        let limit = inner.options.acquire_timeout;
        let exhausted = || PoolError::Exhausted { after: limit, max: inner.options.max };
        tokio::time::timeout(limit, inner.acquire()).await.unwrap_or_else(|_| Err(exhausted()))
    }

    /// How the pool is doing. Cost: a lock and a copy.
    pub fn stats(&self) -> PoolStats {
        let state = self.owner.inner.lock();
        let Totals { acquired, made, recycled, failed } = state.totals;
        PoolStats {
            idle: state.counts.of(Role::Idle),
            leased: state.counts.of(Role::Leased),
            making: state.counts.of(Role::Making),
            recycling: state.counts.of(Role::Recycling),
            waiting: state.line.iter().filter(|sender| !sender.is_closed()).count(),
            shells: state.shells.len(),
            acquired,
            made,
            recycled,
            failed,
        }
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
            member.monitor.stop().await;
            drop(seat);
        }
        for shell in shells {
            shell.stop().await;
        }
        loop {
            let mut left = std::pin::pin!(inner.left.notified());
            left.as_mut().enable();
            if inner.lock().counts.total() == 0 {
                return;
            }
            left.await;
        }
    }
}

/// What a pool had when it was closed.
struct Leaving {
    idle: VecDeque<Idle>,
    shells: Vec<Monitor>,
}

impl Inner {
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
        let mut passed_over = 0;
        loop {
            let (member, seat, used) = match self.turn().await? {
                Turn::Machine(Idle { member, seat, used, .. }) => (member, seat, used),
                Turn::Place(seat) => {
                    let vm = self.make_on_the_way().await?;
                    return Ok(self.lease(vm, seat));
                }
            };
            let claimed = if used { self.image.reuse(member).await } else { self.image.claim(member).await };
            match claimed {
                Ok(vm) => return Ok(self.lease(vm, seat)),
                // One that died while it waited is nobody's loss.
                Err(VmError::Monitor(crate::MonitorError::Ended(_))) if passed_over < DEAD_MAX => {
                    passed_over += 1;
                }
                Err(error) => return Err(error.into()),
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
            let (sender, receiver) = oneshot::channel();
            state.line.push_back(sender);
            receiver
        };
        // A machine that was given to one who has gone is given to the next.
        let mut place = InLine { inner: self, receiver };
        (&mut place.receiver).await.map_err(|_| PoolError::Closed)
    }

    /// Whether one more may be made on somebody's way.
    fn has_place(&self, state: &State) -> bool {
        state.counts.total() < self.options.max && state.counts.of(Role::Making) < MAKING_MAX
    }

    /// Gives turns to those in line, as far as there is something to give. What nobody takes is returned.
    fn serve(self: &Arc<Self>) {
        let mut homeless = Vec::new();
        {
            let mut state = self.lock();
            while !state.line.is_empty() {
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
                    // A seat is given up without the lock.
                    Err(place @ Turn::Place(_)) => {
                        homeless.push(place);
                        break;
                    }
                }
            }
        }
        if !homeless.is_empty() {
            drop(homeless);
            self.changed.notify_one();
        }
    }

    /// Makes a machine while somebody waits for it, in a shell when there is one.
    async fn make_on_the_way(&self) -> Result<Vm, PoolError> {
        self.admission.check()?;
        let shell = self.lock().shells.pop();
        self.changed.notify_one();
        let made = self.in_time(self.image.make(shell)).await;
        let mut state = self.lock();
        match &made {
            Ok(_) => state.totals.made += 1,
            Err(_) => state.totals.failed += 1,
        }
        drop(state);
        made
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
        let idle = Idle { member, since: Instant::now(), used, seat };
        let mut state = self.lock();
        if state.closed {
            drop(state);
            self.end(idle.member.monitor, idle.seat);
            return;
        }
        state.idle.push_back(idle);
        drop(state);
        self.serve();
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
            self.admission.check()?;
            self.in_time(self.image.stand()).await
        };
        match standing.await {
            Ok(member) => {
                self.admission.measure(member.monitor.process_id());
                self.lock().totals.made += 1;
                self.put(member, seat, false);
            }
            Err(_) => {
                let mut state = self.lock();
                state.totals.failed += 1;
                state.discouraged = true;
                drop(state);
                drop(seat);
            }
        }
        self.changed.notify_one();
    }

    async fn prepare_shell(self: Arc<Self>) {
        let shell = self.in_time(self.image.shell()).await;
        let mut state = self.lock();
        state.making_shells -= 1;
        let surplus = match shell {
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
        };
        drop(state);
        drop(surplus);
    }

    /// Takes a machine back.
    fn take_back(self: Arc<Self>, machine: Arc<Machine>, mut seat: Seat) {
        let Ok(Machine { monitor, origin, paused, .. }) = Arc::try_unwrap(machine) else {
            // A copy of it is under way, with which it ends.
            return;
        };
        if self.lock().closed || monitor.has_ended().is_some() {
            return self.end(monitor, seat);
        }
        self.admission.measure(monitor.process_id());
        seat.take(Role::Recycling);
        let member = Member { monitor, scratch: origin.scratch };
        let is_paused = paused.into_inner();
        let runtime = self.runtime.clone();
        runtime.spawn(async move {
            let restores = self.options.restore_on_release;
            let recycled = if restores {
                self.in_time(self.image.recycle(member)).await
            } else {
                self.in_time(self.image.rest(member, is_paused)).await
            };
            match recycled {
                Ok(member) => {
                    self.lock().totals.recycled += 1;
                    self.put(member, seat, !restores);
                }
                Err(_) => {
                    self.lock().totals.failed += 1;
                    drop(seat);
                }
            }
            self.changed.notify_one();
        });
    }

    /// Starts what is missing and ends what is too much. Says when to look again at the latest.
    fn tend(self: &Arc<Self>) -> Option<Instant> {
        self.serve();
        let mut surplus = Vec::new();
        let next = {
            let mut state = self.lock();
            if state.closed {
                return None;
            }
            while !state.discouraged
                && state.counts.total() < self.options.max
                && state.counts.of(Role::Making) < MAKING_MAX
                && state.counts.to_come() < self.options.min
            {
                let seat = Seat::in_pool(self, &mut state.counts, Role::Making);
                self.runtime.spawn(Arc::clone(self).grow(seat));
            }
            while !state.discouraged && state.shells.len() + state.making_shells < self.options.shells {
                state.making_shells += 1;
                self.runtime.spawn(Arc::clone(self).prepare_shell());
            }
            let now = Instant::now();
            let due = |idle: &Idle| self.options.idle_timeout.and_then(|limit| idle.since.checked_add(limit));
            while state.idle.len() > self.options.min
                && state.idle.front().and_then(due).is_some_and(|due| due <= now)
            {
                surplus.extend(state.idle.pop_front());
            }
            let may_go = state.idle.len() > self.options.min;
            state.idle.front().and_then(due).filter(|_| may_go)
        };
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
            Ok(Turn::Machine(idle)) => {
                self.inner.lock().idle.push_back(idle);
                self.inner.serve();
            }
            Ok(Turn::Place(seat)) => {
                drop(seat);
                self.inner.serve();
            }
            Err(_) => {}
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
