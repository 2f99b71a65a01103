//! The words spoken between the host and the agent inside a guest.
//!
//! One vsock stream carries one [`Request`]. The host connects to [`AGENT_PORT`], sends the request, and reads the
//! answer; for an exec the stream then carries the command's streams until [`Exited`]. When the stream drops the
//! command is killed, so a request is never carried out twice. Everything is a frame ([`frame`]): a 4-byte
//! little-endian payload length, a kind byte, the payload. Neither side trusts the other: lengths are checked
//! before anything is read, and a frame out of place ends the stream.
//!
//! Flow control: a sender may have at most the credit granted to it outstanding on each stream. Each stream starts
//! with [`INITIAL_CREDIT_BYTES`]; the receiver grants more as its own reader takes the bytes, so a slow reader holds
//! up the command and not the host's memory.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod frame;
pub mod mailbox;
mod message;
pub mod power;
mod reader;

pub use message::*;
pub use reader::Reader;

/// The vsock port on which the agent accepts requests; it is bound before any user process runs.
pub const AGENT_PORT: u32 = 1024;
/// The vsock port of the host's at which an agent that has no doorbell knocks when it listens. It is always refused: that it
/// tried is all there is to say.
pub const READY_PORT: u32 = 1024;
/// The context id of the host. VIRTIO 1.2 §5.10 "Socket Device".
pub const HOST_CID: u32 = 2;
/// The most bytes a frame's payload may have.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;
/// The most bytes one data frame may carry; small enough that a control frame never waits long behind it.
pub const MAX_DATA_BYTES: usize = 32 << 10;
/// The most bytes that one [`WriteFile`] writes; small enough that the agent takes each part with the memory of the last, for
/// fresh memory costs a guest more than a message does.
pub const MAX_FILE_PART_BYTES: usize = 32 << 10;
/// The most bytes of a file that is written by [`WriteFile`].
pub const MAX_FILE_BYTES: u64 = 1 << 30;
/// The most files that are written before a command starts, in the request for it.
pub const MAX_STAGED_FILES: usize = 64;
/// The most commands that follow one in the same request.
pub const MAX_CHAIN: usize = 64;
/// What a sender may send on a stream before the receiver has granted anything.
pub const INITIAL_CREDIT_BYTES: u64 = 256 << 10;
/// The guest physical address of the power device's page: exit codes, panic notice and the doorbell.
pub const POWER_GPA: u64 = 0xd000_0000;
