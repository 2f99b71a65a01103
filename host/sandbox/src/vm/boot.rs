//! A machine that boots, and what every guest is asked first.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use kiln_control::Start;
use kiln_protocol::mailbox::ENTROPY_BYTES;
use kiln_protocol::{AGENT_PORT, Call, Outcome, Setup};
use rustix::time::{ClockId, clock_gettime};
use tokio::task::JoinHandle;

use super::{GUEST_CID, Phase, VmBuilder, VmError};
use crate::agent::{self, AgentError};
use crate::disk::{self, Descriptors, Disk};
use crate::monitor::{BootTimes, LineListener, Monitor, MonitorError, MonitorProgram};

/// How long a guest kernel may take until its agent listens. It catches one that hangs: a kernel that is emulated on a
/// host with too much to do can take minutes.
pub(super) const BOOT_LIMIT: Duration = Duration::from_mins(10);
/// How long the agent may take to make the guest ready for commands; as generous for the same reason.
pub(super) const SETUP_LIMIT: Duration = Duration::from_mins(5);

/// Makes a machine with these disks and boots it until its agent listens. Each phase is told as it comes.
pub(crate) async fn boot(
    builder: &VmBuilder,
    disks: &[&Disk],
    tell: impl Fn(Phase, u64),
) -> Result<(Monitor, BootTimes), VmError> {
    let monitor = builder.spawn_monitor().await?;
    let (kernel, initramfs) = (builder.guest.kernel()?, builder.guest.initramfs()?);
    let mut descriptors = Descriptors::default();
    let mut start = Start {
        memory_mib: builder.memory_mib,
        vcpus: builder.vcpus,
        kernel_fd: descriptors.add(&kernel),
        initramfs_fd: descriptors.add(&initramfs),
        cmdline: builder.cmdline.clone(),
        cid: GUEST_CID,
        ..Start::default()
    };
    start.console_fd = builder.console.as_ref().map(|console| descriptors.add(console));
    start.disks = disk::describe(disks, &mut descriptors);
    check_fit(&descriptors)?;
    monitor.start(start, descriptors.as_slice()).await?;

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
    match tokio::time::timeout(BOOT_LIMIT, coming_up).await {
        Ok(times) => {
            let times = times?;
            Ok((monitor, times))
        }
        Err(_) => Err(VmError::BootOverdue(monitor.stop().await)),
    }
}

/// Whether a monitor can be given all the files of an order.
pub(crate) fn check_fit(descriptors: &Descriptors<'_>) -> Result<(), VmError> {
    if descriptors.fit() {
        return Ok(());
    }
    Err(VmError::Shape("the image has more layers than a machine can be given files".into()))
}

/// Makes the guest ready for commands: `setup`, with what differs from one guest to the next added.
pub(crate) async fn set_up(monitor: Monitor, setup: Setup, hostname: &str) -> Result<Monitor, VmError> {
    let setup = Setup {
        hostname: hostname.to_owned(),
        realtime_ns: clock_ns(ClockId::Realtime),
        entropy: random::<ENTROPY_BYTES>()?.to_vec(),
        ..setup
    };
    match tokio::time::timeout(SETUP_LIMIT, ask_to_set_up(&monitor, setup)).await {
        Ok(done) => done.map(|()| monitor),
        Err(_) => Err(VmError::SetupOverdue(monitor.stop().await)),
    }
}

async fn ask_to_set_up(monitor: &Monitor, setup: Setup) -> Result<(), VmError> {
    let stream = monitor.connect(AGENT_PORT).await?;
    let error = match agent::ask(stream, Call::Setup(setup)).await {
        Ok(Outcome::Done(_)) => return Ok(()),
        Ok(_) => AgentError::Broken("a reply that does not answer a set-up"),
        Err(error) => error,
    };
    Err(VmError::Setup(error.explained(&mut monitor.end_watch()).await))
}

/// Makes a scratch disk in a file without a name.
pub(super) async fn make_scratch(folder: PathBuf, size_bytes: u64) -> Result<Disk, VmError> {
    Ok(blocking(move || disk::scratch_disk(&folder, size_bytes)).await?)
}

/// Starts a monitor process on a thread that may block: until the program runs, most of a millisecond, the thread that starts it stands still.
pub(crate) async fn spawn(
    program: &MonitorProgram,
    warnings: Option<&LineListener>,
) -> Result<Monitor, VmError> {
    let (program, warnings) = (program.clone(), warnings.cloned());
    Ok(blocking(move || Monitor::spawn_with(&program, warnings)).await?)
}

/// Does what blocks where it holds nobody up.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    joined(tokio::task::spawn_blocking(work)).await
}

/// Waits for a task that nobody cancels.
pub(crate) async fn joined<T>(task: JoinHandle<T>) -> T {
    match task.await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime shuts down, and with it whoever waits.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Random bytes of the host's.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], VmError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| VmError::Entropy(error.into()))?;
    Ok(bytes)
}

/// Twelve random hexadecimal digits, as Docker names its containers.
///
/// # Errors
/// When the host has no random numbers to give.
pub fn random_name() -> io::Result<String> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes[2..])?;
    Ok(format!("{:012x}", u64::from_be_bytes(bytes)))
}

/// Seconds since 1970-01-01 UTC.
pub(crate) fn unix_s() -> u64 {
    clock_ns(ClockId::Realtime) / 1_000_000_000
}

/// The time of a clock of the host's, in nanoseconds.
pub(crate) fn clock_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    // Both clocks count from a past instant, so neither part is negative.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
