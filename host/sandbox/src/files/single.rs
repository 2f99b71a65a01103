//! One file at a time.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use kiln_protocol::frame::{self, HEADER_BYTES, Kind};
use kiln_protocol::{Call, Entry, Get, MAX_DATA_BYTES, Outcome, Put, PutNaming};
use rustix::fs::FileType;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, ReadBuf};
use tokio::net::UnixStream;

use super::frames::{Frame, Frames};
use super::{FileError, begin, bytes, explained};
use crate::agent::{AgentError, read_reply};
use crate::vm::Target;

/// A file of a guest that is being read; at most 64 KiB of it wait for a slow reader.
///
/// It ends where the file ended when it was opened, or earlier if it has become shorter. An error says that not all has come.
#[derive(Debug)]
pub struct GuestFile {
    frames: Frames<UnixStream>,
    entry: Entry,
    ended: bool,
}

impl GuestFile {
    /// Its size when it was opened, in bytes; 0 for one that does not know its size, as those of `/proc`, which may have
    /// contents all the same.
    pub fn size(&self) -> u64 {
        self.entry.size
    }

    /// Its permissions: the lowest 12 bits of `st_mode`.
    pub fn mode(&self) -> u32 {
        self.entry.mode & 0o7777
    }

    /// When it was last changed.
    pub fn modified(&self) -> SystemTime {
        modified(&self.entry)
    }

    /// Its contents from here on, `limit_bytes` at most.
    ///
    /// # Errors
    /// `FileTooLarge` when there is more; `ConnectionAborted` or what the guest says when not all has come.
    pub async fn contents(self, limit_bytes: usize) -> io::Result<Vec<u8>> {
        let mut contents = Vec::new();
        self.take((limit_bytes as u64).saturating_add(1)).read_to_end(&mut contents).await?;
        if contents.len() > limit_bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(contents)
    }
}

/// When a file was last changed, as a guest has it; the start of time for one that no clock has.
fn modified(entry: &Entry) -> SystemTime {
    let seconds = Duration::from_secs(entry.mtime_s.unsigned_abs());
    let at = if entry.mtime_s < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(seconds)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(seconds)
    };
    let nanoseconds = Duration::from_nanos(entry.mtime_ns.min(999_999_999).into());
    at.and_then(|at| at.checked_add(nanoseconds)).unwrap_or(SystemTime::UNIX_EPOCH)
}

impl AsyncRead for GuestFile {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let file = self.get_mut();
        while !file.ended && file.frames.data().is_empty() {
            let failed = match ready!(file.frames.poll_next(context)) {
                Ok(Frame::Data) => continue,
                Ok(Frame::End) => {
                    file.ended = true;
                    continue;
                }
                Ok(Frame::Entry(_)) => AgentError::Broken("more than one file"),
                Err(error) => error,
            };
            return Poll::Ready(Err(match failed {
                AgentError::Lost(_) => {
                    let message = "the connection to the guest was lost";
                    io::Error::new(io::ErrorKind::ConnectionAborted, message)
                }
                other => io::Error::other(other),
            }));
        }
        let data = file.frames.data();
        let count = data.len().min(into.remaining());
        into.put_slice(&data[..count]);
        file.frames.take(count);
        Poll::Ready(Ok(()))
    }
}

pub(crate) async fn read(machine: Target<'_>, path: &Path) -> Result<GuestFile, FileError> {
    let stream = begin(machine, Call::Get(Get { path: bytes(path), file: true })).await?;
    let mut frames = Frames::new(stream);
    match frames.next().await {
        Ok(Frame::Entry(entry)) if kiln_tree::file_type(&entry) == FileType::RegularFile => {
            Ok(GuestFile { frames, entry, ended: false })
        }
        Ok(_) => Err(AgentError::Broken("a file that is none").into()),
        Err(error) => explained(machine, Err(error.into())).await,
    }
}

pub(crate) async fn write(
    machine: Target<'_>,
    path: &Path,
    mode: u32,
    contents: impl AsyncRead + Unpin,
) -> Result<u64, FileError> {
    let put = Put { path: bytes(path), naming: PutNaming::Exact.into(), name: Vec::new(), keep_owner: false };
    let stream = begin(machine, Call::Put(put)).await?;
    explained(machine, send(stream, path, mode, contents).await).await
}

/// Sends a file to a guest that is ready for it.
async fn send(
    stream: UnixStream,
    path: &Path,
    mode: u32,
    contents: impl AsyncRead + Unpin,
) -> Result<u64, FileError> {
    let (mut answer, mut stream) = stream.into_split();
    let failed = |source| FileError::Source { path: path.to_owned(), source };
    let mut contents = contents;
    let sending = async {
        let mut packet = Vec::with_capacity(HEADER_BYTES + MAX_DATA_BYTES);
        let entry = Entry { mode: FileType::RegularFile.as_raw_mode() | (mode & 0o7777), ..Entry::default() };
        frame::append_message(&mut packet, Kind::Entry, &entry);
        let mut total = 0;
        loop {
            // What cannot be sent has been answered, or never will be.
            if stream.write_all(&packet).await.is_err() {
                return Ok(total);
            }
            packet.resize(HEADER_BYTES + MAX_DATA_BYTES, 0);
            let count = contents.read(&mut packet[HEADER_BYTES..]).await.map_err(failed)?;
            if count == 0 {
                break;
            }
            total += count as u64;
            packet.truncate(HEADER_BYTES + count);
            packet[..HEADER_BYTES].copy_from_slice(&frame::header(Kind::Data, count));
        }
        let _ = stream.write_all(&frame::header(Kind::End, 0)).await;
        Ok(total)
    };
    answered(sending, read_reply(&mut answer)).await
}

/// What the guest says of a tree that it was sent, and what was sent: an early answer is a refusal, and ends the sending.
pub(super) async fn answered<T>(
    sending: impl Future<Output = Result<T, FileError>>,
    answer: impl Future<Output = Result<Outcome, AgentError>>,
) -> Result<T, FileError> {
    tokio::pin!(answer);
    let sent = tokio::select! {
        biased;
        answer = &mut answer => return Err(match answer {
            Ok(_) => AgentError::Broken("an answer before the end").into(),
            Err(error) => error.into(),
        }),
        sent = sending => sent?,
    };
    match answer.await {
        Ok(Outcome::Done(_)) => Ok(sent),
        Ok(_) => Err(AgentError::Broken("a reply that does not end a transfer").into()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::{Done, Reply};
    use prost::Message as _;

    use super::*;

    fn opened(said: &[u8]) -> GuestFile {
        use std::io::Write as _;
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
        theirs.write_all(said).expect("a socket takes some");
        ours.set_nonblocking(true).expect("a socket");
        let stream = UnixStream::from_std(ours).expect("a socket");
        GuestFile { frames: Frames::new(stream), entry: Entry::default(), ended: false }
    }

    #[tokio::test]
    async fn a_file_ends_when_the_guest_says_so_and_not_before() {
        let mut said = Vec::new();
        frame::append(&mut said, Kind::Data, b"con");
        frame::append(&mut said, Kind::Data, b"");
        frame::append(&mut said, Kind::Data, b"tents");
        let cut = opened(&said).contents(100).await.expect_err("not all has come");
        assert_eq!(cut.kind(), io::ErrorKind::ConnectionAborted);
        let done = Reply { outcome: Some(Outcome::Done(Done {})) };
        frame::append(&mut said, Kind::Reply, &done.encode_to_vec());
        assert_eq!(opened(&said).contents(8).await.expect("all"), b"contents");
        let large = opened(&said).contents(7).await.expect_err("more than wanted");
        assert_eq!(large.kind(), io::ErrorKind::FileTooLarge);
        let mut two = Vec::new();
        frame::append_message(&mut two, Kind::Entry, &Entry::default());
        assert!(opened(&two).contents(100).await.is_err());
    }

    #[test]
    fn no_time_a_guest_says_is_too_odd() {
        for (mtime_s, mtime_ns) in [(i64::MIN, 0), (i64::MAX, u32::MAX), (-1, 5), (1_000_000_000, 1)] {
            let entry = Entry { mtime_s, mtime_ns, ..Entry::default() };
            let _ = modified(&entry);
        }
        let at = modified(&Entry { mtime_s: 1, mtime_ns: 5, ..Entry::default() });
        assert_eq!(at, SystemTime::UNIX_EPOCH + Duration::new(1, 5));
    }
}
