//! A command running in the guest, shaped like a child process.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use kiln_protocol::frame::Kind;
use kiln_protocol::{Call, Exec, Exited, MAX_DATA_BYTES, Outcome, Request, Started, WindowSize};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::flow::{Flow, Output};
use super::{AgentError, read_frame, read_reply, send_request};
use crate::monitor::EndWatch;

/// How long past its timeout a command's end is waited for before the guest is held to be stuck.
const TIMEOUT_GRACE: Duration = Duration::from_secs(5);

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus {
    code: u32,
    signal: u32,
    timed_out: bool,
    peak_rss_kib: u64,
}

impl ExitStatus {
    /// It exited by itself with code 0.
    pub fn success(&self) -> bool {
        self.code() == Some(0)
    }

    /// The exit code when it exited by itself.
    pub fn code(&self) -> Option<u8> {
        // A wait status has 8 bits for the code; a guest that says more is cut to what a process could have said.
        (self.signal == 0 && !self.timed_out).then_some(self.code as u8)
    }

    /// The signal that ended it.
    pub fn signal(&self) -> Option<u8> {
        (self.signal != 0).then_some((self.signal & 0x7f) as u8)
    }

    /// It was killed because its time was up.
    pub fn timed_out(&self) -> bool {
        self.timed_out
    }

    /// The most memory it had resident, in bytes.
    pub fn peak_rss_bytes(&self) -> u64 {
        self.peak_rss_kib.saturating_mul(1024)
    }

    /// The code a shell would report: the exit code, 128 + n for signal n, 124 for a timeout.
    pub fn shell_code(&self) -> u8 {
        if self.timed_out {
            return 124;
        }
        self.signal().map_or(self.code as u8, |signal| 128 + signal)
    }

    fn from_wire(exited: Exited) -> Self {
        let Exited { code, signal, timed_out, peak_rss_kib } = exited;
        Self { code, signal, timed_out, peak_rss_kib }
    }

    /// The status of a command whose guest did not say in time that its time was up.
    fn overdue() -> Self {
        Self { code: 0, signal: 9, timed_out: true, peak_rss_kib: 0 }
    }
}

type Verdict = Option<Result<ExitStatus, Arc<AgentError>>>;

/// A command running in the guest; dropping it kills the command.
#[derive(Debug)]
pub struct Child {
    /// Where to write its stdin, when it was started with one. Shut down or drop it to end the stream.
    pub stdin: Option<ChildStdin>,
    /// What it writes to stdout, or to its terminal. Dropping it closes the pipe: the next write fails with SIGPIPE.
    pub stdout: Option<ChildStdout>,
    /// What it writes to stderr; at its end from the start when it has a terminal.
    pub stderr: Option<ChildStderr>,
    pid: u32,
    flow: Arc<Flow>,
    verdict: watch::Receiver<Verdict>,
    session: JoinHandle<()>,
    machine: Option<EndWatch>,
}

/// What the caller's side of a command's streams has to know of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streams {
    stdin: bool,
    deadline: Option<Duration>,
}

impl Streams {
    pub(crate) fn of(exec: &Exec) -> Self {
        let deadline = (exec.timeout_ms != 0)
            .then(|| Duration::from_millis(exec.timeout_ms).saturating_add(TIMEOUT_GRACE));
        Self { stdin: exec.stdin, deadline }
    }
}

impl Child {
    /// Starts a command over a fresh stream to the agent.
    ///
    /// # Errors
    /// [`AgentError::Refused`] when it could not be started; [`AgentError::Lost`] when the stream dropped, in which
    /// case it may have run.
    pub async fn start(mut stream: UnixStream, exec: Exec) -> Result<Self, AgentError> {
        let streams = Streams::of(&exec);
        send_request(&mut stream, &Request { call: Some(Call::Exec(exec)) }).await?;
        let outcome = read_reply(&mut stream).await?;
        Self::carried(stream, streams, &outcome)
    }

    /// The command that was started over a stream, of which nothing has been read since this answer.
    pub(crate) fn carried(
        stream: UnixStream,
        streams: Streams,
        outcome: &Outcome,
    ) -> Result<Self, AgentError> {
        let Outcome::Started(Started { pid }) = *outcome else {
            return Err(AgentError::Broken("a reply that does not answer an exec"));
        };
        let flow = Flow::new();
        let (verdict_sender, verdict) = watch::channel(None);
        let session = tokio::spawn(carry(stream, Arc::clone(&flow), streams.deadline, verdict_sender));
        Ok(Self {
            stdin: streams.stdin.then(|| ChildStdin { flow: Arc::clone(&flow) }),
            stdout: Some(ChildStdout { flow: Arc::clone(&flow) }),
            stderr: Some(ChildStderr { flow: Arc::clone(&flow) }),
            pid,
            flow,
            verdict,
            session,
            machine: None,
        })
    }

    /// Has [`wait`](Self::wait) tell the end of the machine when that is what ended the stream.
    pub(crate) fn in_machine(mut self, end: Option<EndWatch>) -> Self {
        self.machine = end;
        self
    }

    /// Its process id as the guest's processes see it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a signal to its process group; a command that has ended gets nothing.
    ///
    /// # Errors
    /// `WouldBlock` when 64 signals wait already for a guest that does not take them.
    pub fn signal(&self, number: u32) -> io::Result<()> {
        if self.flow.signal(number) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }

    /// Tells its terminal a new size.
    pub fn resize(&self, size: WindowSize) {
        self.flow.resize(size);
    }

    /// Waits for its end. All its output has arrived then, though perhaps not been read.
    ///
    /// Output that nobody reads holds up the command, and so this. Safe to cancel and to call again.
    ///
    /// # Errors
    /// [`AgentError::MachineEnded`], [`AgentError::Lost`], [`AgentError::Broken`] or [`AgentError::Malformed`] when the end cannot be known.
    pub async fn wait(&mut self) -> Result<ExitStatus, AgentError> {
        let error = match self.verdict.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(Ok(status))) => return Ok(*status),
            Ok(Some(Err(error))) => error.duplicate(),
            _ => AgentError::Lost(io::ErrorKind::ConnectionAborted.into()),
        };
        match &mut self.machine {
            Some(end) => Err(error.explained(end).await),
            None => Err(error),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // The session owns the stream, and the agent kills a command whose stream drops.
        self.session.abort();
        self.flow.end(false);
    }
}

/// Carries frames both ways until the command's end.
async fn carry(
    stream: UnixStream,
    flow: Arc<Flow>,
    deadline: Option<Duration>,
    verdict: watch::Sender<Verdict>,
) {
    let (reading, writing) = stream.into_split();
    let outcome = tokio::select! {
        outcome = read_frames(reading, &flow) => outcome,
        error = write_frames(writing, &flow) => Err(error),
        status = overdue(deadline, &flow) => Ok(status),
    };
    flow.end(outcome.is_ok());
    // The receiver is gone when the handle was dropped: then nobody asks.
    let _ = verdict.send(Some(outcome.map_err(Arc::new)));
}

async fn read_frames(stream: OwnedReadHalf, flow: &Flow) -> Result<ExitStatus, AgentError> {
    let mut stream = BufReader::with_capacity(2 * MAX_DATA_BYTES, stream);
    let mut payload = Vec::new();
    loop {
        match read_frame(&mut stream, &mut payload).await? {
            Kind::Stdout => flow.receive(Output::Stdout, &payload)?,
            Kind::Stderr => flow.receive(Output::Stderr, &payload)?,
            Kind::StdinCredit => {
                let bytes =
                    payload.as_slice().try_into().map_err(|_| AgentError::Broken("a credit of odd size"))?;
                flow.grant_stdin(u64::from_le_bytes(bytes));
            }
            Kind::Exited => {
                let exited = Exited::decode(payload.as_slice())
                    .map_err(|_| AgentError::Broken("an exit status that does not decode"))?;
                return Ok(ExitStatus::from_wire(exited));
            }
            _ => return Err(AgentError::Broken("a frame out of place")),
        }
    }
}

/// Sends what there is to send; returns only when the stream fails, and not before the reader has had its say.
async fn write_frames(mut stream: OwnedWriteHalf, flow: &Flow) -> AgentError {
    let mut packet = Vec::with_capacity(MAX_DATA_BYTES + 512);
    loop {
        flow.next_packet(&mut packet).await;
        if stream.write_all(&packet).await.is_err() {
            // The reading half meets the same end, after what the agent had still to say.
            return std::future::pending().await;
        }
        packet.clear();
    }
}

/// Returns when a command with a timeout has outlived it although no reader holds up its output.
#[expect(clippy::disallowed_methods, reason = "the time a command may take is what is waited for")]
async fn overdue(deadline: Option<Duration>, flow: &Flow) -> ExitStatus {
    let Some(deadline) = deadline else { return std::future::pending().await };
    tokio::time::sleep(deadline).await;
    flow.drained().await;
    tokio::time::sleep(TIMEOUT_GRACE).await;
    ExitStatus::overdue()
}

/// The command's stdin. Ends when shut down or dropped, after what was written has been sent.
#[derive(Debug)]
pub struct ChildStdin {
    flow: Arc<Flow>,
}

impl AsyncWrite for ChildStdin {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.flow.poll_write(context, data)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is kept back: what was taken goes out as soon as the guest has room.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.flow.finish_stdin();
        Poll::Ready(Ok(()))
    }
}

impl Drop for ChildStdin {
    fn drop(&mut self) {
        self.flow.finish_stdin();
    }
}

macro_rules! output_stream {
    ($name:ident, $output:expr, $doc:literal) => {
        #[doc = $doc]
        #[derive(Debug)]
        pub struct $name {
            flow: Arc<Flow>,
        }

        impl AsyncRead for $name {
            fn poll_read(
                self: Pin<&mut Self>,
                context: &mut Context<'_>,
                into: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                self.flow.poll_read($output, context, into)
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                self.flow.stop_reading($output);
            }
        }
    };
}

output_stream!(
    ChildStdout,
    Output::Stdout,
    "What the command writes to stdout; at most 256 KiB wait for a slow reader."
);
output_stream!(
    ChildStderr,
    Output::Stderr,
    "What the command writes to stderr; at most 256 KiB wait for a slow reader."
);

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::frame::{self, HEADER_BYTES};
    use kiln_protocol::{INITIAL_CREDIT_BYTES, Reply, Started};
    use tokio::io::AsyncReadExt;

    /// The guest's end of a stream, in the hands of a guest that may lie.
    struct Guest {
        stream: UnixStream,
    }

    impl Guest {
        async fn send(&mut self, kind: Kind, payload: &[u8]) {
            let mut packet = Vec::new();
            frame::append(&mut packet, kind, payload);
            // A host that has had enough closes the stream.
            let _ = self.stream.write_all(&packet).await;
        }

        async fn exits(&mut self, code: u32) {
            let exited = Exited { code, peak_rss_kib: 7, ..Exited::default() };
            self.send(Kind::Exited, &exited.encode_to_vec()).await;
        }

        async fn frame(&mut self) -> Option<(Kind, Vec<u8>)> {
            let mut payload = Vec::new();
            Some((read_frame(&mut self.stream, &mut payload).await.ok()?, payload))
        }
    }

    /// A command and the guest it runs in.
    async fn started(exec: Exec) -> (Child, Guest) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let mut guest = Guest { stream: theirs };
        let starting = tokio::spawn(Child::start(ours, exec));
        assert_eq!(guest.frame().await.expect("a request").0, Kind::Request);
        let reply = Reply { outcome: Some(Outcome::Started(Started { pid: 42 })) };
        guest.send(Kind::Reply, &reply.encode_to_vec()).await;
        (starting.await.expect("no panic").expect("started"), guest)
    }

    #[tokio::test]
    async fn a_command_is_told_apart_from_its_end() {
        let (mut child, mut guest) = started(Exec::default()).await;
        assert_eq!(child.pid(), 42);
        guest.send(Kind::Stdout, b"out").await;
        guest.send(Kind::Stderr, b"err").await;
        guest.exits(3).await;
        let status = child.wait().await.expect("a status");
        assert_eq!((status.code(), status.signal(), status.peak_rss_bytes()), (Some(3), None, 7168));
        let mut text = String::new();
        child.stdout.take().expect("stdout").read_to_string(&mut text).await.expect("whole");
        child.stderr.take().expect("stderr").read_to_string(&mut text).await.expect("whole");
        assert_eq!(text, "outerr");
    }

    /// A guest that drops the connection right after the request may have run the command: it is asked once only.
    #[tokio::test]
    async fn a_command_whose_connection_drops_is_not_sent_again() {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        let starting =
            tokio::spawn(Child::start(ours, Exec { argv: vec![b"once".into()], ..Exec::default() }));
        let mut header = [0; HEADER_BYTES];
        theirs.read_exact(&mut header).await.expect("a request");
        let (kind, length) = frame::parse_header(header).expect("a frame");
        theirs.read_exact(&mut vec![0; length]).await.expect("its payload");
        assert_eq!(kind, Kind::Request);
        theirs.shutdown().await.expect("shut down");
        assert!(matches!(starting.await.expect("no panic"), Err(AgentError::Lost(_))));
        let mut more = Vec::new();
        theirs.read_to_end(&mut more).await.expect("an end");
        assert!(more.is_empty(), "something followed the request");
    }

    #[tokio::test]
    async fn a_guest_that_sends_beyond_its_credit_is_cut_off() {
        let (mut child, mut guest) = started(Exec::default()).await;
        for _ in 0..=INITIAL_CREDIT_BYTES as usize / MAX_DATA_BYTES {
            guest.send(Kind::Stdout, &vec![0; MAX_DATA_BYTES]).await;
        }
        assert!(matches!(child.wait().await, Err(AgentError::Broken(_))));
        assert!(guest.frame().await.is_none(), "the stream is closed");
    }

    #[tokio::test]
    async fn a_frame_only_hosts_send_ends_the_stream() {
        let (mut child, mut guest) = started(Exec::default()).await;
        guest.send(Kind::Signal, &9_u32.to_le_bytes()).await;
        assert!(matches!(child.wait().await, Err(AgentError::Broken(_))));
    }

    #[tokio::test]
    async fn an_output_that_ends_early_does_not_look_whole() {
        let (mut child, mut guest) = started(Exec::default()).await;
        guest.send(Kind::Stdout, b"half").await;
        drop(guest);
        let mut text = Vec::new();
        let read = child.stdout.take().expect("stdout").read_to_end(&mut text).await;
        assert_eq!(text, b"half");
        assert_eq!(read.expect_err("cut off").kind(), io::ErrorKind::ConnectionAborted);
        assert!(matches!(child.wait().await, Err(AgentError::Lost(_))));
    }

    #[tokio::test]
    async fn a_dropped_child_drops_its_stream() {
        let (child, mut guest) = started(Exec::default()).await;
        drop(child);
        while guest.frame().await.is_some() {}
    }

    #[tokio::test]
    async fn much_output_passes_with_bounded_memory() {
        const TOTAL: usize = 16 << 20;
        let (mut child, mut guest) = started(Exec::default()).await;
        let sending = tokio::spawn(async move {
            let (mut sent, mut credit) = (0, INITIAL_CREDIT_BYTES as usize);
            while sent < TOTAL {
                if credit < MAX_DATA_BYTES {
                    let (kind, payload) = guest.frame().await.expect("credit comes as the reader reads");
                    assert_eq!(kind, Kind::StdoutCredit);
                    credit += u64::from_le_bytes(payload.try_into().expect("eight bytes")) as usize;
                    continue;
                }
                guest.send(Kind::Stdout, &vec![1; MAX_DATA_BYTES]).await;
                sent += MAX_DATA_BYTES;
                credit -= MAX_DATA_BYTES;
            }
            guest.exits(0).await;
            guest
        });
        let mut stdout = child.stdout.take().expect("stdout");
        let (mut total, mut chunk) = (0, vec![0; 10_000]);
        loop {
            match stdout.read(&mut chunk).await.expect("whole") {
                0 => break,
                count => total += count,
            }
            assert!(child.flow.buffered(Output::Stdout) <= INITIAL_CREDIT_BYTES as usize);
        }
        assert_eq!(total, TOTAL);
        assert!(child.wait().await.expect("a status").success());
        sending.await.expect("no panic");
    }

    #[tokio::test]
    async fn stdin_reaches_the_guest_whole_and_ends() {
        let (mut child, mut guest) = started(Exec { stdin: true, ..Exec::default() }).await;
        let mut stdin = child.stdin.take().expect("stdin");
        let writing = tokio::spawn(async move { stdin.write_all(&vec![5; 1 << 20]).await });
        let mut got = 0;
        loop {
            match guest.frame().await.expect("stdin") {
                (Kind::Stdin, payload) => {
                    got += payload.len();
                    guest.send(Kind::StdinCredit, &(payload.len() as u64).to_le_bytes()).await;
                }
                (Kind::StdinEnd, _) => break,
                (kind, _) => panic!("{kind:?}"),
            }
        }
        assert_eq!(got, 1 << 20);
        writing.await.expect("no panic").expect("written");
    }

    /// Time is the runtime's own here and passes by itself when nothing else happens.
    #[tokio::test(start_paused = true)]
    async fn a_guest_that_forgets_a_timeout_is_not_waited_for() {
        let (mut child, _guest) = started(Exec { timeout_ms: 1000, ..Exec::default() }).await;
        let status = child.wait().await.expect("a status");
        assert!(status.timed_out());
        assert_eq!(status.shell_code(), 124);
        assert_eq!(status.code(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_does_not_make_a_command_overdue() {
        let (mut child, mut guest) = started(Exec { timeout_ms: 1000, ..Exec::default() }).await;
        guest.send(Kind::Stdout, b"unread").await;
        let waited = tokio::time::timeout(Duration::from_hours(1), child.wait()).await;
        assert!(waited.is_err(), "the output has not been read: {waited:?}");
        drop(child.stdout.take());
        assert!(child.wait().await.expect("a status").timed_out());
    }

    #[test]
    fn codes_are_the_shells() {
        let code = |exited| ExitStatus::from_wire(exited).shell_code();
        assert_eq!(code(Exited { code: 7, ..Exited::default() }), 7);
        assert_eq!(code(Exited { signal: 9, ..Exited::default() }), 137);
        assert_eq!(code(Exited { signal: 9, timed_out: true, ..Exited::default() }), 124);
        assert_eq!(code(Exited { code: 0x1_0001, signal: 0, ..Exited::default() }), 1);
    }
}
