//! Files that exist whole or not at all, whatever is killed or loses power when.
//!
//! The one way to do it: write aside in the same file system, `fsync` the file, rename it into place, `fsync` the
//! directory. Until the rename nobody sees the file; after the last step it survives a power cut.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use rustix::io::Errno;

/// How often a name for a file written aside is tried before giving up; each try has 64 random bits.
const MAX_NAME_TRIES: usize = 16;

/// Writes `content` to the file at `path`, which is replaced when it exists.
///
/// The directory must exist. The file is `0o644` less the process's umask. When this returns, the file is on disk.
/// When it fails, or the process dies in the middle, what was at `path` before is still there, and at worst a file
/// named `.<name>.<random>.tmp` beside it.
///
/// # Errors
/// What the file system says; nothing half-written is left at `path`.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let (directory, name) = split(path)?;
    let (aside, mut file) = create_aside(directory, name)?;
    let written = file.write_all(content).and_then(|()| publish(&file, &aside, path));
    if written.is_err() {
        // The first failure is the one to report; the file aside is only litter.
        let _ = fs::remove_file(&aside);
    }
    written
}

/// Puts the finished `file`, which was written at `aside`, in place at `target`, on the same file system.
///
/// # Errors
/// What the file system says; then `target` is as it was, or the new file is there and may not survive a power cut.
pub fn publish(file: &File, aside: &Path, target: &Path) -> io::Result<()> {
    file.sync_all()?;
    fs::rename(aside, target)?;
    sync_directory(split(target)?.0)
}

/// Makes the names in the directory at `path` survive a power cut.
///
/// # Errors
/// What the file system says.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes the directory at `path` and those above it, on disk when this returns.
///
/// # Errors
/// What the file system says.
pub fn create_directories(path: &Path) -> io::Result<()> {
    match create_directory(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create_directories(split(path)?.0)?;
            // Once: where all above is there and it is still not found, as below /proc, nothing can be made.
            create_directory(path)
        }
        other => other,
    }
}

fn create_directory(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Ok(()) => sync_directory(split(path)?.0),
        Err(_) if path.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

/// A name of 16 hexadecimal digits that nobody else has.
///
/// # Errors
/// When the kernel has no random bytes to give.
pub fn random_name() -> io::Result<String> {
    let mut bytes = [0; 8];
    rustix::io::retry_on_intr(|| {
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
    })?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

fn create_aside(directory: &Path, name: &std::ffi::OsStr) -> io::Result<(std::path::PathBuf, File)> {
    for _ in 0..MAX_NAME_TRIES {
        let mut aside_name = std::ffi::OsString::from(".");
        aside_name.push(name);
        aside_name.push(format!(".{}.tmp", random_name()?));
        let aside = directory.join(aside_name);
        match OpenOptions::new().write(true).create_new(true).open(&aside) {
            Ok(file) => return Ok((aside, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(Errno::EXIST.into())
}

fn split(path: &Path) -> io::Result<(&Path, &std::ffi::OsStr)> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Ok((Path::new("."), name)),
        Some(parent) => Ok((parent, name)),
        None => Err(Errno::INVAL.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .expect("a directory")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_written_and_replaced_whole() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("record");
        write(&path, b"one").expect("written");
        write(&path, b"three").expect("replaced");
        assert_eq!(fs::read(&path).expect("read"), b"three");
        assert_eq!(names(directory.path()), ["record"]);
    }

    #[test]
    fn a_failed_write_leaves_nothing_behind() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("taken");
        fs::create_dir(&path).expect("made");
        fs::write(path.join("child"), b"").expect("written");
        assert!(write(&path, b"content").is_err());
        assert_eq!(names(directory.path()), ["taken"]);
        assert_eq!(names(&path), ["child"]);
    }

    #[test]
    fn directories_are_made_all_the_way_down() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a/b/c");
        create_directories(&path).expect("made");
        create_directories(&path).expect("there already");
        assert!(path.is_dir());
        fs::write(directory.path().join("file"), b"").expect("written");
        assert!(create_directories(&directory.path().join("file/x")).is_err());
        assert!(create_directories(Path::new("/proc/none/at/all")).is_err());
    }
}
