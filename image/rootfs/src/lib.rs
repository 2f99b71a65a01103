//! From layer tar streams to EROFS images and merged root file systems.
//!
//! [`write_layer()`] turns one layer into one image, once. [`merge()`] puts the metadata of several such images together
//! into one small object, whose files' block addresses point into `[merged metadata][layer 1 image][layer 2 image]...`:
//! a machine gets that concatenation as one read-only disk, and no file data is ever copied. [`scratch()`] makes the
//! empty writable disk that goes on top.
//!
//! All of it is synchronous, needs no privileges and runs no other programs. Archives and images are hostile input.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is how a test fails"))]

mod emit;
mod format;
mod layer;
mod merge;
mod paths;
mod read;
mod scratch;
mod sink;
mod tar;
mod tree;
mod xattr;

pub use layer::{LayerError, LayerSummary, Limits, write_layer, write_layer_within};
pub use merge::{MergeError, MergeSummary, merge};
pub use read::{LayerReader, ReadError};
pub use scratch::{SCRATCH_BYTES_MAX, SCRATCH_BYTES_MIN, ScratchError, scratch};

/// Changes whenever the same archive would give other bytes than before: part of the key of whatever is kept.
pub const FORMAT_VERSION: u32 = 1;
