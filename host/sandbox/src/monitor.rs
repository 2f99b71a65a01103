//! The monitor: the process that is one virtual machine, seen from the host.
//!
//! ```text
//! spawn ─► idle ──start──► booting ──Booted, Ready──► running ──pause──► paused ─► ended
//!             └─restore─► entered ─Resumed, Adopted─► │  ▲ └──Parked──────► │
//!                                                     │  └──────resume──────┘
//!             └────────────── Failed, or the process dies, from anywhere ────────┘
//! ```
//! The host holds one end of a `SOCK_SEQPACKET` pair and the monitor the other, as its stdin. Whoever drops a
//! [`Monitor`] ends the machine: the process is killed, and should the host itself be killed, the monitor reads the
//! end of the channel and goes by itself.

pub(crate) mod channel;
mod end;
mod group;
mod life;
mod orders;
mod probe;
mod process;
mod program;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use kiln_control::{ChannelError, Command, Connect, Do, Event, Happened, Stop};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use channel::AsyncChannel;
pub use end::MachineEnd;
use group::Group;
pub use group::{CGROUP_VARIABLE, Cleared, GroupError, Groups, groups};
pub use kiln_control::{Entered, Restore, SaveState, Start};
use life::Life;
pub use life::{BootTimes, RestoreTimes};
pub(crate) use life::{DeathWatch, EndWatch};
pub use probe::{Missing, Obstacle, Probe, probe};
use process::Process;
pub use program::MonitorProgram;

use crate::Blame;

/// What the monitor program is started as (`argv[0]`), by which a binary that is more than a monitor knows its part.
pub const MONITOR_NAME: &str = "kiln-monitor";
/// How much of what a monitor says on its stderr is kept, for the report of its death.
const STDERR_TAIL_BYTES: usize = 8 << 10;
/// How long a restored guest may take until it has its identity: milliseconds, but for a host with too much to do.
pub(crate) const ADOPT_LIMIT: Duration = Duration::from_mins(2);
/// How long a monitor may take to go once its machine has ended or its channel is closed; then it is killed.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// Is told lines, from a task of the runtime; must not block for long.
pub type LineListener = Arc<dyn Fn(&str) + Send + Sync>;

/// A handle on a running monitor; dropping it ends the machine.
#[derive(Debug)]
pub struct Monitor {
    channel: Arc<AsyncChannel>,
    life: watch::Receiver<Life>,
    watcher: JoinHandle<()>,
    /// Held while an order that has an answer is under way, so that the next answer is its own.
    answer: tokio::sync::Mutex<()>,
    /// Held together while requests to the agent are under way, and alone while the guest parks: it forgets requests that it
    /// has not answered.
    pub(crate) requests: Arc<tokio::sync::RwLock<()>>,
    /// How often the guest is to have become another before it takes requests.
    adoptions_due: AtomicU64,
    process_id: u32,
    /// Where it has one.
    group: Option<Arc<Group>>,
    /// Counts those whose machine this was.
    owner: watch::Sender<u64>,
}

/// Why a monitor could not be started or spoken to.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The process could not be started.
    #[error("cannot start the monitor {program}")]
    Spawn {
        /// The executable.
        program: MonitorProgram,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no program to make monitors of.
    #[error("no {MONITOR_NAME} found (looked in {})", crate::bundle::places(looked_in))]
    NoProgram {
        /// Where it was looked for.
        looked_in: Vec<PathBuf>,
    },
    /// The control channel failed, or refused what was to be sent.
    #[error("cannot speak to the monitor")]
    Channel(#[from] ChannelError),
    /// A system call around the channel failed.
    #[error("cannot set up a channel to the monitor")]
    Setup(#[source] io::Error),
    /// Its control group cannot be bounded.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// The monitor could not write a part of the machine to its file.
    #[error("cannot save the machine: {0}")]
    Save(String),
    /// The machine ended, or never began.
    #[error(transparent)]
    Ended(#[from] Arc<MachineEnd>),
    /// A restored guest did not take on its identity in time, so nothing is asked of it.
    #[error("the guest did not take on its identity within {} s", ADOPT_LIMIT.as_secs())]
    NotAdopted,
}

impl MonitorError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Ended(end) => end.blame(),
            Self::Channel(_) => Blame::Kiln,
            Self::NotAdopted => Blame::Guest,
            Self::NoProgram { .. } | Self::Spawn { .. } | Self::Setup(_) | Self::Group(_) | Self::Save(_) => {
                Blame::Host
            }
        }
    }
}

impl Monitor {
    /// Starts a monitor process, which then waits for [`start`](Self::start).
    ///
    /// It is jailed (`kiln_jail`) and gets nothing of this process: stdin is its channel, stdout `/dev/null`, stderr a pipe
    /// whose last lines are kept for [`MachineEnd::Died`], and beside these it has `/dev/kvm`. It has a session of its
    /// own so that a Ctrl-C meant for its host does not reach it, and a control group where this host has a place for such
    /// ([`groups`]). Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`MonitorError::Spawn`] when the executable cannot be run, [`MonitorError::Ended`] when this user may not use
    /// `/dev/kvm` or make namespaces, [`MonitorError::Setup`] when the host is out of descriptors.
    pub fn spawn(program: &MonitorProgram) -> Result<Self, MonitorError> {
        Self::spawn_with(program, None)
    }

    /// The same, with each line the monitor says on its stderr told to `listener` as well.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub fn spawn_with(
        program: &MonitorProgram,
        listener: Option<LineListener>,
    ) -> Result<Self, MonitorError> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|errno| MonitorError::Setup(errno.into()))?;

        let (process, stderr) = Process::start(program, &[], &theirs, &process::null()?)?;
        // With the monitor's end open here, its death would not be seen.
        drop(theirs);

        let channel = Arc::new(AsyncChannel::new(ours).map_err(MonitorError::Setup)?);
        let (life_sender, life) = watch::channel(Life::default());
        let (process_id, group) = (process.id(), process.group());
        let watcher =
            tokio::spawn(watch_over(Arc::clone(&channel), process, keep_tail(stderr, listener), life_sender));
        Ok(Self {
            channel,
            life,
            watcher,
            answer: tokio::sync::Mutex::default(),
            requests: Arc::default(),
            adoptions_due: AtomicU64::new(0),
            process_id,
            group,
            owner: watch::Sender::new(0),
        })
    }

    /// The process id of the monitor.
    pub fn process_id(&self) -> u32 {
        self.process_id
    }

    /// Connects a stream to a vsock port of the guest.
    ///
    /// Returns before the guest has answered: a port on which nothing listens reads as an end of the stream. A guest that was claimed
    /// is connected to once it has become the one it is to be.
    ///
    /// # Errors
    /// [`MonitorError::Ended`] when the machine is gone, [`MonitorError::Setup`] when the host is out of descriptors,
    /// [`MonitorError::NotAdopted`] when the guest does not become the one it is to be.
    pub async fn connect(&self, port: u32) -> Result<UnixStream, MonitorError> {
        self.adopted().await?;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(MonitorError::Setup)?;
        ours.set_nonblocking(true).map_err(MonitorError::Setup)?;
        let stream = UnixStream::from_std(ours).map_err(MonitorError::Setup)?;
        self.send(Do::Connect(Connect { port }), &[theirs.as_fd()]).await?;
        Ok(stream)
    }

    /// Ends the machine at once, as pulling the plug would, and waits until its process is gone.
    ///
    /// A monitor that does not obey within 5 s is killed.
    pub async fn stop(self) -> MachineEnd {
        self.pull_the_plug().await.unwrap_or_default()
    }

    /// The same for one who shares the machine; `None` when the monitor did not obey.
    pub(crate) async fn pull_the_plug(&self) -> Option<MachineEnd> {
        let stopping = async {
            // One that cannot be told is gone already, and its end says how.
            let _ = self.send(Do::Stop(Stop {}), &[]).await;
            MachineEnd::clone(&*self.ended().await)
        };
        tokio::time::timeout(EXIT_LIMIT, stopping).await.ok()
    }

    async fn send(&self, call: Do, fds: &[BorrowedFd<'_>]) -> Result<(), MonitorError> {
        match self.channel.send(&Command { call: Some(call) }, fds).await {
            // The process is gone or going: its end says why better than the socket does.
            Err(ChannelError::Closed) => Err(self.ended().await.into()),
            other => Ok(other?),
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // The watcher owns the process, which dies with it.
        self.watcher.abort();
    }
}

/// Reads events until the machine's end, then waits for the process.
async fn watch_over(
    channel: Arc<AsyncChannel>,
    mut process: Process,
    stderr_tail: impl Future<Output = Vec<u8>> + Send + 'static,
    life: watch::Sender<Life>,
) {
    let said = tokio::spawn(stderr_tail);
    let end = read_events(&channel, &life).await;
    let status = match tokio::time::timeout(EXIT_LIMIT, process.wait()).await {
        Ok(status) => status,
        Err(_) => match process.kill() {
            Ok(()) => process.wait().await,
            Err(error) => Err(error),
        },
    };
    let end = match end {
        Some(end) => end,
        None if process.was_out_of_memory() => MachineEnd::OutOfMemory,
        None => MachineEnd::Died {
            status: status.ok(),
            stderr: String::from_utf8_lossy(&said.await.unwrap_or_default()).trim().to_owned(),
        },
    };
    life.send_modify(|life| life.end = Some(Arc::new(end)));
}

/// Publishes events as they come. `None` when the channel closed or broke before a last event.
async fn read_events(channel: &AsyncChannel, life: &watch::Sender<Life>) -> Option<MachineEnd> {
    loop {
        // Its descriptors, of which there are none in this version, are closed.
        let (event, _) = channel.receive::<Event>().await.ok()?;
        match event.happened {
            Some(Happened::Ended(ended)) => return Some(MachineEnd::from(ended)),
            Some(Happened::Failed(failed)) => return Some(MachineEnd::from(failed)),
            Some(happened) => life.send_modify(|life| life.take(happened)),
            // A newer monitor may report more than this version knows.
            None => {}
        }
    }
}

/// Follows what the monitor says on its stderr to its end, and returns the last of it.
async fn keep_tail(stderr: pipe::Receiver, listener: Option<LineListener>) -> Vec<u8> {
    let mut tail = Vec::new();
    let mut stderr = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        // A line without an end is cut, so that it cannot fill memory.
        let read = (&mut stderr).take(STDERR_TAIL_BYTES as u64).read_until(b'\n', &mut line).await;
        if !matches!(read, Ok(1..)) {
            return tail;
        }
        if let Some(listener) = &listener {
            listener(String::from_utf8_lossy(&line).trim_end());
        }
        tail.extend_from_slice(&line);
        tail.drain(..tail.len().saturating_sub(STDERR_TAIL_BYTES));
    }
}
