//! File trees on their way between the host and a guest: [`Walker`] takes one apart into entries, and [`Writer`] makes one of
//! them again. Both ends use both: the host walks what it copies in and the agent writes it, and the other way round.
//!
//! An entry names one component below a directory that came before it and is still open, so there is no path to check and none
//! to get out by: every name is looked up in a directory that is open, and no link is followed on the way. A file or link gets
//! its name when it is complete, in the place of what has that name; a directory that is there stays as it is and is added to.
//!
//! Neither end has to hold still: what vanishes while it is walked is left out, and what grows is cut at the size it had.
//! Extended attributes and hard links are not kept, nor are holes. Devices, fifos and sockets are counted and left out.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod place;
#[cfg(test)]
mod tests;
mod walk;
mod write;

use alloc::vec::Vec;

use kiln_protocol::Entry;
use rustix::fs::FileType;
use rustix::io::Errno;

pub use place::{Naming, Place};
pub use walk::{Step, Walker};
pub use write::{Counts, Limits, Owner, Writer};

/// How deep a tree may be: a directory is open for each level of it, at either end.
pub const MAX_DEPTH: usize = 100;
/// The longest name. Linux `NAME_MAX`.
pub const MAX_NAME_BYTES: usize = 255;
/// The longest path, without the NUL that ends it. Linux man page `path_resolution(7)`.
pub const MAX_PATH_BYTES: usize = 4095;

/// What could not be done with which file of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What was tried, such as `read`.
    pub action: &'static str,
    /// The file: its path from the root of the tree on, or a whole one where the tree is to be.
    pub path: Vec<u8>,
    /// What the kernel said. `NAMETOOLONG` and `INVAL` stand for what the limits and the rules of a tree refuse, too.
    pub error: Errno,
}

impl Failure {
    fn new(action: &'static str, path: &[u8], error: Errno) -> Self {
        Self { action, path: path.to_vec(), error }
    }
}

/// What kind of file an entry is.
pub fn file_type(entry: &Entry) -> FileType {
    FileType::from_raw_mode(entry.mode)
}

/// Whether `name` is one component of a path, and not one that leads elsewhere.
pub fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME_BYTES
        && name != b"."
        && name != b".."
        && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

/// Whether `path` can be handed to the kernel.
fn is_path(path: &[u8]) -> bool {
    !path.is_empty() && path.len() <= MAX_PATH_BYTES && !path.contains(&0)
}
