//! What a detached machine's main command wrote: two files of bounded size, of which the older makes way.
//!
//! ```text
//! file   "kilnlog1" | bytes logged before this file: u64 | entry ...
//! entry  kind: u8 | 0 0 0 | length: u32 | nanoseconds since 1970: u64 | length bytes      (little-endian)
//! kinds  1 stdout, 2 stderr, 3 lost: an u64 of bytes that could not be written, for want of space
//! ```
//! One process writes and any number reads. A reader takes whole entries only, so whatever kills the writer, what was
//! written is readable; the next writer cuts off what is not whole.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::DetachedError;

/// The most bytes of one of the two files.
pub const LOG_FILE_BYTES_MAX: u64 = 16 << 20;
/// The file that is written.
pub(super) const LOG_NEW: &str = "output";
/// The one before it.
const LOG_OLD: &str = "output.old";
/// The next one, until it has its header.
const LOG_NEXT: &str = "output.next";

const MAGIC: &[u8; 8] = b"kilnlog1";
const FILE_HEADER_BYTES: u64 = 16;
const ENTRY_HEADER_BYTES: usize = 16;
/// The most bytes of an entry; a reader refuses more.
const ENTRY_BYTES_MAX: usize = 64 << 10;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Output(LogStream),
    Lost,
}

/// Which of the command's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LogStream {
    /// Its stdout, or its terminal.
    Stdout,
    /// Its stderr.
    Stderr,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Output(LogStream::Stdout) => 1,
            Self::Output(LogStream::Stderr) => 2,
            Self::Lost => 3,
        }
    }

    fn of(code: u8) -> Option<Self> {
        Some(match code {
            1 => Self::Output(LogStream::Stdout),
            2 => Self::Output(LogStream::Stderr),
            3 => Self::Lost,
            _ => return None,
        })
    }
}

/// Writes a log. What cannot be written is counted, and told as soon as something can.
#[derive(Debug)]
pub(super) struct LogWriter {
    folder: PathBuf,
    file: File,
    /// Where the next entry goes.
    length: u64,
    /// Bytes of output in all files so far.
    logged: u64,
    /// Bytes of output that are in none.
    lost: u64,
    file_bytes_max: u64,
}

impl LogWriter {
    /// Goes on with the log in a machine's folder.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        Self::with_limit(folder, LOG_FILE_BYTES_MAX)
    }

    fn with_limit(folder: &Path, file_bytes_max: u64) -> io::Result<Self> {
        let path = folder.join(LOG_NEW);
        let file = options().read(true).create(true).truncate(false).open(path)?;
        let mut writer =
            Self { folder: folder.to_owned(), file, length: 0, logged: 0, lost: 0, file_bytes_max };
        if let Some(mut whole) = Position::start(writer.file.try_clone()?)? {
            while !matches!(whole.next()?, Next::Nothing) {}
            (writer.length, writer.logged) = (whole.offset, whole.logged);
            writer.file.set_len(writer.length)?;
        } else {
            writer.file.set_len(0)?;
            writer.length = write_header(&writer.file, 0)?;
        }
        Ok(writer)
    }

    /// Adds output, at most [`ENTRY_BYTES_MAX`] bytes at a time.
    pub(super) fn append(&mut self, stream: LogStream, unix_ns: u64, bytes: &[u8]) {
        for bytes in bytes.chunks(ENTRY_BYTES_MAX) {
            let lost = self.lost;
            let told = lost == 0 || self.put(Kind::Lost, unix_ns, &lost.to_le_bytes()).is_ok();
            if told {
                self.lost -= lost;
            }
            if told && self.put(Kind::Output(stream), unix_ns, bytes).is_ok() {
                self.logged += bytes.len() as u64;
            } else {
                self.lost += bytes.len() as u64;
            }
        }
    }

    fn put(&mut self, kind: Kind, unix_ns: u64, bytes: &[u8]) -> io::Result<()> {
        let mut entry = Vec::with_capacity(ENTRY_HEADER_BYTES + bytes.len());
        entry.extend_from_slice(&[kind.code(), 0, 0, 0]);
        entry.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        entry.extend_from_slice(&unix_ns.to_le_bytes());
        entry.extend_from_slice(bytes);
        if self.length + entry.len() as u64 > self.file_bytes_max {
            self.turn_over()?;
        }
        let written = self.file.write_all_at(&entry, self.length);
        if written.is_err() {
            // Half an entry is none; the next one overwrites what cannot be cut off.
            let _ = self.file.set_len(self.length);
        } else {
            self.length += entry.len() as u64;
        }
        written
    }

    /// Makes the file the older one, in the place of the one that was, and begins a new one.
    fn turn_over(&mut self) -> io::Result<()> {
        let [new, old, next] = [LOG_NEW, LOG_OLD, LOG_NEXT].map(|name| self.folder.join(name));
        let file = options().create(true).truncate(true).open(&next)?;
        let length = write_header(&file, self.logged)?;
        fs::rename(&new, &old)?;
        fs::rename(&next, &new)?;
        (self.file, self.length) = (file, length);
        Ok(())
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true).mode(0o600);
    options
}

fn write_header(file: &File, logged: u64) -> io::Result<u64> {
    let mut header = MAGIC.to_vec();
    header.extend_from_slice(&logged.to_le_bytes());
    file.write_all_at(&header, 0)?;
    Ok(FILE_HEADER_BYTES)
}

/// What is in a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogEntry {
    /// The command wrote something.
    Output {
        /// Where to.
        stream: LogStream,
        /// When it arrived, in nanoseconds since 1970.
        unix_ns: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// So many bytes are not there: the oldest made way, or the disk was full.
    Lost {
        /// How many.
        bytes: u64,
    },
}

/// Reads a log from its oldest entry, also while it is written.
#[derive(Debug)]
pub struct LogReader {
    folder: PathBuf,
    position: Option<Position>,
    /// Bytes of output that came before the reader's position.
    logged: u64,
}

/// A place in one file.
#[derive(Debug)]
struct Position {
    file: File,
    inode: u64,
    offset: u64,
    logged: u64,
}

enum Next {
    Entry(Kind, u64, Vec<u8>),
    /// None, or no whole one.
    Nothing,
}

impl Position {
    /// The first entry of a file; `None` while it has no header.
    fn start(file: File) -> io::Result<Option<Self>> {
        let mut header = [0; FILE_HEADER_BYTES as usize];
        match file.read_exact_at(&mut header, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let (magic, logged) = header.split_at(MAGIC.len());
        if magic != MAGIC {
            return Ok(None);
        }
        let logged = u64::from_le_bytes(logged.try_into().map_err(io::Error::other)?);
        let inode = file.metadata()?.ino();
        Ok(Some(Self { file, inode, offset: FILE_HEADER_BYTES, logged }))
    }

    fn open(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => Self::start(opened?),
        }
    }

    fn next(&mut self) -> io::Result<Next> {
        let mut header = [0; ENTRY_HEADER_BYTES];
        let read = |bytes: &mut [u8], offset| match self.file.read_exact_at(bytes, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            read => read.map(|()| true),
        };
        if !read(&mut header, self.offset)? {
            return Ok(Next::Nothing);
        }
        let (kind, rest) = header.split_at(4);
        let (length, time) = rest.split_at(4);
        let length = u32::from_le_bytes(length.try_into().map_err(io::Error::other)?) as usize;
        let unix_ns = u64::from_le_bytes(time.try_into().map_err(io::Error::other)?);
        let (Some(kind), true) = (Kind::of(kind[0]), length <= ENTRY_BYTES_MAX) else {
            // Where the last words of a writer that was killed are not whole, the next writer goes on.
            return Ok(Next::Nothing);
        };
        let mut bytes = vec![0; length];
        if !read(&mut bytes, self.offset + ENTRY_HEADER_BYTES as u64)? {
            return Ok(Next::Nothing);
        }
        self.offset += (ENTRY_HEADER_BYTES + length) as u64;
        if let Kind::Output(_) = kind {
            self.logged += length as u64;
        }
        Ok(Next::Entry(kind, unix_ns, bytes))
    }
}

impl LogReader {
    /// Reads the log in a machine's folder; there need not be one yet.
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder, position: None, logged: 0 }
    }

    /// The next entry; `None` when there is none yet.
    ///
    /// # Errors
    /// [`DetachedError::Io`]
    pub fn read_next(&mut self) -> Result<Option<LogEntry>, DetachedError> {
        self.read().map_err(DetachedError::io("read the log in", &self.folder))
    }

    fn read(&mut self) -> io::Result<Option<LogEntry>> {
        loop {
            if let Some(entry) = self.step()? {
                return Ok(Some(entry));
            }
            let newest = match fs::metadata(self.folder.join(LOG_NEW)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                found => Some(found?.ino()),
            };
            let here = self.position.as_ref().map(|position| position.inode);
            if here.is_some() && (newest.is_none() || newest == here) {
                return Ok(None);
            }
            // Nothing is written to it any more, but something may have been since it was read.
            if let Some(entry) = self.step()? {
                return Ok(Some(entry));
            }
            let Some(next) = self.successor()? else { return Ok(None) };
            let missed = next.logged.saturating_sub(self.logged);
            self.logged = next.logged;
            self.position = Some(next);
            if missed > 0 {
                return Ok(Some(LogEntry::Lost { bytes: missed }));
            }
        }
    }

    /// The older of the files that begin where this reader is, or later.
    fn successor(&self) -> io::Result<Option<Position>> {
        let here = self.position.as_ref().map(|position| position.inode);
        let mut found = None;
        // The newer first: what is renamed meanwhile is found as the older.
        for name in [LOG_NEW, LOG_OLD] {
            if let Some(position) = Position::open(&self.folder.join(name))?
                && Some(position.inode) != here
                && position.logged >= self.logged
            {
                found = Some(position);
            }
        }
        Ok(found)
    }

    fn step(&mut self) -> io::Result<Option<LogEntry>> {
        let Some(position) = &mut self.position else { return Ok(None) };
        let next = position.next()?;
        self.logged = position.logged;
        Ok(match next {
            Next::Entry(Kind::Output(stream), unix_ns, bytes) => {
                Some(LogEntry::Output { stream, unix_ns, bytes })
            }
            Next::Entry(Kind::Lost, _, bytes) => {
                let bytes = bytes.try_into().map_or(0, u64::from_le_bytes);
                Some(LogEntry::Lost { bytes })
            }
            Next::Nothing => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    fn all(reader: &mut LogReader) -> Vec<LogEntry> {
        std::iter::from_fn(|| reader.read_next().expect("readable")).collect()
    }

    fn read(folder: &Path) -> Vec<LogEntry> {
        all(&mut LogReader::new(folder.to_owned()))
    }

    fn out(unix_ns: u64, bytes: &[u8]) -> LogEntry {
        LogEntry::Output { stream: LogStream::Stdout, unix_ns, bytes: bytes.to_vec() }
    }

    fn append(writer: &mut LogWriter, unix_ns: u64, bytes: &[u8]) {
        writer.append(LogStream::Stdout, unix_ns, bytes);
    }

    #[test]
    fn what_is_written_is_read_with_its_stream_and_time() {
        let folder = folder();
        assert_eq!(read(folder.path()), []);
        let mut writer = LogWriter::open(folder.path()).expect("a log");
        let mut reader = LogReader::new(folder.path().to_owned());
        assert_eq!(all(&mut reader), []);
        append(&mut writer, 7, b"a\0\xff\n");
        writer.append(LogStream::Stderr, 8, b"b");
        let err = LogEntry::Output { stream: LogStream::Stderr, unix_ns: 8, bytes: b"b".to_vec() };
        assert_eq!(all(&mut reader), [out(7, b"a\0\xff\n"), err]);
        append(&mut writer, 9, b"more");
        assert_eq!(all(&mut reader), [out(9, b"more")]);
    }

    #[test]
    fn two_files_are_kept_and_what_made_way_is_counted() {
        let folder = folder();
        let mut writer = LogWriter::with_limit(folder.path(), 200).expect("a log");
        let mut follower = LogReader::new(folder.path().to_owned());
        let mut late = LogReader::new(folder.path().to_owned());
        append(&mut writer, 0, &[0; 10]);
        assert_eq!(late.read_next().expect("readable"), Some(out(0, &[0; 10])));
        let mut followed = all(&mut follower);
        for index in 1..100 {
            append(&mut writer, index, &[index as u8; 10]);
            followed.extend(all(&mut follower));
        }
        let times = |entries: &[LogEntry]| -> Vec<u64> {
            let time = |entry: &LogEntry| match entry {
                LogEntry::Output { unix_ns, .. } => Some(*unix_ns),
                LogEntry::Lost { .. } => None,
            };
            entries.iter().filter_map(time).collect()
        };
        assert_eq!(times(&followed), (0..100).collect::<Vec<_>>(), "a follower misses nothing");
        assert!(!followed.iter().any(|entry| matches!(entry, LogEntry::Lost { .. })));

        let size: u64 = fs::read_dir(folder.path())
            .expect("listed")
            .map(|entry| entry.expect("an entry").metadata().expect("there").len())
            .sum();
        assert!(size <= 400, "{size}");
        let kept = read(folder.path());
        let first = times(&kept)[0];
        assert_eq!(kept[0], LogEntry::Lost { bytes: first * 10 });
        assert_eq!(times(&kept), (first..100).collect::<Vec<_>>());
        // One that did not keep up knows what it missed, but for what it still has open.
        let rest = all(&mut late);
        let missed = rest.iter().find_map(|entry| match entry {
            LogEntry::Lost { bytes } => Some(*bytes),
            LogEntry::Output { .. } => None,
        });
        assert_eq!(missed.expect("told") + 10 * (times(&rest).len() as u64 + 1), 1000);
    }

    #[test]
    fn half_an_entry_is_cut_off_by_the_next_writer() {
        let folder = folder();
        let mut writer = LogWriter::open(folder.path()).expect("a log");
        append(&mut writer, 1, b"whole");
        append(&mut writer, 2, b"half of it");
        drop(writer);
        let file = OpenOptions::new().write(true).open(folder.path().join(LOG_NEW)).expect("there");
        file.set_len(file.metadata().expect("there").len() - 3).expect("cut");
        assert_eq!(read(folder.path()), [out(1, b"whole")]);
        let mut reader = LogReader::new(folder.path().to_owned());
        assert_eq!(all(&mut reader), [out(1, b"whole")]);
        let mut writer = LogWriter::open(folder.path()).expect("goes on");
        append(&mut writer, 3, b"next");
        assert_eq!(all(&mut reader), [out(3, b"next")]);
        assert_eq!(read(folder.path()), [out(1, b"whole"), out(3, b"next")]);
    }

    #[test]
    fn what_no_log_is_begins_anew() {
        for content in [&b""[..], b"kiln", b"something that is no log at all"] {
            let folder = folder();
            fs::write(folder.path().join(LOG_NEW), content).expect("written");
            assert_eq!(read(folder.path()), []);
            let mut writer = LogWriter::open(folder.path()).expect("a log");
            append(&mut writer, 1, b"x");
            assert_eq!(read(folder.path()), [out(1, b"x")]);
        }
    }

    #[test]
    fn what_a_full_disk_did_not_take_is_told_when_it_takes_something() {
        let folder = folder();
        let mut writer = LogWriter::open(folder.path()).expect("a log");
        append(&mut writer, 1, b"before");
        let file = std::mem::replace(
            &mut writer.file,
            OpenOptions::new().write(true).open("/dev/full").expect("there is a /dev/full"),
        );
        append(&mut writer, 2, b"four");
        append(&mut writer, 3, b"three");
        writer.file = file;
        append(&mut writer, 4, b"after");
        assert_eq!(read(folder.path()), [out(1, b"before"), LogEntry::Lost { bytes: 9 }, out(4, b"after")]);
    }
}
