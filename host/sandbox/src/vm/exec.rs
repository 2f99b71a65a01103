//! Commands in a machine.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::time::Duration;

use kiln_protocol::{Argv, Call, Exec, MAX_STAGED_FILES, Outcome, Reason, StagedFile, WindowSize};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::target::{AskError, Target};
use crate::Blame;
use crate::agent::{AgentError, Child, ExitStatus, Streams};
#[cfg(doc)]
use crate::detached::Kept;
use crate::files::{self, FileError};
use crate::launch::{self, Launch};
use crate::monitor::MachineEnd;

/// What [`ExecBuilder::output`] keeps of each stream unless told otherwise.
const OUTPUT_LIMIT_BYTES: usize = 16 << 20;
/// What a request carries of staged files: a packet to a keeper has room for twice that. What is more is written before, each
/// file over a connection of its own.
const STAGED_INLINE_BYTES: usize = 64 << 10;
/// One read's worth of what nobody wants.
const DRAIN_BYTES: usize = 16 << 10;

/// A command to run in a machine. Made by [`Vm::exec`](super::Vm::exec) and [`Kept::exec`].
#[derive(Debug)]
#[must_use]
pub struct ExecBuilder<'vm> {
    machine: Target<'vm>,
    exec: Exec,
    /// Files that are written before it starts.
    staged: Vec<StagedFile>,
    output_limit_bytes: usize,
}

/// What a command that ran to its end left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to stdout, or to its terminal.
    pub stdout: Vec<u8>,
    /// What it wrote to stderr.
    pub stderr: Vec<u8>,
}

/// Why a command did not run, or its end is not known.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// It could not be started.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// A file could not be written for it; it did not run.
    #[error("cannot write a file for the command")]
    Stage(#[from] FileError),
    /// It wrote more than the limit, and was killed.
    #[error("the command wrote more than {limit_bytes} bytes to its {stream}")]
    OutputLimit {
        /// `stdout` or `stderr`.
        stream: &'static str,
        /// The limit.
        limit_bytes: usize,
    },
}

impl ExecError {
    /// Whose fault this is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Ask(error) => error.blame(),
            Self::Stage(error) => error.blame(),
            Self::OutputLimit { .. } => Blame::Caller,
        }
    }

    /// The agent's reason, when it refused.
    pub fn refusal(&self) -> Option<Reason> {
        match self {
            Self::Ask(error) => error.refusal(),
            Self::Stage(_) | Self::OutputLimit { .. } => None,
        }
    }

    /// How the machine ended, when that is what went wrong.
    pub fn machine_end(&self) -> Option<&MachineEnd> {
        match self {
            Self::Ask(error) => error.machine_end(),
            Self::Stage(error) => error.machine_end(),
            Self::OutputLimit { .. } => None,
        }
    }
}

impl From<AgentError> for ExecError {
    fn from(error: AgentError) -> Self {
        Self::Ask(error.into())
    }
}

impl<'vm> ExecBuilder<'vm> {
    pub(crate) fn new(machine: impl Into<Target<'vm>>, argv: Vec<OsString>) -> Self {
        let exec = Exec { argv: argv.into_iter().map(OsStringExt::into_vec).collect(), ..Exec::default() };
        Self { machine: machine.into(), exec, staged: Vec::new(), output_limit_bytes: OUTPUT_LIMIT_BYTES }
    }

    /// Runs it as a command of its image does, unless told otherwise from here on.
    pub(crate) fn like(mut self, launch: &Launch) -> Self {
        self = self.env(launch.env.iter());
        self.exec.cwd.clone_from(&launch.workdir);
        self.exec.user.clone_from(&launch.user);
        self
    }

    /// Adds `KEY=VALUE` words to the environment, in the place of earlier ones with their keys. It has at first what the machine's
    /// [`Image`](crate::Image) says, or is empty; HOME and PATH are added when missing.
    pub fn env(mut self, words: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        for word in words {
            launch::set(&mut self.exec.env, word.into().into_vec());
        }
        self
    }

    /// The working directory, made when missing; what the machine's [`Image`](crate::Image) says, or `/`, by default.
    pub fn cwd(mut self, folder: impl Into<String>) -> Self {
        self.exec.cwd = folder.into();
        self
    }

    /// `name`, `uid`, `name:group` or `uid:gid` as the image knows them; what the machine's [`Image`](crate::Image)
    /// says, or root, by default.
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.exec.user = user.into();
        self
    }

    /// Gives the command a terminal of this size; stdout and stderr are then one stream.
    pub fn tty(mut self, size: WindowSize) -> Self {
        self.exec.tty = Some(size);
        self
    }

    /// Gives the command a stdin to write to; otherwise it reads `/dev/null`.
    pub fn stdin(mut self) -> Self {
        self.exec.stdin = true;
        self
    }

    /// Has a file written in the guest before the command starts, as root, with these permissions: a script, its input, a secret.
    /// It takes the place of what has its name, and the directories above it are made; `path` is absolute. May be called again.
    pub fn stage_file(mut self, path: impl Into<PathBuf>, contents: impl Into<Vec<u8>>, mode: u32) -> Self {
        let path = path.into().into_os_string().into_vec();
        self.staged.push(StagedFile { path, mode, contents: contents.into() });
        self
    }

    /// Adds a command that follows once the one before has exited with 0, in the same environment, streams, and time: as `a && b`
    /// of a shell, without one, and in the same request. The output is of all together, the status that of the last that was started;
    /// a command that cannot be started ends the chain with 127 or 126, and says why on stderr. At most 64, without a
    /// terminal, and not in a machine whose first command is process 1.
    pub fn chain<I>(mut self, argv: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<OsString>,
    {
        let words = argv.into_iter().map(|word| word.into().into_vec()).collect();
        self.exec.chain.push(Argv { words });
        self
    }

    /// Makes it a command that prepares the guest and not its first.
    pub(crate) fn for_warm_up(mut self) -> Self {
        self.exec.warmup = true;
        self
    }

    /// Kills the command's process group when it runs longer than this.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.exec.timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1);
        self
    }

    /// What [`output`](Self::output) keeps of each stream at most; 16 MiB by default.
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.output_limit_bytes = bytes;
        self
    }

    /// Starts the command. It runs at most once, whatever happens to the connection.
    ///
    /// # Errors
    /// [`ExecError::Ask`] with the reason when it could not be started; [`ExecError::Stage`] when a file could not be written
    /// for it.
    pub async fn spawn(mut self) -> Result<Child, ExecError> {
        self.stage().await?;
        let streams = Streams::of(&self.exec);
        let (outcome, stream) = self.machine.ask(Call::Exec(self.exec)).await?;
        Ok(Child::carried(stream, streams, &outcome)?.in_machine(self.machine.end_watch()))
    }

    /// Puts staged files into the request, and those for which it has no room into the guest.
    async fn stage(&mut self) -> Result<(), ExecError> {
        let mut room = STAGED_INLINE_BYTES;
        for file in std::mem::take(&mut self.staged) {
            match room.checked_sub(file.contents.len() + file.path.len()) {
                Some(left) if self.exec.files.len() < MAX_STAGED_FILES => {
                    room = left;
                    self.exec.files.push(file);
                }
                _ => {
                    let path = PathBuf::from(OsString::from_vec(file.path));
                    files::write(self.machine, &path, file.mode, file.contents.as_slice()).await?;
                }
            }
        }
        Ok(())
    }

    /// Starts the command and leaves it to itself: nobody reads what it writes. It runs on when this process ends, if the
    /// machine does. Returns its process id.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub async fn spawn_in_background(mut self) -> Result<u32, ExecError> {
        self.stage().await?;
        let (streams, timeout_ms) = (Streams::of(&self.exec), self.exec.timeout_ms);
        let words = self.exec.argv.iter().map(|word| String::from_utf8_lossy(word).into_owned());
        let command = words.collect::<Vec<_>>().join(" ");
        let (outcome, stream) = self.machine.ask(Call::Exec(self.exec)).await?;
        if let (Target::Kept(machine), Outcome::Started(started)) = (self.machine, &outcome) {
            machine.hold(stream, started.pid, timeout_ms, command).await.map_err(AskError::from)?;
            return Ok(started.pid);
        }
        let child = Child::carried(stream, streams, &outcome)?;
        let pid = child.pid();
        tokio::spawn(drained(child));
        Ok(pid)
    }

    /// Runs the command to its end and returns what it wrote.
    ///
    /// # Errors
    /// [`ExecError::OutputLimit`] when it wrote too much; otherwise as [`spawn`](Self::spawn).
    pub async fn output(self) -> Result<Output, ExecError> {
        let limit = self.output_limit_bytes;
        let mut child = self.spawn().await?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        drop(child.stdin.take());
        let (stdout, stderr) =
            tokio::try_join!(read_to_limit(stdout, "stdout", limit), read_to_limit(stderr, "stderr", limit))?;
        let status = child.wait().await?;
        Ok(Output { status, stdout, stderr })
    }
}

/// Waits for a command's end, and lets go of what it writes.
pub(crate) async fn drained(mut child: Child) -> Option<ExitStatus> {
    async fn drain(from: Option<impl AsyncRead + Unpin>) {
        let mut buffer = vec![0; DRAIN_BYTES];
        let Some(mut from) = from else { return };
        while let Ok(1..) = from.read(&mut buffer).await {}
    }
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (status, (), ()) = tokio::join!(child.wait(), drain(stdout), drain(stderr));
    status.ok()
}

async fn read_to_limit(
    stream: Option<impl AsyncRead + Unpin>,
    name: &'static str,
    limit_bytes: usize,
) -> Result<Vec<u8>, ExecError> {
    let mut bytes = Vec::new();
    let Some(stream) = stream else { return Ok(bytes) };
    let read = stream.take(limit_bytes as u64 + 1).read_to_end(&mut bytes).await;
    match read {
        Ok(_) if bytes.len() > limit_bytes => Err(ExecError::OutputLimit { stream: name, limit_bytes }),
        // A stream that was cut off is reported by the wait that follows, with the reason.
        Ok(_) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(bytes),
        Err(error) => Err(AgentError::Lost(error).into()),
    }
}
