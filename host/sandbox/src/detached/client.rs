//! A machine that another process keeps.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use kiln_protocol::Request as AgentRequest;
use kiln_store::SnapshotRecord;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::net::UnixStream;

use super::wire::{
    self, Answered, Ended, Hold, Nothing, Outcome, Port, PowerOff, Reply, Request, Saved, Signal, Snapshot,
    Used, Wanted,
};
use super::{DetachedError, Exit, Machines};
use crate::vm::boot::blocking;
use crate::{AskError, ExecBuilder, HostStats, MachineCopy, Standstill};

/// How long a keeper whose connection broke may take to be gone.
const DYING_LIMIT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// A machine that another process keeps. Nothing happens to it when this is dropped.
#[derive(Clone, Debug)]
pub struct Kept {
    machines: Machines,
    name: String,
}

impl Machines {
    /// The machine of this name or id, kept by another process.
    ///
    /// # Errors
    /// [`DetachedError::NotRunning`]; otherwise as [`find`](Self::find).
    pub fn reach(&self, name: &str) -> Result<Kept, DetachedError> {
        let record = self.find(name)?;
        if !record.state.is_up() {
            return Err(DetachedError::NotRunning(record.name));
        }
        Ok(Kept { machines: self.clone(), name: record.name })
    }

    /// Waits until a machine does not run, and says what it ended with; 0 for one that never ran. Safe to cancel.
    ///
    /// # Errors
    /// [`DetachedError::Keeper`] when its keeper refuses; otherwise as [`find`](Self::find).
    pub async fn ended(&self, name: &str) -> Result<Exit, DetachedError> {
        let kept = match self.reach(name) {
            Ok(kept) => kept,
            Err(DetachedError::NotRunning(name)) => return Ok(self.find(&name)?.exit.unwrap_or(Exit::NONE)),
            Err(error) => return Err(error),
        };
        let error = match kept.ended().await {
            Ok(exit) => return Ok(exit),
            Err(error @ DetachedError::Keeper { .. }) => error,
            Err(error) => return Err(error),
        };
        // It may have ended before it heard of us, or died; and what dies lets go of its files one by one.
        if let Some(keeper) = self.find(&kept.name).ok().and_then(|record| record.keeper_pid) {
            gone(keeper).await;
        }
        self.reconcile()?;
        match self.find(&kept.name) {
            Ok(record) if record.state.is_up() => Err(error),
            Ok(record) => Ok(record.exit.unwrap_or(Exit::KILLED)),
            // One that was to be removed, and died.
            Err(DetachedError::Unknown(_)) => Ok(Exit::KILLED),
            Err(error) => Err(error),
        }
    }
}

/// Waits until a process is gone, if it goes.
async fn gone(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let Some(process) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else { return };
    // Whatever comes of it, the record is looked at next.
    let _ = blocking(move || poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&DYING_LIMIT))).await;
}

impl Kept {
    /// The name of the machine.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Describes a command, as [`Vm::exec`](crate::Vm::exec) does. Its streams do not pass the keeper.
    pub fn exec<I>(&self, argv: I) -> ExecBuilder<'_>
    where
        I: IntoIterator,
        I::Item: Into<OsString>,
    {
        ExecBuilder::new(self, argv.into_iter().map(Into::into).collect())
    }

    /// As [`Vm::pause`](crate::Vm::pause).
    ///
    /// # Errors
    /// [`DetachedError`]
    pub async fn pause(&self) -> Result<Duration, DetachedError> {
        match self.ask(Wanted::Pause(Nothing {})).await? {
            (Outcome::Paused(paused), _) => Ok(Duration::from_nanos(paused.took_ns)),
            _ => Err(self.odd()),
        }
    }

    /// As [`Vm::resume`](crate::Vm::resume).
    ///
    /// # Errors
    /// [`DetachedError`]
    pub async fn resume(&self) -> Result<(), DetachedError> {
        self.done(Wanted::Resume(Nothing {})).await
    }

    /// As [`Vm::power_off`](crate::Vm::power_off). When this returns, nothing of the machine is left but its record.
    ///
    /// # Errors
    /// [`DetachedError`]
    pub async fn power_off(&self, grace: Duration) -> Result<(), DetachedError> {
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self.done(Wanted::PowerOff(PowerOff { grace_ms })).await
    }

    /// Ends the machine at once. When this returns, nothing of it is left but its record.
    ///
    /// # Errors
    /// [`DetachedError`]
    pub async fn end(&self) -> Result<(), DetachedError> {
        self.done(Wanted::End(Nothing {})).await
    }

    /// Sends its main command a signal. SIGKILL ends the machine, and this returns when nothing of it is left.
    ///
    /// # Errors
    /// [`DetachedError`]
    pub async fn signal(&self, number: u8) -> Result<(), DetachedError> {
        self.done(Wanted::Signal(Signal { number: number.into() })).await
    }

    /// Waits until nothing of the machine is left but its record, and says what it ended with. Safe to cancel.
    ///
    /// # Errors
    /// [`DetachedError::Keeper`] also when its keeper dies.
    pub async fn ended(&self) -> Result<Exit, DetachedError> {
        match self.ask(Wanted::Wait(Nothing {})).await? {
            (Outcome::Ended(Ended { code, signal }), _) => {
                Ok(Exit { code: code as u8, signal: (signal != 0).then_some(signal as u8) })
            }
            _ => Err(self.odd()),
        }
    }

    /// Has its keeper listen for a TCP port of the guest's, now and whenever the machine starts; returns where. Port 0 stands for
    /// one that the host chooses each time.
    ///
    /// # Errors
    /// [`DetachedError`]
    pub async fn expose(&self, address: SocketAddr, guest: u16) -> Result<SocketAddr, DetachedError> {
        let port = Port { address: address.to_string(), guest: guest.into() };
        match self.ask(Wanted::Expose(port)).await? {
            (Outcome::Exposed(port), _) => port.address.parse().map_err(|error| self.failed(&error)),
            _ => Err(self.odd()),
        }
    }

    /// Has its keeper listen no more for a port that was exposed: at this address, where it was to be or is. Connections go on.
    ///
    /// # Errors
    /// [`DetachedError`]
    pub async fn unexpose(&self, address: SocketAddr, guest: u16) -> Result<(), DetachedError> {
        self.done(Wanted::Unexpose(Port { address: address.to_string(), guest: guest.into() })).await
    }

    /// Leaves the connection of a command to the keeper.
    pub(crate) async fn hold(
        &self,
        stream: UnixStream,
        pid: u32,
        timeout_ms: u64,
        command: String,
    ) -> Result<(), DetachedError> {
        let stream = stream.into_std().map_err(|error| self.failed(&error))?;
        let wanted = Wanted::Hold(Hold { pid, timeout_ms, command });
        match self.ask_with(wanted, &[stream.as_fd()]).await? {
            (Outcome::Done(_), _) => Ok(()),
            _ => Err(self.odd()),
        }
    }

    /// As [`Vm::snapshot`](crate::Vm::snapshot), to the store of its keeper.
    ///
    /// # Errors
    /// [`DetachedError`]
    pub async fn snapshot(
        &self,
        name: Option<String>,
    ) -> Result<(SnapshotRecord, Standstill), DetachedError> {
        let wanted = Wanted::Snapshot(Snapshot { name: name.unwrap_or_default() });
        let (record, standstill, _) = self.saved(wanted).await?;
        Ok((record, standstill))
    }

    /// As [`Vm::copy`](crate::Vm::copy), in the store of its keeper.
    ///
    /// # Errors
    /// [`DetachedError`]
    pub async fn copy(&self) -> Result<(MachineCopy, Standstill), DetachedError> {
        let (record, standstill, files) = self.saved(Wanted::Copy(Nothing {})).await?;
        let copy = MachineCopy::from_parts(record, files).ok_or_else(|| self.odd())?;
        Ok((copy, standstill))
    }

    /// Has a request passed on to the agent, and returns the payload of its answer and the connection.
    pub(crate) async fn pass_on(&self, request: AgentRequest) -> Result<(Vec<u8>, UnixStream), AskError> {
        let (Outcome::Answered(Answered { reply }), files) = self.ask(Wanted::Agent(request)).await? else {
            return Err(self.odd().into());
        };
        Ok((reply, self.stream(files)?))
    }

    /// Has a vsock port of the guest connected to.
    pub(crate) async fn connect_to(&self, port: u32) -> Result<UnixStream, DetachedError> {
        let (Outcome::Done(_), files) = self.ask(Wanted::Connect(port)).await? else {
            return Err(self.odd());
        };
        self.stream(files)
    }

    /// What the process uses that the machine is.
    pub(crate) async fn host_stats(&self) -> Result<HostStats, DetachedError> {
        let (Outcome::Used(used), _) = self.ask(Wanted::Use(Nothing {})).await? else {
            return Err(self.odd());
        };
        let Used { resident_bytes, private_bytes, resident_peak_bytes, cpu_us } = used;
        let cpu_time = Duration::from_micros(cpu_us);
        Ok(HostStats { resident_bytes, private_bytes, resident_peak_bytes, cpu_time })
    }

    /// The connection that came with an answer.
    fn stream(&self, files: Vec<OwnedFd>) -> Result<UnixStream, DetachedError> {
        let Ok([stream]) = <[OwnedFd; 1]>::try_from(files) else { return Err(self.odd()) };
        let stream = StdStream::from(stream);
        let stream = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
        stream.map_err(|error| self.failed(&error))
    }

    async fn saved(
        &self,
        wanted: Wanted,
    ) -> Result<(SnapshotRecord, Standstill, Vec<OwnedFd>), DetachedError> {
        let (Outcome::Saved(saved), files) = self.ask(wanted).await? else { return Err(self.odd()) };
        let Saved { record, frozen_ns, still_ns } = saved;
        let record = serde_json::from_slice(&record).map_err(|error| self.failed(&error))?;
        let [frozen, still] = [frozen_ns, still_ns].map(Duration::from_nanos);
        Ok((record, Standstill { frozen, still }, files))
    }

    async fn done(&self, wanted: Wanted) -> Result<(), DetachedError> {
        match self.ask(wanted).await? {
            (Outcome::Done(_), _) => Ok(()),
            _ => Err(self.odd()),
        }
    }

    /// Sends one request and waits for its answer, for as long as that takes.
    async fn ask(&self, wanted: Wanted) -> Result<(Outcome, Vec<OwnedFd>), DetachedError> {
        self.ask_with(wanted, &[]).await
    }

    async fn ask_with(
        &self,
        wanted: Wanted,
        files: &[BorrowedFd<'_>],
    ) -> Result<(Outcome, Vec<OwnedFd>), DetachedError> {
        let channel =
            wire::reach(&self.machines.folder_of(&self.name)).map_err(|error| self.failed(&error))?;
        let request = Request { wanted: Some(wanted) };
        channel.send(&request, files).await.map_err(|error| self.failed(&error))?;
        let (reply, files) = channel.receive::<Reply>().await.map_err(|error| self.failed(&error))?;
        match reply.outcome {
            Some(Outcome::Failed(failed)) => Err(DetachedError::Refused {
                blame: wire::Blame::try_from(failed.blame).unwrap_or(wire::Blame::Kiln).into(),
                message: failed.message,
            }),
            Some(outcome) => Ok((outcome, files)),
            None => Err(self.odd()),
        }
    }

    fn failed(&self, error: &dyn std::error::Error) -> DetachedError {
        DetachedError::Keeper { name: self.name.clone(), why: error.to_string() }
    }

    fn odd(&self) -> DetachedError {
        DetachedError::Keeper { name: self.name.clone(), why: "it answered something else".to_owned() }
    }
}
