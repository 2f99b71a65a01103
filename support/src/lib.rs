//! Code that has never heard of virtual machines: digests, durable files, framing.
#![forbid(unsafe_code)]

pub mod digest;
pub mod durable;
pub mod sparse;
