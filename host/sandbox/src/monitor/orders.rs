//! What a monitor is told, and the answers it is waited for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kiln_control::{
    Do, Entered, Files, MAX_PACKET_FDS, Pause, Portion, Prepare, Restore, Resume, SaveMemory, SaveState,
    Saved, ShowConsole, Standing, Start,
};
use rustix::fs::{fstat, fstatfs};

use super::life::{Life, reach};
use super::{ADOPT_LIMIT, BootTimes, DeathWatch, EndWatch, MachineEnd, Monitor, MonitorError, RestoreTimes};

/// Linux `include/uapi/linux/magic.h`.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// More than any bound counts to.
const UNBOUNDED: u64 = u64::MAX;

impl Monitor {
    /// Makes the machine and boots it: once, first. `fds` are what the message's `*_fd` fields count.
    ///
    /// Returns when the order is sent; [`ready`](Self::ready) says what came of it.
    ///
    /// # Errors
    /// [`MonitorError::Channel`] when the order has more disks and extents than a packet may carry;
    /// [`MonitorError::Ended`] when the monitor is gone.
    pub async fn start(&self, start: Start, fds: &[BorrowedFd<'_>]) -> Result<(), MonitorError> {
        self.send_with_files(Do::Start(start), fds).await
    }

    /// Has what every machine of a shape needs made ahead of the snapshot that [`restore`](Self::restore) or [`stand`](Self::stand) is to
    /// bring: once, first. Returns when it is there.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] with why it cannot be made.
    pub async fn prepare(&self, memory_mib: u32, vcpus: u32) -> Result<(), MonitorError> {
        self.bound(mib(memory_mib))?;
        self.send(Do::Prepare(Prepare { memory_mib, vcpus }), &[]).await?;
        self.reach(|life| life.prepared.then_some(())).await
    }

    /// Makes the machine that a snapshot is of and has it stand still, the agent's way to its first answer walked, until
    /// [`resume`](Self::resume). A machine that is there already ends, and the guest of the snapshot takes it over: nothing of the guest before
    /// is left.
    ///
    /// # Errors
    /// As [`start`](Self::start); [`MonitorError::Ended`] with how the machine ended instead.
    pub async fn stand(&self, restore: Restore, fds: &[BorrowedFd<'_>]) -> Result<Standing, MonitorError> {
        let _turn = self.answer.lock().await;
        let before = self.life.borrow().stood;
        self.send_with_files(Do::Restore(Restore { stand: true, ..restore }), fds).await?;
        self.in_time(self.reach(|life| (life.stood > before).then_some(life.last_stood))).await
    }

    /// Lets a guest that [stands](Self::stand) go on as the one its generation says, encoded as `kiln_protocol::mailbox` has it. Returns when its agent
    /// has acknowledged that, before anything of a user's runs. One that waits at its port ([`waits_at_port`](Self::waits_at_port)) is
    /// still to be told there.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] with how the machine ended instead; [`MonitorError::NotAdopted`] when it does not answer.
    pub(crate) async fn claim(&self, generation: Vec<u8>) -> Result<RestoreTimes, MonitorError> {
        self.acknowledged(self.send(Do::Resume(Resume { generation: Some(generation) }), &[])).await
    }

    /// Makes the machine that a snapshot is of and enters it, in the place of [`start`](Self::start), as the one that its order says. Returns
    /// when its agent has acknowledged that, before anything of a user's runs, or waits at its port to hear it;
    /// [`adopted`](Self::adopted) says when it takes requests.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] with how the machine ended instead; [`MonitorError::NotAdopted`] when its agent does not answer;
    /// otherwise as [`start`](Self::start).
    pub async fn restore(
        &self,
        restore: Restore,
        fds: &[BorrowedFd<'_>],
    ) -> Result<RestoreTimes, MonitorError> {
        self.acknowledged(self.send_with_files(Do::Restore(restore), fds)).await
    }

    async fn acknowledged(
        &self,
        order: impl Future<Output = Result<(), MonitorError>>,
    ) -> Result<RestoreTimes, MonitorError> {
        let _turn = self.answer.lock().await;
        let (entered, resumed, adopted) = {
            let life = self.life.borrow();
            (life.entered, life.resumed, life.adopted)
        };
        self.adoptions_due.store(adopted + 1, Ordering::Release);
        order.await?;
        let acknowledged = |life: &Life| {
            let is_heard = life.last_entered.at_port || life.resumed > resumed;
            (life.entered > entered && is_heard).then_some((life.last_entered.at_port, life.restore))
        };
        let (at_port, times) = self.in_time(self.reach(acknowledged)).await?;
        if at_port {
            // Its identity comes over a connection.
            self.adoptions_due.store(adopted, Ordering::Release);
        }
        Ok(times)
    }

    /// Waits until the guest has become the one it was last told to be: from here it takes requests.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] with how the machine ended instead; [`MonitorError::NotAdopted`] when it takes too long.
    pub async fn adopted(&self) -> Result<RestoreTimes, MonitorError> {
        let due = self.adoptions_due.load(Ordering::Acquire);
        let adopted = |life: &Life| (life.adopted >= due).then_some(life.restore);
        let now = adopted(&self.life.borrow());
        match now {
            Some(times) => Ok(times),
            None => self.in_time(self.reach(adopted)).await,
        }
    }

    /// When the machine that was restored has passed what, so far.
    pub(crate) fn times(&self) -> RestoreTimes {
        self.life.borrow().restore
    }

    pub(crate) async fn in_time<T>(
        &self,
        adopting: impl Future<Output = Result<T, MonitorError>>,
    ) -> Result<T, MonitorError> {
        tokio::time::timeout(ADOPT_LIMIT, adopting).await.unwrap_or(Err(MonitorError::NotAdopted))
    }

    /// Whether the machine has ended, or nobody is left who would find out.
    pub(crate) fn has_ended(&self) -> bool {
        self.life.borrow().end.is_some() || self.life.has_changed().is_err()
    }

    /// A view of the machine's end for whoever owns it.
    pub(crate) fn death_watch(&self) -> DeathWatch {
        DeathWatch { life: self.life.clone() }
    }

    /// Takes the machine from its owner: what he has of it hears nothing any more of what becomes of it.
    pub(crate) fn change_owner(&self) {
        self.owner.send_modify(|owner| *owner += 1);
    }

    /// Waits until a vCPU has entered the guest that boots.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] with how the machine ended instead.
    pub async fn booted(&self) -> Result<BootTimes, MonitorError> {
        self.reach(|life| life.booted.then_some(life.boot)).await
    }

    /// Waits until the agent listens.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] with how the machine ended instead.
    pub async fn ready(&self) -> Result<BootTimes, MonitorError> {
        self.reach(|life| life.ready.then_some(life.boot)).await
    }

    /// How often the agent has parked so far.
    pub(crate) fn parks(&self) -> u64 {
        self.life.borrow().parked
    }

    /// Waits until the agent has parked more often than `before`, and says when it did, on the host's `CLOCK_MONOTONIC`. The machine
    /// stands still then.
    pub(crate) async fn parked_again(&self, before: u64) -> Result<u64, MonitorError> {
        self.reach(|life| (life.parked > before).then_some(life.parked_ns)).await
    }

    /// Whether the guest that was entered last waits at its port to hear who it is.
    pub(crate) fn waits_at_port(&self) -> bool {
        self.life.borrow().last_entered.at_port
    }

    /// Stops the machine between two instructions, and says how long that took.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] with how the machine ended instead.
    pub async fn pause(&self) -> Result<Duration, MonitorError> {
        self.pause_as(Pause { parked: false }).await
    }

    /// The same for a machine whose agent has said that it is parked at its port; it [has parked](Self::parked_again) then.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] with how the machine ended instead.
    pub(crate) async fn park_at_port(&self) -> Result<Duration, MonitorError> {
        self.pause_as(Pause { parked: true }).await
    }

    async fn pause_as(&self, pause: Pause) -> Result<Duration, MonitorError> {
        let took = self.answered(Do::Pause(pause), &[], |life| (life.paused, life.pause_took_ns)).await?;
        Ok(Duration::from_nanos(took))
    }

    /// Lets a paused machine go on, or one that is parked at its doorbell with a generation as `kiln_protocol::mailbox` has it.
    /// `None` for the guest to go on as the one it was. One that is parked at its port says so ([`Entered::at_port`]), and has to
    /// be told there.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] with how the machine ended instead.
    pub async fn resume(&self, generation: Option<Vec<u8>>) -> Result<Entered, MonitorError> {
        self.answered(Do::Resume(Resume { generation }), &[], |life| (life.entered, life.last_entered)).await
    }

    /// Writes the memory of a paused or parked machine to an empty file, and says how long that took.
    ///
    /// # Errors
    /// [`MonitorError::Save`] when it could not be written: the machine stands still as before.
    pub async fn save_memory(&self, file: impl AsFd) -> Result<Duration, MonitorError> {
        self.save_portion(Portion::Whole, file).await
    }

    /// Writes a portion of the memory of a machine to a file.
    pub(crate) async fn save_portion(
        &self,
        portion: Portion,
        file: impl AsFd,
    ) -> Result<Duration, MonitorError> {
        self.save(Do::SaveMemory(SaveMemory { portion: portion.into() }), file.as_fd()).await
    }

    /// Writes everything else of a machine to an empty file, and says how long that took: of one that is paused or parked as it
    /// is, of one that runs as it was when its memory was last saved.
    ///
    /// # Errors
    /// [`MonitorError::Save`] when it could not be written: the machine runs or stands still as before.
    pub async fn save_state(&self, state: SaveState, file: impl AsFd) -> Result<Duration, MonitorError> {
        self.save(Do::SaveState(state), file.as_fd()).await
    }

    /// What the guest last wrote to its console, 64 KiB at most.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] when the machine is gone: its end has the last of it.
    pub async fn console(&self) -> Result<Vec<u8>, MonitorError> {
        self.answered(Do::ShowConsole(ShowConsole {}), &[], |life| (life.consoles, life.console.clone()))
            .await
    }

    /// Waits for the end of the machine, however it comes.
    pub async fn ended(&self) -> Arc<MachineEnd> {
        self.end_watch().ended().await
    }

    /// A view of the machine's end for one who does not own the machine.
    pub(crate) fn end_watch(&self) -> EndWatch {
        let owner = self.owner.subscribe();
        let of = *owner.borrow();
        EndWatch { life: self.life.clone(), owner, of }
    }

    async fn save(&self, order: Do, file: BorrowedFd<'_>) -> Result<Duration, MonitorError> {
        let Saved { failure, took_ns, .. } =
            self.answered(order, &[file], |life| (life.saved, life.last_saved.clone())).await?;
        if failure.is_empty() { Ok(Duration::from_nanos(took_ns)) } else { Err(MonitorError::Save(failure)) }
    }

    /// Gives an order and waits for its answer, which `look` finds beside the number of such answers so far.
    async fn answered<T>(
        &self,
        order: Do,
        fds: &[BorrowedFd<'_>],
        look: impl Fn(&Life) -> (u64, T),
    ) -> Result<T, MonitorError> {
        let _turn = self.answer.lock().await;
        let (before, _) = look(&self.life.borrow());
        self.send(order, fds).await?;
        let answer = |life: &Life| {
            let (count, answer) = look(life);
            (count > before).then_some(answer)
        };
        self.reach(answer).await
    }

    async fn reach<T>(&self, reached: impl Fn(&Life) -> Option<T>) -> Result<T, MonitorError> {
        Ok(reach(self.life.clone(), reached).await?)
    }

    /// Bounds its control group to what a machine needs with so much memory, before the machine is made.
    fn bound(&self, guest_bytes: u64) -> Result<(), MonitorError> {
        let Some(group) = &self.group else { return Ok(()) };
        match group.bound(guest_bytes) {
            // It is removed with the process, whose end says why.
            Err(_) if self.has_ended() => Ok(()),
            bounded => Ok(bounded?),
        }
    }

    /// Gives an order with more files beside it than a packet may carry.
    async fn send_with_files(&self, order: Do, fds: &[BorrowedFd<'_>]) -> Result<(), MonitorError> {
        if self.group.is_some()
            && let Some(bytes) = guest_bytes(&order, fds).map_err(MonitorError::Setup)?
        {
            self.bound(bytes)?;
        }
        let (mut rest, beside) = fds.split_at(fds.len().saturating_sub(MAX_PACKET_FDS));
        while !rest.is_empty() {
            let (files, others) = rest.split_at(rest.len().min(MAX_PACKET_FDS));
            self.send(Do::Files(Files {}), files).await?;
            rest = others;
        }
        self.send(order, beside).await
    }
}

/// The memory of the guest that an order makes; [`UNBOUNDED`] when that bounds nothing, for its files are memory too, and `None` of an order that
/// makes none.
fn guest_bytes(order: &Do, fds: &[BorrowedFd<'_>]) -> io::Result<Option<u64>> {
    let file = |index: u32| fds.get(index as usize).copied().ok_or(io::ErrorKind::InvalidInput);
    let (bytes, disks) = match order {
        Do::Start(start) => (mib(start.memory_mib), &start.disks),
        Do::Restore(restore) => {
            let memory = file(restore.memory_fd)?;
            if is_in_memory(memory)? {
                return Ok(Some(UNBOUNDED));
            }
            (fstat(memory)?.st_size.cast_unsigned(), &restore.disks)
        }
        _ => return Ok(None),
    };
    for extent in disks.iter().filter(|disk| !disk.read_only).flat_map(|disk| &disk.extents) {
        if is_in_memory(file(extent.fd)?)? {
            return Ok(Some(UNBOUNDED));
        }
    }
    Ok(Some(bytes))
}

fn is_in_memory(file: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(fstatfs(file)?.f_type.cast_unsigned() == TMPFS_MAGIC)
}

fn mib(mib: u32) -> u64 {
    u64::from(mib) << 20
}
