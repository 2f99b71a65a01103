//! A running virtual machine, and how one comes up.

mod exec;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kiln_control::Start;
use kiln_protocol::{AGENT_PORT, Call, Outcome, Setup};
use rustix::time::{ClockId, clock_gettime};

pub use exec::{ExecBuilder, ExecError, Output};

use crate::agent::{self, AgentError};
use crate::disk::{self, Descriptors, Disk, Scratch, ScratchError};
use crate::monitor::{BootTimes, LineListener, MachineEnd, Monitor, MonitorError, MonitorProgram};
use crate::{Blame, GuestBundle};

/// The least memory a machine may have, in MiB.
pub const MEMORY_MIN_MIB: u32 = 64;
/// The most vCPUs a machine may have.
pub const VCPUS_MAX: u32 = 16;
/// How long a guest kernel may take until its agent listens. It catches one that hangs: a kernel that is emulated on a
/// host with too much to do can take minutes.
const BOOT_LIMIT: Duration = Duration::from_mins(10);
/// How long the agent may take to make the guest ready for commands; as generous for the same reason.
const SETUP_LIMIT: Duration = Duration::from_mins(5);
/// Random bytes for the guest kernel's generator.
const ENTROPY_BYTES: usize = 64;
/// Every machine has its vsock to itself, so every guest has the same context id.
const GUEST_CID: u64 = 3;

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
        }
    }
}

type PhaseObserver = Arc<dyn Fn(Phase, u64) + Send + Sync>;

/// What a machine is to be. Made by [`Vm::builder`].
pub struct VmBuilder {
    program: MonitorProgram,
    guest: GuestBundle,
    root: Disk,
    memory_mib: u32,
    vcpus: u32,
    hostname: String,
    scratch: Scratch,
    volumes: Vec<String>,
    working_directory: String,
    command_is_process_1: bool,
    cmdline: String,
    console: Option<OwnedFd>,
    observer: Option<PhaseObserver>,
    warnings: Option<LineListener>,
}

/// A running virtual machine with its root mounted; dropping it ends it.
#[derive(Debug)]
pub struct Vm {
    monitor: Monitor,
    times: BootTimes,
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
    #[error("the guest did not come up within {} s", BOOT_LIMIT.as_secs())]
    BootOverdue(MachineEnd),
    /// The agent did not finish set-up in time.
    #[error("the guest was not ready for commands within {} s", SETUP_LIMIT.as_secs())]
    SetupOverdue(MachineEnd),
    /// The agent could not make the guest ready for commands.
    #[error("cannot set up the guest")]
    Setup(#[source] AgentError),
    /// The host has no random numbers to give.
    #[error("cannot read random bytes")]
    Entropy(#[source] io::Error),
}

impl VmError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Shape(_) | Self::Scratch(ScratchError::Format(kiln_rootfs::ScratchError::Size { .. })) => {
                Blame::Caller
            }
            Self::Monitor(MonitorError::Ended(end)) => end.blame(),
            Self::Monitor(MonitorError::Channel(_)) => Blame::Kiln,
            Self::Monitor(_) | Self::Scratch(_) | Self::Entropy(_) => Blame::Host,
            Self::BootOverdue(_) | Self::SetupOverdue(_) => Blame::Guest,
            Self::Setup(error) => error.blame(),
        }
    }

    /// How the machine ended, when that is what went wrong.
    pub fn machine_end(&self) -> Option<&MachineEnd> {
        match self {
            Self::Monitor(MonitorError::Ended(end)) | Self::Setup(AgentError::MachineEnded(end)) => Some(end),
            Self::BootOverdue(end) | Self::SetupOverdue(end) => Some(end),
            _ => None,
        }
    }
}

impl VmBuilder {
    /// The executable monitors are made from; the running program by default.
    pub fn monitor_program(mut self, program: MonitorProgram) -> Self {
        self.program = program;
        self
    }

    /// Guest memory in MiB, 512 by default. It is a ceiling: memory is committed as the guest touches it.
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// The number of vCPUs, 1 by default.
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// The host name commands see; `kiln` by default.
    pub fn hostname(mut self, hostname: impl Into<String>) -> Self {
        self.hostname = hostname.into();
        self
    }

    /// Where the guest's changes to its root go; guest memory by default.
    pub fn scratch(mut self, scratch: Scratch) -> Self {
        self.scratch = scratch;
        self
    }

    /// Paths in the image that become writable places of their own (`VOLUME`).
    pub fn volumes(mut self, volumes: impl IntoIterator<Item = String>) -> Self {
        self.volumes = volumes.into_iter().collect();
        self
    }

    /// A directory that commands will start in and the image may lack. Elsewhere than under a read-only root, commands
    /// find theirs made when they start.
    pub fn working_directory(mut self, folder: impl Into<String>) -> Self {
        self.working_directory = folder.into();
        self
    }

    /// Makes the first command process 1 of the guest, as `docker run` does: when it ends, so does every other process,
    /// and there is no second command. Otherwise a reaper is, commands come and go, and orphans are collected.
    pub fn command_is_process_1(mut self, yes: bool) -> Self {
        self.command_is_process_1 = yes;
        self
    }

    /// Words added at the end of the guest kernel's command line.
    pub fn kernel_cmdline(mut self, words: impl Into<String>) -> Self {
        self.cmdline = words.into();
        self
    }

    /// Where the guest's console output goes as well.
    pub fn console(mut self, output: impl Into<OwnedFd>) -> Self {
        self.console = Some(output.into());
        self
    }

    /// Is told each phase on the way up as it happens, with its time on the host's `CLOCK_MONOTONIC` in nanoseconds.
    pub fn on_phase(mut self, observer: impl Fn(Phase, u64) + Send + Sync + 'static) -> Self {
        self.observer = Some(Arc::new(observer));
        self
    }

    /// Is told what the monitor warns of, a line at a time: a block of the image that is not what it was, for one,
    /// which the guest sees as an I/O error.
    pub fn on_warning(mut self, listener: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.warnings = Some(Box::new(listener));
        self
    }

    /// Makes the machine, boots it and makes it ready for commands.
    ///
    /// A dropped future ends whatever has been started.
    ///
    /// # Errors
    /// [`VmError`], by what went wrong; [`VmError::machine_end`] has the guest's last words where there are any.
    pub async fn start(self) -> Result<Vm, VmError> {
        self.check_shape()?;
        let monitor = Monitor::spawn_with(&self.program, self.warnings)?;
        let mut disks = vec![self.root];
        let (mut scratch_device, mut read_only) = (String::new(), false);
        match self.scratch {
            Scratch::Disk { folder, size_bytes } => {
                disks.push(make_scratch(folder, size_bytes).await?);
                "/dev/vdb".clone_into(&mut scratch_device);
            }
            Scratch::Memory => {}
            Scratch::ReadOnly => read_only = true,
        }

        let mut descriptors = Descriptors::default();
        let mut start = Start {
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            kernel_fd: descriptors.add(self.guest.kernel()),
            initramfs_fd: descriptors.add(self.guest.initramfs()),
            cmdline: self.cmdline,
            cid: GUEST_CID,
            ..Start::default()
        };
        start.console_fd = self.console.as_ref().map(|console| descriptors.add(console));
        disk::describe(&disks, &mut start, &mut descriptors);
        if !descriptors.fit() {
            return Err(VmError::Shape("the image has more layers than a machine can be given files".into()));
        }
        monitor.start(start, descriptors.as_slice()).await?;

        let tell = |phase, nanoseconds| {
            if let Some(observer) = &self.observer {
                observer(phase, nanoseconds);
            }
        };
        let coming_up = async {
            let times = monitor.booted().await?;
            tell(Phase::MonitorSpawned, times.spawned_ns);
            tell(Phase::Entered, times.entered_ns);
            let times = monitor.ready().await?;
            if times.agent_started_ns != 0 {
                tell(Phase::AgentStarted, times.agent_started_ns);
            }
            tell(Phase::Ready, times.ready_ns);
            Ok::<_, MonitorError>(times)
        };
        let Ok(times) = tokio::time::timeout(BOOT_LIMIT, coming_up).await else {
            return Err(VmError::BootOverdue(monitor.stop().await));
        };
        let times = times?;

        let setup = Setup {
            root_device: "/dev/vda".into(),
            scratch_device,
            read_only,
            hostname: self.hostname,
            volumes: self.volumes,
            working_directory: self.working_directory,
            reaper: !self.command_is_process_1,
            resolv_conf: String::new(),
            realtime_ns: clock_ns(ClockId::Realtime),
            entropy: entropy()?,
        };
        match tokio::time::timeout(SETUP_LIMIT, set_up(&monitor, setup)).await {
            Ok(done) => done?,
            Err(_) => return Err(VmError::SetupOverdue(monitor.stop().await)),
        }
        tell(Phase::SetupDone, clock_ns(ClockId::Monotonic));
        Ok(Vm { monitor, times })
    }

    fn check_shape(&self) -> Result<(), VmError> {
        if self.memory_mib < MEMORY_MIN_MIB {
            return Err(VmError::Shape(format!(
                "{} MiB of memory where {MEMORY_MIN_MIB} MiB is the least",
                self.memory_mib
            )));
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(VmError::Shape(format!("{} vCPUs where 1 to {VCPUS_MAX} are possible", self.vcpus)));
        }
        Ok(())
    }
}

impl Vm {
    /// Describes a machine that boots `guest` and has `root`, an image's disk, as its root.
    pub fn builder(guest: GuestBundle, root: Disk) -> VmBuilder {
        VmBuilder {
            program: MonitorProgram::this(),
            guest,
            root,
            memory_mib: 512,
            vcpus: 1,
            hostname: "kiln".into(),
            scratch: Scratch::Memory,
            volumes: Vec::new(),
            working_directory: String::new(),
            command_is_process_1: false,
            cmdline: String::new(),
            console: None,
            observer: None,
            warnings: None,
        }
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
    pub fn boot_times(&self) -> BootTimes {
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

async fn make_scratch(folder: PathBuf, size_bytes: u64) -> Result<Disk, VmError> {
    let made = tokio::task::spawn_blocking(move || disk::scratch_disk(&folder, size_bytes)).await;
    Ok(made.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?)
}

async fn set_up(monitor: &Monitor, setup: Setup) -> Result<(), VmError> {
    let stream = monitor.connect(AGENT_PORT).await?;
    let error = match agent::ask(stream, Call::Setup(setup)).await {
        Ok(Outcome::Done(_)) => return Ok(()),
        Ok(_) => AgentError::Broken("a reply that does not answer a set-up"),
        Err(error) => error,
    };
    Err(VmError::Setup(error.explained(&mut monitor.end_watch()).await))
}

fn entropy() -> Result<Vec<u8>, VmError> {
    let mut bytes = vec![0; ENTROPY_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| VmError::Entropy(error.into()))?;
    Ok(bytes)
}

fn clock_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    // Both clocks count from a past instant, so neither part is negative.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
