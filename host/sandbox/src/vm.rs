//! A running virtual machine, and how one comes up.

pub(crate) mod boot;
mod builder;
pub(crate) mod copying;
pub(crate) mod exec;
mod inside;
pub(crate) mod stats;
mod target;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::{AGENT_PORT, Call, PowerOff, Request};
use kiln_rootfs::ScratchError as FormatError;

use tokio::net::UnixStream;

pub use boot::random_name;
pub use builder::VmBuilder;
pub use copying::{MachineCopy, Standstill};
pub use exec::{ExecBuilder, ExecError, Output};
pub use stats::{GuestStats, HostStats, Stats};
pub use target::AskError;
pub(crate) use target::{Asking, Target};

use copying::Origin;

use crate::agent::{self, AgentError};
use crate::disk::{Disk, ScratchError};
use crate::monitor::{BootTimes, MachineEnd, Monitor, MonitorError, RestoreTimes};
use crate::pool::Lease;
use crate::snapshot::{BakeError, SnapshotError};
use crate::{Blame, BundleError, GuestBundle};

/// The least memory a machine may have, in MiB.
pub const MEMORY_MIN_MIB: u32 = 64;
/// The most vCPUs a machine may have.
pub const VCPUS_MAX: u32 = 16;
/// How long a guest may take to end beyond the grace that its processes have.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(30);
/// Every machine has its vsock to itself, so every guest has the same context id.
pub(crate) const GUEST_CID: u64 = 3;

/// A step on a machine's way up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The monitor process runs.
    MonitorSpawned,
    /// The first vCPU entered the guest.
    Entered,
    /// The agent's first instruction.
    AgentStarted,
    /// The agent listens.
    Ready,
    /// The guest can run commands.
    SetupDone,
    /// A guest was booted and saved, for templates to be made from.
    BaseBaked,
    /// A guest with the image mounted was saved, for machines to be made from.
    TemplateBaked,
    /// The agent of a restored guest took the identity it was given: its first instructions.
    Resumed,
    /// The same of a guest whose kernel gives its agent no doorbell: it asked for its identity over a connection, which takes
    /// the guest kernel and is slower.
    ResumedWithoutDoorbell,
    /// The restored guest has that identity, and can run commands.
    Adopted,
}

impl Phase {
    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::MonitorSpawned => "monitor_spawned",
            Self::Entered => "entered",
            Self::AgentStarted => "agent_started",
            Self::Ready => "ready",
            Self::SetupDone => "setup_done",
            Self::BaseBaked => "base_baked",
            Self::TemplateBaked => "template_baked",
            Self::Resumed => "resumed",
            Self::ResumedWithoutDoorbell => "resumed_without_doorbell",
            Self::Adopted => "adopted",
        }
    }
}

/// A virtual machine with its root mounted; dropping it ends it, or gives it back to the [`Pool`](crate::Pool) it was acquired from.
///
/// ```text
/// start ─▶ running ──pause──▶ paused ─▶ ended
///           │  ▲ └─copied─▶│    │
///           │  └──resume───┴────┘
///           └──stop, power_off, or the guest ends──▶ ended
/// ```
#[derive(Debug)]
pub struct Vm {
    machine: Arc<Machine>,
    times: Times,
    /// What gives it back to its pool, after all else of this has been dropped.
    lease: Option<Lease>,
}

/// What a machine's handle shares with a copy of it that is under way.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) monitor: Monitor,
    pub(crate) origin: Origin,
    /// Held by who stops the machine or lets it go on. True while it stands still because its owner wants it so.
    pub(crate) paused: tokio::sync::Mutex<bool>,
}

/// When a machine passed which step on its way up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// It booted.
    Boot(BootTimes),
    /// It was made from a snapshot.
    Restore(RestoreTimes),
}

/// Why a machine did not come up.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The shape asked for is outside the limits.
    #[error("{0}")]
    Shape(String),
    /// The scratch disk could not be made.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// The monitor could not be started or spoken to, or the machine ended on its way up.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// The agent did not come up in time.
    #[error("the guest did not come up within {} s", boot::BOOT_LIMIT.as_secs())]
    BootOverdue(MachineEnd),
    /// The agent did not finish set-up in time.
    #[error("the guest was not ready for commands within {} s", boot::SETUP_LIMIT.as_secs())]
    SetupOverdue(MachineEnd),
    /// The agent could not make the guest ready for commands.
    #[error("cannot set up the guest")]
    Setup(#[source] AgentError),
    /// The host has no random numbers to give.
    #[error("cannot read random bytes")]
    Entropy(#[source] io::Error),
    /// The guest kernel or its initramfs could not be made a file.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A snapshot could not be restored here.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// No snapshot could be made.
    #[error(transparent)]
    Bake(#[from] BakeError),
    /// A paused machine was to be copied: its guest cannot make itself ready for it.
    #[error("the machine is paused")]
    Paused,
    /// A machine of a snapshot did not come up in time.
    #[error("a machine was not made of its snapshot within {:.1} s", .0.as_secs_f64())]
    RestoreOverdue(Duration),
    /// A machine was to be copied that is being baked.
    #[error("a machine that is being baked cannot be copied")]
    Baking,
}

impl VmError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Shape(_)
            | Self::Paused
            | Self::Baking
            | Self::Scratch(ScratchError::Format(FormatError::Size { .. })) => Blame::Caller,
            Self::Monitor(error) => error.blame(),
            Self::RestoreOverdue(_) | Self::Scratch(_) | Self::Entropy(_) | Self::Bundle(_) => Blame::Host,
            Self::BootOverdue(_) | Self::SetupOverdue(_) => Blame::Guest,
            Self::Setup(error) => error.blame(),
            Self::Snapshot(error) => error.blame(),
            Self::Bake(error) => error.blame(),
        }
    }

    /// How the machine ended, when that is what went wrong.
    pub fn machine_end(&self) -> Option<&MachineEnd> {
        match self {
            Self::Monitor(MonitorError::Ended(end)) | Self::Setup(AgentError::MachineEnded(end)) => Some(end),
            Self::BootOverdue(end) | Self::SetupOverdue(end) => Some(end),
            Self::Snapshot(error) => error.machine_end(),
            Self::Bake(error) => error.machine_end(),
            _ => None,
        }
    }
}

impl Vm {
    /// Describes a machine that boots `guest` and has `root`, an image's disk, as its root.
    pub fn builder(guest: GuestBundle, root: Disk) -> VmBuilder {
        VmBuilder::new(guest, root)
    }

    /// Describes a command: its program, looked up in the guest's PATH, and arguments.
    pub fn exec<I>(&self, argv: I) -> ExecBuilder<'_>
    where
        I: IntoIterator,
        I::Item: Into<std::ffi::OsString>,
    {
        let exec = ExecBuilder::new(&self.machine.monitor, argv.into_iter().map(Into::into).collect());
        match &self.machine.origin.commands {
            Some(launch) => exec.like(launch),
            None => exec,
        }
    }

    /// Passes on what another process wants of the agent, and returns the payload of its answer and the connection.
    pub(crate) async fn pass_on(&self, request: &Request) -> Result<(Vec<u8>, UnixStream), AskError> {
        target::pass_on(&self.machine.monitor, request).await
    }

    /// When the machine passed which step on its way up.
    pub fn times(&self) -> Times {
        self.times
    }

    /// The process id of its monitor.
    pub fn monitor_id(&self) -> u32 {
        self.machine.monitor.process_id()
    }

    /// Waits for the end of the machine, however it comes.
    pub async fn ended(&self) -> Arc<MachineEnd> {
        self.machine.monitor.ended().await
    }

    /// Gives the machine back to the pool it was acquired from, as dropping it does; one of no pool ends.
    pub fn release(self) {}

    /// Ends the machine at once, as pulling the plug would, and waits until its process is gone. A pool makes another in its place.
    pub async fn stop(self) -> MachineEnd {
        let Self { machine, lease, .. } = self;
        let _place = lease.map(Lease::forfeit);
        machine.monitor.pull_the_plug().await.unwrap_or_default()
    }

    pub(crate) fn monitor(&self) -> &Monitor {
        &self.machine.monitor
    }

    /// The monitor of a machine that nothing else holds.
    pub(crate) fn into_monitor(self) -> Option<Monitor> {
        Arc::try_unwrap(self.machine).ok().map(|machine| machine.monitor)
    }

    /// Has the machine go back to a pool when it is dropped.
    pub(crate) fn leased(mut self, lease: impl FnOnce(Arc<Machine>) -> Lease) -> Self {
        self.lease = Some(lease(Arc::clone(&self.machine)));
        self
    }

    /// The same for one who shares the machine. A monitor that does not obey within seconds lives on until the machine is
    /// dropped.
    pub async fn end(&self) {
        let _ = self.machine.monitor.pull_the_plug().await;
    }

    /// Has the guest end by itself: its processes are asked to (SIGTERM), killed after `grace`, and its disks are written out.
    /// Returns when it has ended; a guest that does not within some seconds more is ended as by [`end`](Self::end). A paused
    /// machine goes on for it.
    ///
    /// # Errors
    /// [`VmError::Monitor`] when the machine cannot be reached.
    pub async fn power_off(&self, grace: Duration) -> Result<Arc<MachineEnd>, VmError> {
        self.resume().await?;
        let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let monitor = &self.machine.monitor;
        let asking = async {
            let _turn = monitor.requests.read().await;
            let stream = monitor.connect(AGENT_PORT).await?;
            // Its answer is the end.
            let _ = agent::ask(stream, Call::PowerOff(PowerOff { grace_ms })).await;
            Ok::<_, MonitorError>(monitor.ended().await)
        };
        let limit = grace.saturating_add(POWER_OFF_LIMIT);
        if let Ok(ended) = tokio::time::timeout(limit, asking).await {
            return Ok(ended?);
        }
        self.end().await;
        Ok(monitor.ended().await)
    }

    /// Stops the machine between two instructions, and says how long that took. It takes no processor time until
    /// [`resume`](Self::resume), its clocks go on, and a command's streams wait. Nothing to do when it is paused.
    ///
    /// # Errors
    /// [`VmError::Monitor`] with how the machine ended instead.
    pub async fn pause(&self) -> Result<Duration, VmError> {
        let mut paused = self.machine.paused.lock().await;
        // Whoever drops this future has a machine that may be paused, and is let go on.
        *paused = true;
        Ok(self.machine.monitor.pause().await?)
    }

    /// Lets a paused machine go on where it stopped. Nothing to do when it runs.
    ///
    /// # Errors
    /// [`VmError::Monitor`] with how the machine ended instead.
    pub async fn resume(&self) -> Result<(), VmError> {
        let mut paused = self.machine.paused.lock().await;
        // One that runs already says so.
        self.machine.monitor.resume(None).await?;
        *paused = false;
        Ok(())
    }
}
