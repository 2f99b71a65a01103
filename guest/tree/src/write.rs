//! Makes a tree of entries.

use alloc::ffi::CString;
use alloc::vec::Vec;

use kiln_protocol::Entry;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;

use crate::place::string;
use crate::{Failure, MAX_DEPTH, MAX_NAME_BYTES, MAX_PATH_BYTES, Place, file_type, is_name};

/// What a file is called until it is complete; 16 hexadecimal digits follow.
const ASIDE: &[u8] = b".kiln-";
/// How many names are tried for it: the second is already next to never needed.
const MAX_NAMES: usize = 8;

/// Whose files are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Whoever makes them.
    Maker,
    /// This user and group.
    Of(u32, u32),
    /// Whoever the entry says.
    Kept,
}

/// What a tree may be at most, and of each mode what is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Entries.
    pub entries: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Bits of `st_mode` that are kept: `0o777` leaves set-id bits out.
    pub mode: u32,
}

/// What a tree was made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
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

/// Makes a tree of entries as they come: each directory before what is in it, each file before its contents.
///
/// ```text
/// entry ─▶ directory: open until an entry that is not in it
///       ├▶ link: made at once
///       └▶ file: written aside ──data──▶ ... ──entry, finish──▶ renamed
///                                └────────drop────────▶ gone
/// ```
#[derive(Debug)]
pub struct Writer {
    place: Place,
    owner: Owner,
    limits: Limits,
    counts: Counts,
    begun: bool,
    /// The directories that are open, outermost first.
    levels: Vec<Level>,
    file: Option<Aside>,
    /// The path of what is being made from the root on, for messages.
    path: Vec<u8>,
}

#[derive(Debug)]
struct Level {
    directory: OwnedFd,
    /// It was made for this entry, which is still to give it its mode, owner and time.
    made_for: Option<Entry>,
    /// How long the path of the directory is.
    path_bytes: usize,
}

/// A file that is not complete.
#[derive(Debug)]
struct Aside {
    file: OwnedFd,
    directory: OwnedFd,
    name: CString,
    to: CString,
    entry: Entry,
}

impl Writer {
    /// A tree to be made at a place.
    pub fn new(place: Place, owner: Owner, limits: Limits) -> Self {
        let path = place.path.clone();
        Self {
            place,
            owner,
            limits,
            counts: Counts::default(),
            begun: false,
            levels: Vec::new(),
            file: None,
            path,
        }
    }

    /// Makes what an entry stands for; the file before it is complete.
    ///
    /// # Errors
    /// What the kernel reports; `INVAL` for an entry out of place, `FBIG` and `NAMETOOLONG` beyond the limits.
    pub fn entry(&mut self, entry: Entry) -> Result<(), Failure> {
        self.complete_file()?;
        let depth = entry.depth as usize;
        let is_root = !self.begun && depth == 0;
        if !is_root && (depth == 0 || depth > self.levels.len()) {
            return Err(self.failed("make", Errno::INVAL));
        }
        self.begun = true;
        while self.levels.len() > depth {
            self.leave()?;
        }
        let Some(left) = self.limits.entries.checked_sub(1) else {
            return Err(self.failed("make", Errno::FBIG));
        };
        self.limits.entries = left;
        let name = if is_root {
            if self.place.is_directory && file_type(&entry) != FileType::Directory {
                return Err(self.failed("make", Errno::NOTDIR));
            }
            self.place.name.clone()
        } else {
            if let Some(level) = self.levels.last() {
                self.path.truncate(level.path_bytes);
            }
            self.path.push(b'/');
            self.path.extend_from_slice(&entry.name[..entry.name.len().min(MAX_NAME_BYTES)]);
            if !is_name(&entry.name) {
                return Err(self.failed("make", Errno::INVAL));
            }
            Some(string(&entry.name))
        };
        self.make(name.as_ref(), entry).map_err(|error| self.failed("make", error))
    }

    /// Writes what comes next of the last file.
    ///
    /// # Errors
    /// What the kernel reports; `INVAL` where there is no file, `FBIG` beyond the limit.
    pub fn data(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let Some(left) = self.limits.bytes.checked_sub(bytes.len() as u64) else {
            return Err(self.failed("write", Errno::FBIG));
        };
        self.limits.bytes = left;
        self.counts.bytes += bytes.len() as u64;
        let file = self.file.as_ref().ok_or_else(|| self.failed("write", Errno::INVAL))?;
        let mut rest = bytes;
        while !rest.is_empty() {
            match rustix::io::write(&file.file, rest) {
                Ok(written) => rest = &rest[written..],
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.failed("write", error)),
            }
        }
        Ok(())
    }

    /// Completes the tree; there has been at least a root.
    ///
    /// # Errors
    /// What the kernel reports; `INVAL` when nothing came.
    pub fn finish(mut self) -> Result<Counts, Failure> {
        if !self.begun {
            return Err(self.failed("make", Errno::INVAL));
        }
        self.complete_file()?;
        while !self.levels.is_empty() {
            self.leave()?;
        }
        Ok(self.counts)
    }

    fn failed(&self, action: &'static str, error: Errno) -> Failure {
        Failure::new(action, &self.path[..self.path.len().min(MAX_PATH_BYTES)], error)
    }

    /// Makes what an entry stands for under this name, in the innermost directory that is open. Only the root can be without
    /// a name: it is there then.
    fn make(&mut self, name: Option<&CString>, entry: Entry) -> Result<(), Errno> {
        let directory = self.levels.last().map_or(&self.place.directory, |level| &level.directory);
        match (file_type(&entry), name) {
            (FileType::Directory, name) => {
                if self.levels.len() >= MAX_DEPTH {
                    return Err(Errno::NAMETOOLONG);
                }
                let (directory, is_new) = match name {
                    Some(name) => make_directory(directory, name)?,
                    None => (rustix::io::fcntl_dupfd_cloexec(directory, 0)?, false),
                };
                let made_for = is_new.then_some(entry);
                self.levels.push(Level { directory, made_for, path_bytes: self.path.len() });
                self.counts.directories += 1;
            }
            (FileType::RegularFile, Some(name)) => {
                self.file = Some(Aside::make(directory, name, entry)?);
                self.counts.files += 1;
            }
            (FileType::Symlink, Some(name)) => {
                self.make_link(directory.as_fd(), name, &entry)?;
                self.counts.links += 1;
            }
            (FileType::RegularFile | FileType::Symlink, None) => return Err(Errno::ISDIR),
            _ => self.counts.skipped += 1,
        }
        Ok(())
    }

    fn make_link(&self, directory: BorrowedFd<'_>, name: &CString, entry: &Entry) -> Result<(), Errno> {
        if entry.target.is_empty() || entry.target.len() > MAX_PATH_BYTES || entry.target.contains(&0) {
            return Err(Errno::INVAL);
        }
        let ((), aside) =
            aside(|aside| rustix::fs::symlinkat(entry.target.as_slice(), directory, aside.as_c_str()))?;
        let aside = aside.as_c_str();
        let made = (|| {
            if let Some((uid, gid)) = self.owner_of(entry) {
                rustix::fs::chownat(directory, aside, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            rustix::fs::utimensat(directory, aside, &times(entry), AtFlags::SYMLINK_NOFOLLOW)?;
            rustix::fs::renameat(directory, aside, directory, name.as_c_str())
        })();
        if made.is_err() {
            let _ = rustix::fs::unlinkat(directory, aside, AtFlags::empty());
        }
        made
    }

    /// Gives the last file its name.
    fn complete_file(&mut self) -> Result<(), Failure> {
        let Some(aside) = self.file.take() else { return Ok(()) };
        let completed = self.settle(aside.file.as_fd(), &aside.entry).and_then(|()| {
            let directory = &aside.directory;
            rustix::fs::renameat(directory, aside.name.as_c_str(), directory, aside.to.as_c_str())
        });
        completed.map_err(|error| self.failed("make", error))?;
        // It has its name now, and there is nothing to take away.
        aside.keep();
        Ok(())
    }

    /// Leaves the innermost directory that is open.
    fn leave(&mut self) -> Result<(), Failure> {
        let Some(level) = self.levels.pop() else { return Ok(()) };
        self.path.truncate(level.path_bytes);
        match &level.made_for {
            Some(entry) => {
                self.settle(level.directory.as_fd(), entry).map_err(|error| self.failed("make", error))
            }
            None => Ok(()),
        }
    }

    /// Gives what has been made its owner, mode and time: in this order, for a new owner takes set-id bits away.
    fn settle(&self, file: BorrowedFd<'_>, entry: &Entry) -> Result<(), Errno> {
        if let Some((uid, gid)) = self.owner_of(entry) {
            rustix::fs::fchown(file, Some(uid), Some(gid))?;
        }
        rustix::fs::fchmod(file, Mode::from_raw_mode(entry.mode & self.limits.mode & 0o7777))?;
        if entry.mtime_s == 0 && entry.mtime_ns == 0 {
            return Ok(());
        }
        rustix::fs::futimens(file, &times(entry))
    }

    fn owner_of(&self, entry: &Entry) -> Option<(Uid, Gid)> {
        let (uid, gid) = match self.owner {
            Owner::Maker => return None,
            Owner::Of(uid, gid) => (uid, gid),
            Owner::Kept => (entry.uid, entry.gid),
        };
        // Both are -1 for chown(2), which is: leave it.
        (uid != u32::MAX && gid != u32::MAX).then(|| (Uid::from_raw(uid), Gid::from_raw(gid)))
    }
}

impl Aside {
    fn make(directory: &OwnedFd, to: &CString, entry: Entry) -> Result<Self, Errno> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let kept = rustix::io::fcntl_dupfd_cloexec(directory, 0)?;
        let (file, name) =
            aside(|name| rustix::fs::openat(directory, name.as_c_str(), flags, Mode::RUSR | Mode::WUSR))?;
        Ok(Self { file, directory: kept, name, to: to.clone(), entry })
    }

    /// Leaves it where it is.
    fn keep(mut self) {
        self.name = CString::default();
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if !self.name.is_empty() {
            let _ = rustix::fs::unlinkat(&self.directory, self.name.as_c_str(), AtFlags::empty());
        }
    }
}

/// Makes something under a name that nothing has.
fn aside<T>(make: impl Fn(&CString) -> Result<T, Errno>) -> Result<(T, CString), Errno> {
    let mut made = Err(Errno::EXIST);
    for _ in 0..MAX_NAMES {
        let mut random = [0; 8];
        rustix::rand::getrandom(&mut random, GetRandomFlags::empty())?;
        let digits = random.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        let mut name = ASIDE.to_vec();
        name.extend(digits.map(|digit| b"0123456789abcdef"[usize::from(digit)]));
        let name = string(&name);
        match make(&name) {
            Err(Errno::EXIST) => made = Err(Errno::EXIST),
            other => return other.map(|made| (made, name)),
        }
    }
    made
}

/// Makes a directory that only its maker can use as yet, or opens the one that is there; says whether it is new.
fn make_directory(above: &OwnedFd, name: &CString) -> Result<(OwnedFd, bool), Errno> {
    let is_new = match rustix::fs::mkdirat(above, name.as_c_str(), Mode::RWXU) {
        Ok(()) => true,
        Err(Errno::EXIST) => false,
        Err(error) => return Err(error),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(above, name.as_c_str(), flags, Mode::empty()) {
        // A link, wherever it leads, is in the way like anything else that is no directory.
        Err(Errno::LOOP) => Err(Errno::NOTDIR),
        opened => Ok((opened?, is_new)),
    }
}

fn times(entry: &Entry) -> Timestamps {
    let omitted = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
    let nanoseconds = entry.mtime_ns.min(999_999_999).into();
    let modified = Timespec { tv_sec: entry.mtime_s, tv_nsec: nanoseconds };
    Timestamps { last_access: omitted, last_modification: modified }
}
