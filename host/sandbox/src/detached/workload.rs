//! The command that a detached machine runs, and with which it ends.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use kiln_support::word::Word;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::DetachedError;
use super::log::{LogStream, LogWriter};
use crate::agent::ChildStdin;
use crate::launch::Launch;
use crate::vm::boot::clock_ns;
use crate::{Child, ExitStatus, Vm, WindowSize};

/// The size of a terminal that nobody sits at.
const WINDOW: WindowSize = WindowSize { rows: 24, columns: 80 };
/// One read's worth of output, and so the most of an entry in the log.
const READ_BYTES: usize = 32 << 10;
/// Pieces of output that wait for a slow disk; the command waits then.
const PIECES_WAITING_MAX: usize = 16;
/// Signals that wait to be passed on.
const SIGNALS_WAITING_MAX: usize = 64;

/// The command that a machine runs, and with which it ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MainCommand {
    /// The program and its arguments.
    pub argv: Vec<Word>,
    /// The whole environment as `KEY=VALUE` words.
    pub env: Vec<Word>,
    /// As [`ExecBuilder::user`](crate::ExecBuilder::user) takes it.
    #[serde(default)]
    pub user: String,
    /// As [`ExecBuilder::cwd`](crate::ExecBuilder::cwd) takes it.
    #[serde(default)]
    pub working_directory: String,
    /// The signal that asks it to stop.
    pub stop_signal: u8,
    /// It has a terminal, at which nobody sits.
    #[serde(default)]
    pub terminal: bool,
    /// Its stdin stays open, and nothing comes; otherwise it reads `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// It is killed when it runs longer, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

impl From<Launch> for MainCommand {
    fn from(launch: Launch) -> Self {
        let Launch { argv, env, user, workdir, stop_signal } = launch;
        let words = |words: Vec<OsString>| words.into_iter().map(Word::from).collect();
        Self {
            argv: words(argv),
            env: words(env),
            user,
            working_directory: workdir,
            stop_signal,
            terminal: false,
            stdin: false,
            timeout_ms: None,
        }
    }
}

impl MainCommand {
    /// Its words as one line, for people.
    pub fn shown(&self) -> String {
        let words: Vec<OsString> = self.argv.iter().map(OsString::from).collect();
        let words: Vec<_> = words.iter().map(|word| String::from_utf8_lossy(word.as_bytes())).collect();
        words.join(" ")
    }
}

/// A main command that runs: its output goes to the log, and this process passes signals on.
#[derive(Debug)]
pub(super) struct Workload {
    /// The signal that asks it to stop.
    pub(super) stop_signal: u8,
    signals: mpsc::Sender<u32>,
    task: JoinHandle<Option<ExitStatus>>,
}

impl Workload {
    /// Starts the command.
    ///
    /// # Errors
    /// [`DetachedError::Main`] when it cannot be started.
    pub(super) async fn start(vm: &Vm, command: &MainCommand, log: LogWriter) -> Result<Self, DetachedError> {
        let mut exec = vm
            .exec(command.argv.iter().map(OsString::from))
            .env(command.env.iter().map(OsString::from))
            .cwd(&command.working_directory)
            .user(&command.user);
        if command.terminal {
            exec = exec.tty(WINDOW);
        }
        if command.stdin {
            exec = exec.stdin();
        }
        if let Some(limit) = command.timeout_ms {
            exec = exec.timeout(Duration::from_millis(limit));
        }
        let mut child = exec.spawn().await.map_err(|error| DetachedError::Main(Box::new(error)))?;

        let (pieces, waiting) = mpsc::channel(PIECES_WAITING_MAX);
        let writer = tokio::task::spawn_blocking(move || write(log, waiting));
        let mut readers = JoinSet::new();
        if let Some(stdout) = child.stdout.take() {
            readers.spawn(carry(stdout, LogStream::Stdout, pieces.clone()));
        }
        if let Some(stderr) = child.stderr.take() {
            readers.spawn(carry(stderr, LogStream::Stderr, pieces));
        }
        let (signals, wishes) = mpsc::channel(SIGNALS_WAITING_MAX);
        // Dropped at the end: a stdin that is dropped ends.
        let stdin = child.stdin.take();
        let task = tokio::spawn(async move {
            let status = attend(&mut child, stdin, wishes).await;
            // All it wrote has arrived: the readers end, and with them the writer.
            while readers.join_next().await.is_some() {}
            let _ = writer.await;
            status
        });
        Ok(Self { stop_signal: command.stop_signal, signals, task })
    }

    /// Where signals for the command are put in.
    pub(super) fn signals(&self) -> mpsc::Sender<u32> {
        self.signals.clone()
    }

    /// Waits for the command's end, with all its output in the log; `None` when the machine ended first. Safe to cancel.
    pub(super) async fn ended(&mut self) -> Option<ExitStatus> {
        (&mut self.task).await.ok().flatten()
    }
}

async fn attend(
    child: &mut Child,
    _stdin: Option<ChildStdin>,
    mut wishes: mpsc::Receiver<u32>,
) -> Option<ExitStatus> {
    loop {
        tokio::select! {
            status = child.wait() => return status.ok(),
            // A guest that takes no signals is ended otherwise.
            Some(number) = wishes.recv() => drop(child.signal(number)),
        }
    }
}

/// A piece of output, and when it came.
struct Piece {
    stream: LogStream,
    unix_ns: u64,
    bytes: Vec<u8>,
}

async fn carry(mut from: impl AsyncRead + Unpin, stream: LogStream, to: mpsc::Sender<Piece>) {
    let mut buffer = vec![0; READ_BYTES];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let unix_ns = clock_ns(rustix::time::ClockId::Realtime);
        let piece = Piece { stream, unix_ns, bytes: buffer[..count].to_vec() };
        if to.send(piece).await.is_err() {
            return;
        }
    }
}

fn write(mut log: LogWriter, mut pieces: mpsc::Receiver<Piece>) {
    while let Some(piece) = pieces.blocking_recv() {
        log.append(piece.stream, piece.unix_ns, &piece.bytes);
    }
}
