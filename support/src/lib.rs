//! Code that has never heard of virtual machines: digests, durable files, locks, errors in words.
#![forbid(unsafe_code)]

pub mod causes;
pub mod digest;
pub mod durable;
pub mod from_start;
pub mod lock;
pub mod sparse;
pub mod word;
