//! Whole trees.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use kiln_protocol::frame::{self, HEADER_BYTES, Kind};
use kiln_protocol::{Call, Entry, Get, MAX_DATA_BYTES, Put, PutNaming};
use kiln_tree::{Failure, Limits, Naming, Owner, Place, Step, Walker, Writer};
use rustix::fs::FileType;
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::frames::{Frame, Frames};
use super::single::answered;
use super::{FileError, begin, bytes, explained};
use crate::agent::{AgentError, read_reply};
use crate::vm::Target;
use crate::vm::boot::blocking;

/// What is read of the host's tree before it is sent.
const PACKET_BYTES: usize = 64 << 10;
/// Packets, entries or pieces of files that wait between the network's side and the disk's.
const WAITING_MAX: usize = 8;
/// The most entries of a tree copied out, unless told otherwise.
const ENTRIES_MAX: u64 = 1_000_000;
/// The bits of a mode that a file keeps which comes out of a guest: no set-id bits, for it is its taker's.
const MODE_OUT: u32 = 0o777;

/// How a tree is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyOptions {
    /// Copied in, files get the user and group ids they have on the host; otherwise they are root's. Copied out, they are
    /// always the caller's.
    pub keep_owner: bool,
    /// The most files, links and directories that are copied out; a million unless told otherwise.
    pub entries_max: u64,
    /// The most bytes of all files together that are copied out; no limit unless told otherwise.
    pub bytes_max: u64,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self { keep_owner: false, entries_max: ENTRIES_MAX, bytes_max: u64::MAX }
    }
}

/// What was copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Regular files.
    pub files: u64,
    /// Directories, those that were there among them.
    pub directories: u64,
    /// Symbolic links.
    pub links: u64,
    /// Devices, fifos and sockets, which are left out.
    pub skipped: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

impl From<kiln_tree::Counts> for Copied {
    fn from(counts: kiln_tree::Counts) -> Self {
        let kiln_tree::Counts { files, directories, links, skipped, bytes } = counts;
        Self { files, directories, links, skipped, bytes }
    }
}

pub(crate) async fn copy_in(
    machine: Target<'_>,
    from: &Path,
    to: &Path,
    options: CopyOptions,
) -> Result<Copied, FileError> {
    let source = bytes(from);
    let walker = blocking(move || Walker::tree(&source)).await?;
    let (naming, name) = match name_of(from) {
        Some(name) => (PutNaming::Into, name.to_vec()),
        None => (PutNaming::Contents, Vec::new()),
    };
    let put = Put { path: bytes(to), naming: naming.into(), name, keep_owner: options.keep_owner };
    let stream = begin(machine, Call::Put(put)).await?;
    explained(machine, send(stream, walker).await).await
}

/// Sends a tree to a guest that is ready for it.
async fn send(stream: UnixStream, walker: Walker) -> Result<Copied, FileError> {
    let (mut answer, mut stream) = stream.into_split();
    let (sender, mut packets) = mpsc::channel::<Vec<u8>>(WAITING_MAX);
    let sending = async {
        let passing_on = async move {
            while let Some(packet) = packets.recv().await {
                // What cannot be sent has been answered, or never will be.
                if stream.write_all(&packet).await.is_err() {
                    break;
                }
            }
            stream
        };
        let (mut stream, copied) = tokio::join!(passing_on, blocking(move || walk(walker, &sender)));
        let copied = copied?;
        let _ = stream.write_all(&frame::header(Kind::End, 0)).await;
        Ok((copied, stream))
    };
    let (copied, _stream) = answered(sending, read_reply(&mut answer)).await?;
    Ok(copied)
}

/// Walks the host's tree, and hands it over in packets. Ends early when nobody takes them any more.
fn walk(mut walker: Walker, packets: &mpsc::Sender<Vec<u8>>) -> Result<Copied, Failure> {
    let mut copied = Copied::default();
    let mut packet = Vec::with_capacity(PACKET_BYTES + HEADER_BYTES + MAX_DATA_BYTES);
    loop {
        let start = packet.len();
        packet.extend_from_slice(&[0; HEADER_BYTES]);
        match walker.next(&mut packet, MAX_DATA_BYTES)? {
            Step::Data(count) => {
                packet[start..start + HEADER_BYTES].copy_from_slice(&frame::header(Kind::Data, count));
                copied.bytes += count as u64;
            }
            Step::Entry(entry) => {
                packet.truncate(start);
                match kiln_tree::file_type(&entry) {
                    FileType::RegularFile => copied.files += 1,
                    FileType::Directory => copied.directories += 1,
                    FileType::Symlink => copied.links += 1,
                    _ => copied.skipped += 1,
                }
                frame::append_message(&mut packet, Kind::Entry, &entry);
            }
            Step::End => {
                packet.truncate(start);
                let _ = packets.blocking_send(packet);
                return Ok(copied);
            }
        }
        if packet.len() >= PACKET_BYTES {
            let full = std::mem::replace(&mut packet, Vec::with_capacity(PACKET_BYTES));
            if packets.blocking_send(full).is_err() {
                return Ok(copied);
            }
        }
    }
}

/// A piece of a tree that comes out of a guest.
enum Piece {
    Entry(Entry),
    Data(Vec<u8>),
    End,
}

pub(crate) async fn copy_out(
    machine: Target<'_>,
    from: &Path,
    to: &Path,
    options: CopyOptions,
) -> Result<Copied, FileError> {
    let stream = begin(machine, Call::Get(Get { path: bytes(from), file: false })).await?;
    explained(machine, receive(stream, name_of(from), to, options).await).await
}

/// Makes the tree that comes from a guest.
async fn receive(
    stream: UnixStream,
    name: Option<&[u8]>,
    to: &Path,
    options: CopyOptions,
) -> Result<Copied, FileError> {
    let name = name.map(<[u8]>::to_vec);
    let to = bytes(to);
    let limits = Limits { entries: options.entries_max, bytes: options.bytes_max, mode: MODE_OUT };
    let (sender, pieces) = mpsc::channel(WAITING_MAX);
    let writing = blocking(move || {
        let naming = name.as_deref().map_or(Naming::Contents, Naming::Into);
        let place = Place::find(&to, naming)?;
        write(Writer::new(place, Owner::Maker, limits), pieces)
    });
    let mut frames = Frames::new(stream);
    let receiving = async move {
        loop {
            let piece = match frames.next().await? {
                Frame::Entry(entry) => Piece::Entry(entry),
                Frame::Data => Piece::Data(frames.keep_data()),
                Frame::End => Piece::End,
            };
            let is_end = matches!(piece, Piece::End);
            // Who does not take it any more has a reason, and tells.
            if sender.send(piece).await.is_err() || is_end {
                return Ok::<_, AgentError>(());
            }
        }
    };
    let (received, written) = tokio::join!(receiving, writing);
    received?;
    Ok(written?.unwrap_or_default().into())
}

/// Makes the tree as its pieces come; `None` when they end before it does, and what is not complete is gone then.
fn write(
    mut writer: Writer,
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<Option<kiln_tree::Counts>, Failure> {
    while let Some(piece) = pieces.blocking_recv() {
        match piece {
            Piece::Entry(entry) => writer.entry(entry)?,
            Piece::Data(bytes) => writer.data(&bytes)?,
            Piece::End => return writer.finish().map(Some),
        }
    }
    Ok(None)
}

/// The name that a tree has by its path; `None` when its contents are meant: it ends in `.`, or in nothing.
fn name_of(path: &Path) -> Option<&[u8]> {
    let path = path.as_os_str().as_bytes();
    if path == b"." || path.ends_with(b"/.") {
        return None;
    }
    Path::new(OsStr::from_bytes(path)).file_name().map(OsStr::as_bytes)
}

#[cfg(test)]
mod tests {
    use kiln_protocol::{Done, Failed, Outcome, Reason, Reply};
    use prost::Message as _;
    use tokio::io::AsyncReadExt as _;

    use super::*;
    use crate::vm::AskError;

    fn framed(packet: &mut Vec<u8>, entry: &Entry) {
        frame::append_message(packet, Kind::Entry, entry);
    }

    fn replied(packet: &mut Vec<u8>, outcome: Outcome) {
        frame::append(packet, Kind::Reply, &Reply { outcome: Some(outcome) }.encode_to_vec());
    }

    fn directory() -> Entry {
        Entry { mode: 0o040_755, ..Entry::default() }
    }

    fn file(name: &str) -> Entry {
        Entry { depth: 1, name: name.into(), mode: 0o104_755, ..Entry::default() }
    }

    /// What comes of a guest that sends this and goes.
    async fn taken(said: Vec<u8>, to: &Path, options: CopyOptions) -> Result<Copied, FileError> {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
        let guest = tokio::spawn(async move {
            let _ = theirs.write_all(&said).await;
        });
        let outcome = receive(ours, Some(b"tree"), to, options).await;
        guest.await.expect("it does not panic");
        outcome
    }

    #[tokio::test]
    async fn a_guest_that_lies_gets_nowhere() {
        let root = tempfile::tempdir().expect("a directory");
        let to = root.path().join("to");
        for entry in [file("../x"), file(".."), file("/etc/x"), Entry { depth: 2, ..file("x") }] {
            let mut said = Vec::new();
            framed(&mut said, &directory());
            framed(&mut said, &entry);
            replied(&mut said, Outcome::Done(Done {}));
            let outcome = taken(said, &to, CopyOptions::default()).await;
            assert!(matches!(outcome, Err(FileError::Host { .. })), "{entry:?}: {outcome:?}");
            // Else the next is into it.
            std::fs::remove_dir(&to).expect("an empty directory");
        }
        let mut said = Vec::new();
        framed(&mut said, &directory());
        frame::append(&mut said, Kind::Stdout, b"x");
        let outcome = taken(said, &to, CopyOptions::default()).await;
        assert!(
            matches!(outcome, Err(FileError::Ask(AskError::Agent(AgentError::Broken(_))))),
            "{outcome:?}"
        );
        let names: Vec<_> =
            std::fs::read_dir(root.path()).expect("it").map(|entry| entry.expect("one").path()).collect();
        assert_eq!(names, [to.as_path()]);
        assert_eq!(std::fs::read_dir(&to).expect("it").count(), 0);
    }

    #[tokio::test]
    async fn a_tree_that_is_cut_off_is_an_error_and_leaves_only_what_was_complete() {
        let root = tempfile::tempdir().expect("a directory");
        let to = root.path().join("to");
        let mut said = Vec::new();
        framed(&mut said, &directory());
        framed(&mut said, &file("whole"));
        framed(&mut said, &file("half"));
        frame::append(&mut said, Kind::Data, b"x");
        let outcome = taken(said.clone(), &to, CopyOptions::default()).await;
        assert!(matches!(outcome, Err(FileError::Ask(AskError::Agent(AgentError::Lost(_))))), "{outcome:?}");
        let names = || std::fs::read_dir(&to).expect("it").map(|entry| entry.expect("one").file_name());
        assert_eq!(names().collect::<Vec<_>>(), ["whole"]);
        let failed = Failed { reason: Reason::Internal.into(), message: "no more".into() };
        replied(&mut said, Outcome::Failed(failed));
        let outcome = taken(said, &to, CopyOptions::default()).await;
        assert!(
            matches!(outcome, Err(FileError::Ask(AskError::Agent(AgentError::Refused { .. })))),
            "{outcome:?}"
        );
    }

    #[tokio::test]
    async fn what_comes_out_is_the_callers_within_limits() {
        let root = tempfile::tempdir().expect("a directory");
        let to = root.path().join("to");
        let mut said = Vec::new();
        framed(&mut said, &directory());
        framed(&mut said, &file("tool"));
        frame::append(&mut said, Kind::Data, b"0123");
        replied(&mut said, Outcome::Done(Done {}));
        for options in [
            CopyOptions { entries_max: 1, ..CopyOptions::default() },
            CopyOptions { bytes_max: 3, ..CopyOptions::default() },
        ] {
            let outcome = taken(said.clone(), &to, options).await;
            assert!(matches!(outcome, Err(FileError::TooLarge { .. })), "{outcome:?}");
            assert_eq!(std::fs::read_dir(&to).expect("it").count(), 0);
            // Otherwise it is into that directory.
            std::fs::remove_dir(&to).expect("an empty directory");
        }
        let copied = taken(said, &to, CopyOptions::default()).await.expect("copied");
        assert_eq!(copied, Copied { files: 1, directories: 1, links: 0, skipped: 0, bytes: 4 });
        use std::os::unix::fs::PermissionsExt as _;
        let tool = std::fs::metadata(to.join("tool")).expect("the file");
        assert_eq!((tool.permissions().mode() & 0o7777, tool.len()), (0o755, 4));
    }

    #[tokio::test]
    async fn a_guest_that_refuses_early_ends_the_sending() {
        let root = tempfile::tempdir().expect("a directory");
        std::fs::write(root.path().join("large"), vec![0; 4 << 20]).expect("a file");
        let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
        let walker = Walker::tree(root.path().as_os_str().as_bytes()).expect("a walk");
        let guest = async {
            let mut said = Vec::new();
            let failed = Failed { reason: Reason::Invalid.into(), message: "full".into() };
            replied(&mut said, Outcome::Failed(failed));
            theirs.read_exact(&mut [0; 100]).await.expect("the start");
            theirs.write_all(&said).await.expect("a reply");
            // It reads no more: who would go on sending would wait for ever.
        };
        let (outcome, ()) = tokio::join!(send(ours, walker), guest);
        assert!(
            matches!(outcome, Err(FileError::Ask(AskError::Agent(AgentError::Refused { .. })))),
            "{outcome:?}"
        );
    }

    #[test]
    fn a_name_is_the_last_of_a_path_and_a_dot_stands_for_what_is_in_it() {
        for (path, name) in [
            ("a/b", Some("b")),
            ("a/b/", Some("b")),
            ("b", Some("b")),
            ("a/.", None),
            (".", None),
            ("/", None),
            ("..", None),
        ] {
            assert_eq!(name_of(Path::new(path)), name.map(str::as_bytes), "{path}");
        }
    }
}
