//! The file that a saved machine is, its memory apart.
//!
//! ```text
//! header    320 bytes: what the machine needs of its host, readable by itself
//! table     96 bytes for each section: name, version, length, digest
//! sections  end to end, in the table's order, to the end of the file
//! ```
//!
//! A public interface, described in `docs/formats/snapshot.md`, and hostile input: each length is limited before anything is
//! read, each byte is covered by a digest, and what is not known is refused. The header is one small read, so that a host says no
//! to a snapshot that is not for it before it looks at anything else.

#![forbid(unsafe_code)]

mod diff;
mod header;
mod read;
mod write;

pub use diff::{DIFF_HEADER_BYTES, DIFF_VERSION, DiffError, RUNS_MAX, apply_diff, write_diff};
pub use header::{FORMAT_VERSION, HEADER_BYTES, Header, HeaderError, VMM_BYTES_MAX};
pub use read::{LoadError, read, read_header};
pub use write::{WriteError, write};

/// The most sections.
pub const SECTIONS_MAX: usize = 64;
/// The most bytes of one section.
pub const SECTION_BYTES_MAX: u64 = 1 << 20;
/// The most bytes of a section's name.
pub const NAME_BYTES_MAX: usize = 32;

/// The bytes of a section's place in the table.
const ENTRY_BYTES: usize = 96;

/// A named, versioned piece of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it is: lower-case letters, digits, `-` and `.`, at most [`NAME_BYTES_MAX`].
    pub name: String,
    /// The version of its content.
    pub version: u32,
    /// Its content.
    pub content: Vec<u8>,
}

/// Whether `name` may be a section's.
fn is_name(name: &[u8]) -> bool {
    let is_good =
        |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.iter().all(is_good)
}
