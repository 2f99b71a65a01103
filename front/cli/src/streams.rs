//! The caller's stdin, stdout and stderr, carried to and from a command.
//!
//! Whoever started this process may share its streams and have set them non-blocking, so "try again" is waited out
//! with poll(2) on the thread that makes the call.

use std::io;
use std::os::fd::BorrowedFd;

use kiln::agent::ChildStdin;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_blocking;

use crate::events::EventLog;

/// One read's worth.
const CHUNK_BYTES: usize = 64 << 10;

/// Carries a command's output until its end. A caller that goes away (`| head`) is the command's to know: `from` is
/// dropped, which closes its pipe.
///
/// # Errors
/// When the output cannot be written for another reason than that nobody reads it.
pub(crate) async fn carry_out(
    mut from: impl AsyncRead + Unpin,
    to: BorrowedFd<'static>,
    events: EventLog,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = match from.read(&mut chunk).await {
            // A connection that was lost is reported by the wait for the command's end.
            Ok(0) | Err(_) => return Ok(()),
            Ok(count) => count,
        };
        events.output();
        let written = spawn_blocking(move || (write_all(to, &chunk[..count]), chunk)).await;
        let (written, used) = written.map_err(io::Error::other)?;
        chunk = used;
        match written {
            Ok(()) => {}
            Err(Errno::PIPE) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Carries the caller's stdin to a command until its end, or until the command is gone.
pub(crate) async fn carry_in(mut to: ChildStdin) {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let read = spawn_blocking(move || (read(rustix::stdio::stdin(), &mut chunk), chunk)).await;
        let Ok((Ok(count @ 1..), used)) = read else { break };
        chunk = used;
        if to.write_all(&chunk[..count]).await.is_err() {
            break;
        }
    }
    // Dropping `to` ends the command's stdin after what was written.
}

fn read(from: BorrowedFd<'_>, chunk: &mut [u8]) -> Result<usize, Errno> {
    retried(from, PollFlags::IN, || rustix::io::read(from, &mut *chunk))
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let written = retried(to, PollFlags::OUT, || rustix::io::write(to, bytes))?;
        bytes = &bytes[written..];
    }
    Ok(())
}

/// Makes a call until it neither was interrupted nor would have blocked.
fn retried(
    stream: BorrowedFd<'_>,
    ready: PollFlags,
    mut call: impl FnMut() -> Result<usize, Errno>,
) -> Result<usize, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(&stream, ready)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            },
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::AsFd;
    use rustix::pipe::{PipeFlags, pipe_with};

    #[test]
    fn a_stream_that_does_not_block_is_waited_for() {
        const BYTES: usize = 1 << 20;
        let (reading, writing) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).expect("a pipe");
        let writer = std::thread::spawn(move || write_all(writing.as_fd(), &vec![7; BYTES]));
        let (mut total, mut chunk) = (0, vec![0; 10_000]);
        loop {
            match read(reading.as_fd(), &mut chunk).expect("the pipe reads") {
                0 => break,
                count => total += count,
            }
        }
        assert_eq!(total, BYTES);
        writer.join().expect("no panic").expect("written");
    }

    #[tokio::test]
    async fn an_output_nobody_reads_is_given_up_without_an_error() {
        let (reading, writing) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        drop(reading);
        // The function takes descriptors that live as long as the process, such as stdout's.
        let writing: &'static rustix::fd::OwnedFd = Box::leak(Box::new(writing));
        let carried = carry_out(&b"some output"[..], writing.as_fd(), EventLog::default()).await;
        carried.expect("a reader that went away is no failure");
    }

    #[tokio::test]
    async fn an_output_that_cannot_be_written_is_an_error() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("there is a /dev/full");
        let full: &'static std::fs::File = Box::leak(Box::new(full));
        let carried = carry_out(&b"some output"[..], full.as_fd(), EventLog::default()).await;
        assert_eq!(carried.expect_err("no space").kind(), io::ErrorKind::StorageFull);
    }
}
