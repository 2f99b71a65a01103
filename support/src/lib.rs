//! Code that has never heard of virtual machines: digests, durable files, locks, framing.
#![forbid(unsafe_code)]

pub mod digest;
pub mod durable;
pub mod lock;
pub mod sparse;
