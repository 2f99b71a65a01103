//! A machine that another process keeps.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::time::Duration;

use kiln_protocol::Request as AgentRequest;
use kiln_store::SnapshotRecord;
use tokio::net::UnixStream;

use super::wire::{
    self, Answered, Nothing, Outcome, PowerOff, Reply, Request, Saved, Snapshot, Used, Wanted,
};
use super::{DetachedError, Machines};
use crate::{AskError, ExecBuilder, HostStats, MachineCopy, Standstill};

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
        let channel =
            wire::reach(&self.machines.folder_of(&self.name)).map_err(|error| self.failed(&error))?;
        let request = Request { wanted: Some(wanted) };
        channel.send(&request, &[]).await.map_err(|error| self.failed(&error))?;
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
