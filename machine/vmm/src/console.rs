//! What the guest writes to its console: the last of it kept, all of it passed on when somebody reads it.
//!
//! The guest must never wait for a reader. So a byte goes into a ring, and a thread of its own moves the ring's content
//! to the reader's descriptor; when the reader is slower than the guest, the ring's oldest bytes are lost to it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

/// How much of the console is kept.
const RING_BYTES: usize = kiln_control::MAX_CONSOLE_BYTES;
/// The most bytes written to the reader at once; a pipe that is writable takes this much without blocking (`PIPE_BUF`).
const CHUNK_BYTES: usize = 4096;
/// How long the end of a machine waits for a reader to take what is left.
const DRAIN_LIMIT: Duration = Duration::from_millis(500);

/// The console of one machine. Clones are the same console.
#[derive(Clone, Debug)]
pub struct Console {
    shared: Arc<Shared>,
}

/// Where a device puts the guest's output.
#[derive(Clone, Debug)]
pub(crate) struct ConsoleInput {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    ring: Mutex<Ring>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Somebody reads along.
    has_reader: bool,
    /// How many of the last bytes the reader has not got yet.
    unread: usize,
    /// The machine has ended: nothing more comes.
    closed: bool,
}

impl Console {
    /// A console whose output also goes to `reader`.
    ///
    /// # Errors
    /// What the host says when it cannot start a thread.
    pub fn new(reader: Option<OwnedFd>) -> std::io::Result<Self> {
        let ring = Ring { has_reader: reader.is_some(), ..Ring::default() };
        let shared = Arc::new(Shared { ring: Mutex::new(ring), changed: Condvar::new() });
        if let Some(reader) = reader {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name("console".into()).spawn(move || {
                shared.pass_on(&reader);
                shared.reader_is_done();
            })?;
        }
        Ok(Self { shared })
    }

    /// Where devices put the guest's output.
    pub(crate) fn input(&self) -> ConsoleInput {
        ConsoleInput { shared: Arc::clone(&self.shared) }
    }

    /// The last `limit` bytes of output.
    pub fn tail(&self, limit: usize) -> Vec<u8> {
        let ring = self.shared.lock();
        ring.bytes.iter().skip(ring.bytes.len().saturating_sub(limit)).copied().collect()
    }

    /// Whether `needle` is in what is kept.
    pub(crate) fn contains(&self, needle: &[u8]) -> bool {
        let mut ring = self.shared.lock();
        ring.bytes.make_contiguous().windows(needle.len()).any(|window| window == needle)
    }

    /// Gives the reader what is left, as far as it takes it within a limited time.
    pub(crate) fn close(&self) {
        let mut ring = self.shared.lock();
        ring.closed = true;
        self.shared.changed.notify_all();
        // A reader that takes nothing keeps its thread waiting; that thread ends with the process.
        drop(self.shared.changed.wait_timeout_while(ring, DRAIN_LIMIT, |ring| ring.has_reader));
    }
}

impl ConsoleInput {
    /// The guest wrote `byte`.
    pub(crate) fn push(&self, byte: u8) {
        let mut ring = self.shared.lock();
        if ring.bytes.len() == RING_BYTES {
            ring.bytes.pop_front();
        }
        ring.bytes.push_back(byte);
        if ring.has_reader {
            let was_empty = ring.unread == 0;
            ring.unread = (ring.unread + 1).min(RING_BYTES);
            drop(ring);
            if was_empty {
                self.shared.changed.notify_all();
            }
        }
    }
}

impl Shared {
    /// Moves output to `reader` until the console is closed or the reader is gone.
    fn pass_on(&self, reader: &OwnedFd) {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        while self.wait_for_output() && wait_until_writable(reader) {
            chunk.clear();
            let mut ring = self.lock();
            let start = ring.bytes.len() - ring.unread;
            chunk.extend(ring.bytes.iter().skip(start).take(CHUNK_BYTES));
            ring.unread -= chunk.len();
            drop(ring);
            if write_all(reader, &chunk).is_err() {
                return;
            }
        }
    }

    /// Waits until there is output, or says that nothing more comes.
    fn wait_for_output(&self) -> bool {
        let ring = self.lock();
        let ring = self
            .changed
            .wait_while(ring, |ring| ring.unread == 0 && !ring.closed)
            .unwrap_or_else(PoisonError::into_inner);
        ring.unread > 0
    }

    fn reader_is_done(&self) {
        let mut ring = self.lock();
        ring.has_reader = false;
        ring.unread = 0;
        drop(ring);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until the reader takes a chunk, or says that it is gone.
fn wait_until_writable(reader: &OwnedFd) -> bool {
    loop {
        let mut fds = [PollFd::new(reader, PollFlags::OUT)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => return !fds[0].revents().contains(PollFlags::ERR),
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

fn write_all(reader: impl AsFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&reader, bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn write(console: &Console, bytes: &[u8]) {
        let input = console.input();
        for byte in bytes {
            input.push(*byte);
        }
    }

    #[test]
    fn the_last_output_is_kept() {
        let console = Console::new(None).expect("no thread needed");
        write(&console, &vec![b'a'; RING_BYTES]);
        write(&console, b"the end");
        assert_eq!(console.tail(7), b"the end");
        assert_eq!(console.tail(usize::MAX).len(), RING_BYTES);
        assert!(console.contains(b"athe"));
    }

    #[test]
    fn a_reader_gets_everything_it_keeps_up_with() {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let console = Console::new(Some(writer.into())).expect("a thread");
        write(&console, b"hello ");
        write(&console, b"world");
        console.close();
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("text");
        assert_eq!(text, "hello world");
    }

    #[test]
    fn a_reader_that_never_reads_does_not_stall_the_guest() {
        let (_reader, writer) = std::io::pipe().expect("a pipe");
        let console = Console::new(Some(writer.into())).expect("a thread");
        // More than the pipe and the ring hold together; this returns, or the test never ends.
        write(&console, &vec![b'x'; 4 * RING_BYTES]);
        write(&console, b"last");
        assert_eq!(console.tail(4), b"last");
        console.close();
    }

    #[test]
    fn a_reader_that_went_away_is_no_error() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let console = Console::new(Some(writer.into())).expect("a thread");
        write(&console, b"into the void");
        console.close();
        assert_eq!(console.tail(4), b"void");
    }
}
