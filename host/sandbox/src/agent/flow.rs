//! The state two tasks and three streams of one command share: buffers with limits, credit, and who waits for what.
//!
//! ```text
//! agent ──Stdout, Stderr──► reader task ──► Inbound ──► ChildStdout, ChildStderr
//! agent ◄──Stdin, credit, signals── writer task ◄── Outbound ◄── ChildStdin
//! ```
//! The reader task never waits for a consumer: an inbound buffer has room for all the credit there is, so the guest
//! is held up by credit and host memory by nothing more than [`INITIAL_CREDIT_BYTES`] a stream.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use kiln_protocol::frame::{self, Kind};
use kiln_protocol::{INITIAL_CREDIT_BYTES, MAX_DATA_BYTES, WindowSize};
use tokio::io::ReadBuf;
use tokio::sync::Notify;

use super::AgentError;

/// Bytes of stdin taken from the writer and not yet sent.
const STDIN_BUFFER_BYTES: usize = 64 << 10;
/// Consumed bytes are granted again in steps of this size: a grant costs the guest an interrupt.
const GRANT_STEP_BYTES: u64 = INITIAL_CREDIT_BYTES / 2;
/// Signals waiting to be sent; a caller that sends more is ahead of a guest that does not listen.
const SIGNALS_WAITING_MAX: usize = 64;

/// What the tasks and streams of one command share.
#[derive(Debug, Default)]
pub(super) struct Flow {
    state: Mutex<State>,
    work: Notify,
    drained: Notify,
}

#[derive(Debug, Default)]
struct State {
    stdin: Outbound,
    stdout: Inbound,
    stderr: Inbound,
    signals: VecDeque<u32>,
    resize: Option<WindowSize>,
}

/// Which of a command's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Output {
    Stdout,
    Stderr,
}

/// A stream from the guest.
#[derive(Debug)]
struct Inbound {
    buffer: VecDeque<u8>,
    /// What the guest may still send.
    credit: u64,
    /// What was consumed and not granted again.
    consumed: u64,
    reading: Reading,
    /// How the stream ended; what is buffered is read first.
    end: Option<StreamEnd>,
    waker: Option<Waker>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    Wanted,
    /// The reader is gone and the guest has yet to be told.
    Dropped,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StreamEnd {
    Complete,
    /// The connection was lost: what was read is not all there was.
    CutOff,
}

impl Default for Inbound {
    fn default() -> Self {
        Self {
            buffer: VecDeque::new(),
            credit: INITIAL_CREDIT_BYTES,
            consumed: 0,
            reading: Reading::Wanted,
            end: None,
            waker: None,
        }
    }
}

/// The stream to the guest.
#[derive(Debug)]
struct Outbound {
    buffer: VecDeque<u8>,
    credit: u64,
    /// No more will be written.
    finished: bool,
    /// `StdinEnd` was sent, or the command is gone.
    closed: bool,
    waker: Option<Waker>,
}

impl Default for Outbound {
    fn default() -> Self {
        Self {
            buffer: VecDeque::new(),
            credit: INITIAL_CREDIT_BYTES,
            finished: false,
            closed: false,
            waker: None,
        }
    }
}

impl Flow {
    pub(super) fn new() -> Arc<Self> {
        Arc::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics with the lock held; if it did, the state would still be whole after each statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes data the guest sent.
    pub(super) fn receive(&self, output: Output, data: &[u8]) -> Result<(), AgentError> {
        let mut state = self.lock();
        let stream = state.inbound(output);
        stream.credit = stream
            .credit
            .checked_sub(data.len() as u64)
            .ok_or(AgentError::Broken("output beyond the credit granted"))?;
        if stream.reading == Reading::Wanted {
            stream.buffer.extend(data);
            wake(&mut stream.waker);
        }
        Ok(())
    }

    /// Takes more stdin credit. A guest that grants too much gains nothing: the buffer is bounded on this side.
    pub(super) fn grant_stdin(&self, bytes: u64) {
        let mut state = self.lock();
        state.stdin.credit = state.stdin.credit.saturating_add(bytes);
        self.work.notify_one();
    }

    /// Ends all streams: no more will come, and nothing more will be sent.
    pub(super) fn end(&self, complete: bool) {
        let mut state = self.lock();
        let end = if complete { StreamEnd::Complete } else { StreamEnd::CutOff };
        for output in [Output::Stdout, Output::Stderr] {
            let stream = state.inbound(output);
            stream.end.get_or_insert(end);
            wake(&mut stream.waker);
        }
        state.stdin.closed = true;
        state.stdin.buffer.clear();
        wake(&mut state.stdin.waker);
        self.drained.notify_one();
    }

    /// Waits until no output is held up by its reader.
    pub(super) async fn drained(&self) {
        loop {
            {
                let state = self.lock();
                if state.stdout.buffer.is_empty() && state.stderr.buffer.is_empty() {
                    return;
                }
            }
            self.drained.notified().await;
        }
    }

    /// How much of an output waits for its reader.
    #[cfg(test)]
    pub(super) fn buffered(&self, output: Output) -> usize {
        self.lock().inbound(output).buffer.len()
    }

    /// Queues a signal; `false` when too many wait already.
    pub(super) fn signal(&self, number: u32) -> bool {
        let mut state = self.lock();
        if state.signals.len() >= SIGNALS_WAITING_MAX {
            return false;
        }
        state.signals.push_back(number);
        self.work.notify_one();
        true
    }

    /// Sets the terminal's size; of several not yet sent, the last counts.
    pub(super) fn resize(&self, size: WindowSize) {
        self.lock().resize = Some(size);
        self.work.notify_one();
    }

    pub(super) fn poll_read(
        &self,
        output: Output,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.lock();
        let stream = state.inbound(output);
        if stream.buffer.is_empty() {
            return match stream.end {
                Some(StreamEnd::Complete) => Poll::Ready(Ok(())),
                Some(StreamEnd::CutOff) => Poll::Ready(Err(io::Error::new(
                    io::ErrorKind::ConnectionAborted,
                    "the connection to the guest was lost",
                ))),
                None => {
                    stream.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            };
        }
        let (front, back) = stream.buffer.as_slices();
        let from_front = front.len().min(into.remaining());
        into.put_slice(&front[..from_front]);
        let from_back = back.len().min(into.remaining());
        into.put_slice(&back[..from_back]);
        stream.buffer.drain(..from_front + from_back);
        stream.consumed += (from_front + from_back) as u64;
        if stream.consumed >= GRANT_STEP_BYTES {
            self.work.notify_one();
        }
        if stream.buffer.is_empty() {
            self.drained.notify_one();
        }
        Poll::Ready(Ok(()))
    }

    /// Gives up on an output: what is buffered is dropped, and the guest is told.
    pub(super) fn stop_reading(&self, output: Output) {
        let mut state = self.lock();
        let stream = state.inbound(output);
        stream.reading = Reading::Dropped;
        stream.buffer = VecDeque::new();
        self.work.notify_one();
        self.drained.notify_one();
    }

    pub(super) fn poll_write(&self, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.lock();
        let stdin = &mut state.stdin;
        if stdin.closed || stdin.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let count = data.len().min(STDIN_BUFFER_BYTES - stdin.buffer.len());
        if count == 0 && !data.is_empty() {
            stdin.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        stdin.buffer.extend(&data[..count]);
        self.work.notify_one();
        Poll::Ready(Ok(count))
    }

    /// Says that no more stdin will come.
    pub(super) fn finish_stdin(&self) {
        self.lock().stdin.finished = true;
        self.work.notify_one();
    }

    /// Waits until there is something to send and puts it into `packet`: control first, then at most one data frame.
    pub(super) async fn next_packet(&self, packet: &mut Vec<u8>) {
        loop {
            self.lock().fill(packet);
            if !packet.is_empty() {
                return;
            }
            self.work.notified().await;
        }
    }
}

impl State {
    fn inbound(&mut self, output: Output) -> &mut Inbound {
        match output {
            Output::Stdout => &mut self.stdout,
            Output::Stderr => &mut self.stderr,
        }
    }

    fn fill(&mut self, packet: &mut Vec<u8>) {
        for number in self.signals.drain(..) {
            frame::append(packet, Kind::Signal, &number.to_le_bytes());
        }
        if let Some(size) = self.resize.take() {
            frame::append_message(packet, Kind::Resize, &size);
        }
        for (output, credit, close) in [
            (Output::Stdout, Kind::StdoutCredit, Kind::StdoutClose),
            (Output::Stderr, Kind::StderrCredit, Kind::StderrClose),
        ] {
            let stream = self.inbound(output);
            if stream.reading == Reading::Dropped {
                stream.reading = Reading::Closed;
                frame::append(packet, close, &[]);
            } else if stream.reading == Reading::Wanted && stream.consumed >= GRANT_STEP_BYTES {
                frame::append(packet, credit, &stream.consumed.to_le_bytes());
                stream.credit += stream.consumed;
                stream.consumed = 0;
            }
        }
        self.fill_stdin(packet);
    }

    fn fill_stdin(&mut self, packet: &mut Vec<u8>) {
        let stdin = &mut self.stdin;
        if stdin.closed {
            return;
        }
        let limit = usize::try_from(stdin.credit).unwrap_or(usize::MAX).min(MAX_DATA_BYTES);
        let count = stdin.buffer.len().min(limit);
        if count > 0 {
            packet.extend_from_slice(&frame::header(Kind::Stdin, count));
            packet.extend(stdin.buffer.drain(..count));
            stdin.credit -= count as u64;
            wake(&mut stdin.waker);
        }
        if stdin.finished && stdin.buffer.is_empty() {
            frame::append(packet, Kind::StdinEnd, &[]);
            stdin.closed = true;
        }
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    async fn read(flow: &Flow, output: Output, room: usize) -> io::Result<Vec<u8>> {
        let mut space = vec![0; room];
        let mut into = ReadBuf::new(&mut space);
        poll_fn(|context| flow.poll_read(output, context, &mut into)).await?;
        Ok(into.filled().to_vec())
    }

    async fn packet(flow: &Flow) -> Vec<u8> {
        let mut packet = Vec::new();
        flow.next_packet(&mut packet).await;
        packet
    }

    fn frame(kind: Kind, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        frame::append(&mut packet, kind, payload);
        packet
    }

    #[test]
    fn output_beyond_the_credit_breaks_the_protocol() {
        let flow = Flow::new();
        let data = vec![0; MAX_DATA_BYTES];
        for _ in 0..INITIAL_CREDIT_BYTES as usize / MAX_DATA_BYTES {
            flow.receive(Output::Stdout, &data).expect("within the credit");
        }
        assert!(matches!(flow.receive(Output::Stdout, &[0]), Err(AgentError::Broken(_))));
        flow.receive(Output::Stderr, &data).expect("each stream has credit of its own");
    }

    #[tokio::test]
    async fn credit_is_granted_as_the_reader_reads() {
        let flow = Flow::new();
        let step = GRANT_STEP_BYTES as usize;
        flow.receive(Output::Stdout, &vec![7; step]).expect("within the credit");
        assert_eq!(read(&flow, Output::Stdout, step - 1).await.expect("data").len(), step - 1);
        flow.signal(1);
        assert_eq!(packet(&flow).await, frame(Kind::Signal, &[1, 0, 0, 0]), "no grant before a step is full");
        read(&flow, Output::Stdout, 9).await.expect("data");
        assert_eq!(packet(&flow).await, frame(Kind::StdoutCredit, &GRANT_STEP_BYTES.to_le_bytes()));
        flow.receive(Output::Stdout, &vec![7; INITIAL_CREDIT_BYTES as usize])
            .expect("the credit is whole again");
    }

    #[tokio::test]
    async fn a_reader_that_goes_away_is_told_to_the_guest_once() {
        let flow = Flow::new();
        flow.receive(Output::Stderr, b"unread").expect("within the credit");
        flow.stop_reading(Output::Stderr);
        assert_eq!(packet(&flow).await, frame(Kind::StderrClose, &[]));
        flow.receive(Output::Stderr, b"under way").expect("within the credit");
        assert!(flow.lock().stderr.buffer.is_empty());
        let mut packet = Vec::new();
        flow.lock().fill(&mut packet);
        assert!(packet.is_empty());
    }

    #[tokio::test]
    async fn a_lost_stream_is_an_error_after_what_was_received() {
        let flow = Flow::new();
        flow.receive(Output::Stdout, b"half").expect("within the credit");
        flow.end(false);
        assert_eq!(read(&flow, Output::Stdout, 9).await.expect("data"), b"half");
        assert_eq!(
            read(&flow, Output::Stdout, 9).await.expect_err("cut off").kind(),
            io::ErrorKind::ConnectionAborted
        );
    }

    #[tokio::test]
    async fn a_complete_stream_ends() {
        let flow = Flow::new();
        flow.end(true);
        flow.end(false);
        assert!(read(&flow, Output::Stdout, 9).await.expect("an end").is_empty());
    }

    #[tokio::test]
    async fn stdin_waits_for_credit_and_for_room() {
        let flow = Flow::new();
        let write = async |data: &[u8]| poll_fn(|context| flow.poll_write(context, data)).await;
        let mut sent = 0;
        while sent < INITIAL_CREDIT_BYTES as usize {
            sent += write(&vec![1; MAX_DATA_BYTES]).await.expect("room");
            assert_eq!(packet(&flow).await.len(), frame::HEADER_BYTES + MAX_DATA_BYTES);
        }
        let mut buffered = 0;
        while buffered < STDIN_BUFFER_BYTES {
            buffered += write(&vec![1; MAX_DATA_BYTES]).await.expect("room");
        }
        let mut context = Context::from_waker(Waker::noop());
        assert!(flow.poll_write(&mut context, &[1]).is_pending(), "no room and no credit");
        flow.finish_stdin();
        flow.grant_stdin(u64::MAX);
        let mut rest = packet(&flow).await;
        rest.extend(packet(&flow).await);
        assert_eq!(rest.len(), STDIN_BUFFER_BYTES + 3 * frame::HEADER_BYTES);
        assert!(rest.ends_with(&frame(Kind::StdinEnd, &[])));
    }

    #[tokio::test]
    async fn a_command_that_is_gone_breaks_the_pipe() {
        let flow = Flow::new();
        flow.end(true);
        let written = poll_fn(|context| flow.poll_write(context, b"x")).await;
        assert_eq!(written.expect_err("nobody reads").kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn signals_that_nobody_takes_are_bounded() {
        let flow = Flow::new();
        for _ in 0..SIGNALS_WAITING_MAX {
            assert!(flow.signal(10));
        }
        assert!(!flow.signal(10));
    }

    #[tokio::test]
    async fn of_several_sizes_the_last_is_sent() {
        let flow = Flow::new();
        flow.resize(WindowSize { rows: 1, columns: 1 });
        flow.resize(WindowSize { rows: 2, columns: 3 });
        let mut expected = Vec::new();
        frame::append_message(&mut expected, Kind::Resize, &WindowSize { rows: 2, columns: 3 });
        assert_eq!(packet(&flow).await, expected);
    }
}
