//! The words spoken between a host process and the monitor of one virtual machine.
//!
//! A host process makes a `SOCK_SEQPACKET` pair, starts the monitor with one end as its standard input, and speaks one
//! message a packet; files travel beside a message as descriptors (`SCM_RIGHTS`), so that the monitor never opens a path.
//! The first packet is [`Start`], or [`Files`] that it needs. When the host's end closes, the monitor ends and its machine
//! with it. The monitor trusts its host for intent, not for form: each packet is checked whole before anything is done.

#![forbid(unsafe_code)]

mod channel;
mod message;

pub use channel::{Channel, ChannelError};
pub use message::*;

/// The most bytes of one packet.
pub const MAX_PACKET_BYTES: usize = 128 << 10;
/// The most bytes of a guest's console that are kept, and that one packet carries.
pub const MAX_CONSOLE_BYTES: usize = 64 << 10;
/// The most descriptors beside one packet; the kernel's own limit is 253 (`SCM_MAX_FD`).
pub const MAX_PACKET_FDS: usize = 240;
/// The most descriptors of one [`Start`], those of [`Files`] before it among them: the layers of the longest image, two
/// each, and what else a machine is made of.
pub const MAX_START_FDS: usize = 300;
