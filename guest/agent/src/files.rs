//! Files of the image, which can be anything an attacker likes: read with a limit, written as new files.

use alloc::vec;
use alloc::vec::Vec;

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::sys;

/// The most bytes read of any file.
const MAX_FILE_BYTES: usize = 8 << 20;

/// The contents of a regular file, or nothing when there is none.
///
/// # Errors
/// `FBIG` above 8 MiB, and what the kernel reports. What is no regular file counts as missing; opening it does not
/// wait (a fifo without writer) and takes no terminal.
pub(crate) fn read(path: &str) -> Result<Vec<u8>, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO | Errno::ACCESS) => return Ok(vec![]),
        Err(error) => return Err(error),
    };
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(vec![]);
    }
    let size = usize::try_from(stat.st_size).map_err(|_| Errno::FBIG)?;
    if size > MAX_FILE_BYTES {
        return Err(Errno::FBIG);
    }
    // Files of procfs have size 0, so there is always room for some more; a file that grows meanwhile is cut there.
    let most = size + 4096;
    let mut contents = Vec::new();
    while contents.len() < most {
        let rest = most - contents.len();
        let bytes = sys::read_onto(&file, &mut contents, rest)?;
        // A regular file comes whole, so no second call is made to hear that it has ended.
        if bytes == 0 || (size > 0 && contents.len() >= size) {
            break;
        }
    }
    Ok(contents)
}

/// The permissions of files that say nothing else.
const USUAL_MODE: u32 = 0o644;

/// Writes a new file in place of whatever was there (a link is replaced, not followed), and the directories above it.
///
/// # Errors
/// What the kernel reports, `ISDIR` for a directory among them.
pub(crate) fn replace(path: &str, contents: &[u8]) -> Result<(), Errno> {
    write(&make(path, USUAL_MODE)?, contents)
}

/// The same with these permissions (the lowest 12 bits), whatever the agent's umask.
///
/// # Errors
/// As [`replace`].
pub(crate) fn replace_with_mode(path: &str, mode: u32, contents: &[u8]) -> Result<(), Errno> {
    let file = make(path, 0o600)?;
    write(&file, contents)?;
    // Last, for the kernel takes set-id bits from a file that is written to.
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o7777))
}

/// Writes at the end of a regular file, which is at `offset`, and gives it these permissions.
///
/// # Errors
/// What the kernel reports; `INVAL` for what is no regular file or ends elsewhere, `LOOP` for a link.
pub(crate) fn continue_with_mode(path: &str, mode: u32, offset: u64, contents: &[u8]) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags | OFlags::NOCTTY, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    let is_regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if !is_regular || u64::try_from(stat.st_size) != Ok(offset) {
        return Err(Errno::INVAL);
    }
    write(&file, contents)?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o7777))
}

/// Removes a file or link; one that is not there is none to remove.
///
/// # Errors
/// What the kernel reports, `ISDIR` for a directory among them.
pub(crate) fn remove(path: &str) -> Result<(), Errno> {
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

fn make(path: &str, mode: u32) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(mode);
    remove(path)?;
    match rustix::fs::open(path, flags, mode) {
        Err(Errno::NOENT) => {
            let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
            make_directories(parent)?;
            rustix::fs::open(path, flags, mode)
        }
        opened => opened,
    }
}

fn write(file: &OwnedFd, contents: &[u8]) -> Result<(), Errno> {
    let mut rest = contents;
    while !rest.is_empty() {
        let written = rustix::io::write(file, rest)?;
        rest = &rest[written..];
    }
    Ok(())
}

/// Makes the directory `path` and those above it, as far as they are missing.
///
/// # Errors
/// What the kernel reports; `NOTDIR` when something else is in the way.
pub(crate) fn make_directories(path: &str) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(0o755);
    let ends = path.char_indices().skip(1).filter(|(_, letter)| *letter == '/').map(|(at, _)| at);
    for end in ends.chain([path.len()]) {
        match rustix::fs::mkdirat(CWD, &path[..end], mode) {
            Ok(()) | Err(Errno::EXIST) => {}
            // An empty path, or one like `/a//b`, where nothing is to be made.
            Err(Errno::NOENT) if path[..end].is_empty() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use alloc::format;
    use alloc::string::{String, ToString as _};
    use std::os::unix::fs::symlink;

    fn scratch() -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().to_str().expect("an ASCII path").to_string();
        (dir, path)
    }

    #[test]
    fn a_fifo_a_directory_and_a_device_read_as_nothing_at_once() {
        let (_dir, path) = scratch();
        let fifo = format!("{path}/fifo");
        rustix::fs::mknodat(CWD, fifo.as_str(), FileType::Fifo, Mode::RWXU, 0).expect("a fifo");
        for path in [fifo.as_str(), path.as_str(), "/dev/zero", "/no/such/file"] {
            assert_eq!(read(path), Ok(vec![]), "{path}");
        }
    }

    #[test]
    fn a_huge_file_is_refused_unread() {
        let (_dir, path) = scratch();
        let huge = format!("{path}/huge");
        let file = std::fs::File::create(&huge).expect("a file");
        file.set_len(1 << 40).expect("a sparse file");
        assert_eq!(read(&huge), Err(Errno::FBIG));
        file.set_len(MAX_FILE_BYTES as u64).expect("a sparse file");
        assert_eq!(read(&huge).map(|contents| contents.len()), Ok(MAX_FILE_BYTES));
    }

    #[test]
    fn a_file_without_a_size_is_read_to_its_end() {
        let status = read("/proc/self/status").expect("procfs");
        assert!(status.starts_with(b"Name:"));
    }

    #[test]
    fn a_link_is_replaced_and_not_followed() {
        let (_dir, path) = scratch();
        let (target, link) = (format!("{path}/target"), format!("{path}/link"));
        std::fs::write(&target, "untouched").expect("a file");
        symlink(&target, &link).expect("a link");
        assert_eq!(replace(&link, b"new"), Ok(()));
        assert_eq!(std::fs::read(&link).expect("the file"), b"new");
        assert_eq!(std::fs::read(&target).expect("the file"), b"untouched");
        assert!(std::fs::symlink_metadata(&link).expect("the file").is_file());
    }

    #[test]
    fn a_file_is_written_in_parts_that_follow_each_other() {
        let (_dir, path) = scratch();
        let file = format!("{path}/a/file");
        assert_eq!(replace_with_mode(&file, 0o4_751, b"one "), Ok(()));
        assert_eq!(continue_with_mode(&file, 0o4_751, 3, b"no"), Err(Errno::INVAL));
        assert_eq!(continue_with_mode(&file, 0o4_751, 4, b"two"), Ok(()));
        assert_eq!(std::fs::read(&file).expect("the file"), b"one two");
        let mode = rustix::fs::stat(file.as_str()).expect("the file").st_mode;
        assert_eq!(mode & 0o7_777, 0o4_751);
        let link = format!("{path}/link");
        symlink(&file, &link).expect("a link");
        assert_eq!(continue_with_mode(&link, 0o644, 7, b"no"), Err(Errno::LOOP));
        assert_eq!(remove(&link), Ok(()));
        assert_eq!(remove(&link), Ok(()));
        assert_eq!(replace_with_mode(&file, 0o600, b""), Ok(()));
        assert_eq!(std::fs::read(&file).expect("the file"), b"");
        let fifo = format!("{path}/fifo");
        rustix::fs::mknodat(CWD, fifo.as_str(), FileType::Fifo, Mode::RWXU, 0).expect("a fifo");
        assert!(continue_with_mode(&fifo, 0o644, 0, b"no").is_err());
    }

    #[test]
    fn missing_directories_are_made_and_present_ones_kept() {
        let (_dir, path) = scratch();
        assert_eq!(replace(&format!("{path}/a/b/file"), b"x"), Ok(()));
        assert_eq!(make_directories(&format!("{path}/a//b/../c/")), Ok(()));
        assert!(std::path::Path::new(&format!("{path}/a/c")).is_dir());
        assert_eq!(make_directories(&format!("{path}/a/b/file/d")), Err(Errno::NOTDIR));
        assert_eq!(make_directories(""), Ok(()));
    }
}
