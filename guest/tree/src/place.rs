//! Where a tree goes: the directory that its root is made in, and the root's name there.

use alloc::ffi::CString;
use alloc::vec::Vec;

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::{Failure, is_name, is_path};

/// How the root of a tree is named at its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming<'a> {
    /// As the destination says. The directories above it are made where they are missing.
    Exact,
    /// As `docker cp` has it: into the destination under this name if that is a directory, and as the destination otherwise,
    /// whose directory must be there.
    Into(&'a [u8]),
    /// The contents of the root go into the destination if that is a directory; otherwise it is made one.
    Contents,
}

/// Where a tree goes.
#[derive(Debug)]
pub struct Place {
    pub(crate) directory: OwnedFd,
    /// The root's name in `directory`; `None` when that is to be the root.
    pub(crate) name: Option<CString>,
    /// Only a directory may have that name: the destination ended in a slash.
    pub(crate) is_directory: bool,
    /// The path of the root, for messages.
    pub(crate) path: Vec<u8>,
}

impl Place {
    /// Looks a destination up, as a shell would: links of its path are followed.
    ///
    /// # Errors
    /// What the kernel reports; `INVAL` for a path that is none, or ends in no name.
    pub fn find(path: &[u8], naming: Naming<'_>) -> Result<Self, Failure> {
        let failed = |error| Failure::new("use", path, error);
        if !is_path(path) {
            return Err(failed(Errno::INVAL));
        }
        if let Naming::Into(_) | Naming::Contents = naming {
            match open(path) {
                Ok(directory) => return Self::below(directory, path, naming),
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let (trimmed, is_directory) = trim(path);
        let (parent, name) = match trimmed.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&trimmed[..slash.max(1)], &trimmed[slash + 1..]),
            None => (&b"."[..], trimmed),
        };
        if !is_name(name) || (is_directory && naming == Naming::Exact) {
            return Err(failed(Errno::INVAL));
        }
        let directory = match open(parent) {
            Err(Errno::NOENT) if naming == Naming::Exact => make(parent).and_then(|()| open(parent)),
            opened => opened,
        };
        Ok(Self {
            directory: directory.map_err(|error| Failure::new("use", parent, error))?,
            name: Some(string(name)),
            is_directory,
            path: trimmed.to_vec(),
        })
    }

    fn below(directory: OwnedFd, path: &[u8], naming: Naming<'_>) -> Result<Self, Failure> {
        let Naming::Into(name) = naming else {
            return Ok(Self { directory, name: None, is_directory: true, path: path.to_vec() });
        };
        if !is_name(name) {
            return Err(Failure::new("use", name, Errno::INVAL));
        }
        let path = [path, b"/", name].concat();
        Ok(Self { directory, name: Some(string(name)), is_directory: false, path })
    }
}

/// A path without the slashes and dots at its end that say that it is a directory, and whether there were any.
fn trim(path: &[u8]) -> (&[u8], bool) {
    let mut rest = path;
    while rest.len() > 1 && (rest.ends_with(b"/") || rest.ends_with(b"/.")) {
        rest = &rest[..rest.len() - 1];
    }
    (rest, rest.len() < path.len())
}

fn open(path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::open(path, flags, Mode::empty())
}

/// Makes the directory `path` and those above it, as far as they are missing.
fn make(path: &[u8]) -> Result<(), Errno> {
    let ends = (1..path.len()).filter(|at| path[*at] == b'/').chain([path.len()]);
    for end in ends {
        match rustix::fs::mkdirat(CWD, &path[..end], Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A name that was checked, and so has no NUL.
pub(crate) fn string(name: &[u8]) -> CString {
    CString::new(name).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_that_it_is_a_directory_is_trimmed() {
        for (path, trimmed) in [
            ("a", ("a", false)),
            ("a/", ("a", true)),
            ("/a//.", ("/a", true)),
            ("/a/./", ("/a", true)),
            ("/", ("/", false)),
            ("//", ("/", true)),
            ("a.", ("a.", false)),
            ("/..", ("/..", false)),
        ] {
            let (rest, is_directory) = trim(path.as_bytes());
            assert_eq!((core::str::from_utf8(rest), is_directory), (Ok(trimmed.0), trimmed.1), "{path}");
        }
    }
}
