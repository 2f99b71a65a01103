//! A running virtual machine, and how one comes up.

pub(crate) mod boot;
mod builder;
mod exec;

use std::io;
use std::sync::Arc;

use kiln_rootfs::ScratchError as FormatError;

pub use builder::VmBuilder;
pub use exec::{ExecBuilder, ExecError, Output};

use crate::agent::AgentError;
use crate::disk::{Disk, ScratchError};
use crate::monitor::{BootTimes, MachineEnd, Monitor, MonitorError, RestoreTimes};
use crate::snapshot::{BakeError, SnapshotError};
use crate::{Blame, BundleError, GuestBundle};

/// The least memory a machine may have, in MiB.
pub const MEMORY_MIN_MIB: u32 = 64;
/// The most vCPUs a machine may have.
pub const VCPUS_MAX: u32 = 16;
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
            Self::Adopted => "adopted",
        }
    }
}

/// A running virtual machine with its root mounted; dropping it ends it.
#[derive(Debug)]
pub struct Vm {
    monitor: Monitor,
    times: Times,
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
}

impl VmError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Shape(_) | Self::Scratch(ScratchError::Format(FormatError::Size { .. })) => Blame::Caller,
            Self::Monitor(MonitorError::Ended(end)) => end.blame(),
            Self::Monitor(MonitorError::Channel(_)) => Blame::Kiln,
            Self::Monitor(_) | Self::Scratch(_) | Self::Entropy(_) | Self::Bundle(_) => Blame::Host,
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
        ExecBuilder::new(&self.monitor, argv.into_iter().map(Into::into).collect())
    }

    /// When the machine passed which step on its way up.
    pub fn times(&self) -> Times {
        self.times
    }

    /// Waits for the end of the machine, however it comes.
    pub async fn ended(&self) -> Arc<MachineEnd> {
        self.monitor.ended().await
    }

    /// Ends the machine at once, as pulling the plug would, and waits until its process is gone.
    pub async fn stop(self) -> MachineEnd {
        self.monitor.stop().await
    }
}
