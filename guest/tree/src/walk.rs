//! Takes a tree apart.

use alloc::ffi::CString;
use alloc::vec;
use alloc::vec::Vec;

use kiln_protocol::Entry;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

use crate::place::string;
use crate::{Failure, MAX_DEPTH, MAX_NAME_BYTES, is_path};

/// What directory entries are read into at a time.
const ENTRIES_BYTES: usize = 4096;
/// File systems whose files are no files of anybody's: what they show is made as it is read. Linux `magic.h`: proc, sysfs,
/// cgroup2, debugfs, tracefs.
const MADE_UP: [u64; 5] = [0x9fa0, 0x6265_6572, 0x6367_7270, 0x6462_6720, 0x7472_6163];

/// Walks a tree: a file, a link, or a directory and all below it.
#[derive(Debug)]
pub struct Walker {
    /// What comes first.
    root: Option<Entry>,
    /// The directories that are being walked, outermost first.
    levels: Vec<Level>,
    /// The file whose contents come next.
    file: Option<Contents>,
    /// Where the walk is, for messages.
    path: Vec<u8>,
}

#[derive(Debug)]
struct Level {
    directory: OwnedFd,
    device: u64,
    /// Names that have been read and not been walked.
    names: Vec<CString>,
    /// How long the path of the directory is.
    path_bytes: usize,
}

#[derive(Debug)]
struct Contents {
    file: OwnedFd,
    /// What is left of the size it had; `None` for one that does not know its size, as those of procfs.
    left: Option<u64>,
}

/// What comes next of a tree.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A file, link or directory. The contents of a file follow, and then those of a directory.
    Entry(Entry),
    /// So many bytes of the last file were appended.
    Data(usize),
    /// That was all.
    End,
}

impl Walker {
    /// A walk over the tree at `path`; the links above it are followed. A link at its end is walked itself, unless the path ends
    /// in a slash or `/.`.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn tree(path: &[u8]) -> Result<Self, Failure> {
        let trailing = path.ends_with(b"/") || path.ends_with(b"/.");
        Self::open(path, if trailing { OFlags::empty() } else { OFlags::NOFOLLOW })
    }

    /// A walk over the one file at `path`, links followed.
    ///
    /// # Errors
    /// What the kernel reports; `ISDIR` for a directory and `INVAL` for what else is no regular file.
    pub fn file(path: &[u8]) -> Result<Self, Failure> {
        let walker = Self::open(path, OFlags::empty())?;
        match walker.root.as_ref().map(crate::file_type) {
            Some(FileType::RegularFile) => Ok(walker),
            Some(FileType::Directory) => Err(Failure::new("read", path, Errno::ISDIR)),
            _ => Err(Failure::new("read", path, Errno::INVAL)),
        }
    }

    fn open(path: &[u8], follow: OFlags) -> Result<Self, Failure> {
        let failed = |error| Failure::new("read", path, error);
        if !is_path(path) {
            return Err(failed(Errno::INVAL));
        }
        let flags = if follow.is_empty() { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
        let stat = rustix::fs::statat(CWD, path, flags).map_err(failed)?;
        let mut walker = Self { root: None, levels: Vec::new(), file: None, path: path.to_vec() };
        let (entry, found) = look(CWD, &string(path), &stat, follow).map_err(failed)?;
        walker.enter(found).map_err(failed)?;
        walker.root = Some(entry);
        Ok(walker)
    }

    /// What comes next. The contents of a file are appended to `out`, `room` bytes at most.
    ///
    /// # Errors
    /// [`Failure`]; the walk is over then.
    pub fn next(&mut self, out: &mut Vec<u8>, room: usize) -> Result<Step, Failure> {
        if let Some(root) = self.root.take() {
            return Ok(Step::Entry(root));
        }
        if let Some(file) = &mut self.file {
            match file.read(out, room) {
                Ok(0) => self.file = None,
                Ok(bytes) => return Ok(Step::Data(bytes)),
                Err(error) => return Err(Failure::new("read", &self.path, error)),
            }
        }
        loop {
            let Some(level) = self.levels.last_mut() else { return Ok(Step::End) };
            self.path.truncate(level.path_bytes);
            let Some(name) = level.next_name().map_err(|error| Failure::new("read", &self.path, error))?
            else {
                self.levels.pop();
                continue;
            };
            self.path.push(b'/');
            self.path.extend_from_slice(name.as_bytes());
            match self.step_into(&name) {
                Ok(entry) => return Ok(Step::Entry(entry)),
                // It was there a moment ago, or was something else.
                Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO) => {}
                Err(error) => return Err(Failure::new("read", &self.path, error)),
            }
        }
    }

    fn step_into(&mut self, name: &CString) -> Result<Entry, Errno> {
        let Some(level) = self.levels.last() else { return Err(Errno::NOENT) };
        let stat = rustix::fs::statat(&level.directory, name.as_c_str(), AtFlags::SYMLINK_NOFOLLOW)?;
        let (entry, found) = look(&level.directory, name, &stat, OFlags::NOFOLLOW)?;
        let depth = self.levels.len() as u32;
        self.enter(found)?;
        Ok(Entry { depth, name: name.as_bytes().to_vec(), ..entry })
    }

    /// Has what is in it come next.
    fn enter(&mut self, found: Found) -> Result<(), Errno> {
        match found {
            Found::Directory(directory, device) => self.descend(directory, device)?,
            Found::File(contents) => self.file = Some(contents),
            Found::Nothing => {}
        }
        Ok(())
    }

    fn descend(&mut self, directory: OwnedFd, device: u64) -> Result<(), Errno> {
        if let Some(above) = self.levels.last()
            && above.device != device
            && MADE_UP.contains(&(rustix::fs::fstatfs(&directory)?.f_type as u64))
        {
            return Ok(());
        }
        if self.levels.len() >= MAX_DEPTH {
            return Err(Errno::NAMETOOLONG);
        }
        self.levels.push(Level { directory, device, names: Vec::new(), path_bytes: self.path.len() });
        Ok(())
    }
}

impl Level {
    fn next_name(&mut self) -> Result<Option<CString>, Errno> {
        if self.names.is_empty() {
            let mut buffer = Vec::with_capacity(ENTRIES_BYTES);
            let mut entries = RawDir::new(&self.directory, buffer.spare_capacity_mut());
            while let Some(entry) = entries.next() {
                let entry = entry?;
                let name = entry.file_name();
                if name != c"." && name != c".." && name.count_bytes() <= MAX_NAME_BYTES {
                    self.names.push(name.into());
                }
                if entries.is_buffer_empty() && !self.names.is_empty() {
                    break;
                }
            }
        }
        Ok(self.names.pop())
    }
}

impl Contents {
    fn read(&mut self, out: &mut Vec<u8>, room: usize) -> Result<usize, Errno> {
        let most = self.left.map_or(room, |left| room.min(usize::try_from(left).unwrap_or(usize::MAX)));
        if most == 0 {
            return Ok(0);
        }
        let start = out.len();
        out.resize(start + most, 0);
        let read = loop {
            match rustix::io::read(&self.file, &mut out[start..]) {
                Err(Errno::INTR) => {}
                read => break read,
            }
        };
        out.truncate(start + read.unwrap_or(0));
        if let (Ok(bytes), Some(left)) = (read, &mut self.left) {
            *left -= bytes as u64;
        }
        read
    }
}

/// What is in something that was found.
enum Found {
    /// A directory, and the device it is on.
    Directory(OwnedFd, u64),
    File(Contents),
    Nothing,
}

/// Opens what has this name.
fn look(directory: impl AsFd, name: &CString, stat: &Stat, follow: OFlags) -> Result<(Entry, Found), Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY | follow;
    let open = |flags| rustix::fs::openat(&directory, name.as_c_str(), flags, Mode::empty());
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let directory = open(flags | OFlags::DIRECTORY)?;
            let stat = rustix::fs::fstat(&directory)?;
            Ok((entry(&stat), Found::Directory(directory, stat.st_dev)))
        }
        FileType::RegularFile => {
            let file = open(flags)?;
            let stat = rustix::fs::fstat(&file)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(Errno::NXIO);
            }
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            let contents = Contents { file, left: (size > 0).then_some(size) };
            Ok((Entry { size, ..entry(&stat) }, Found::File(contents)))
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(&directory, name.as_c_str(), Vec::new())?;
            Ok((Entry { target: target.into_bytes(), ..entry(stat) }, Found::Nothing))
        }
        _ => Ok((entry(stat), Found::Nothing)),
    }
}

fn entry(stat: &Stat) -> Entry {
    Entry {
        depth: 0,
        name: vec![],
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_s: stat.st_mtime,
        mtime_ns: stat.st_mtime_nsec as u32,
        size: 0,
        target: vec![],
    }
}
