//! The power page: how the guest says that it is done, that it failed, or that its agent listens.
//!
//! 32-bit registers at [`crate::layout::POWER_PAGE`]. The agent maps the page, so a store from guest user mode reaches
//! the monitor without the guest kernel on the way. The same numbers are in `kiln_protocol::power`.

/// Written with a code: turn the machine off.
pub const POWER_OFF: u64 = 0x0;
/// Written with a code: the guest reports a failure it cannot survive.
pub const NOTICE: u64 = 0x4;
/// Written with a phase.
pub const DOORBELL: u64 = 0x8;
/// Reads as [`MAGIC_VALUE`].
pub const MAGIC: u64 = 0xc;
/// "KILN".
pub const MAGIC_VALUE: u32 = 0x4e4c_494b;

/// The agent ran its first instruction.
pub const PHASE_STARTED: u32 = 1;
/// The agent listens on its port.
pub const PHASE_READY: u32 = 2;
/// The agent is parked: the machine is to stand still.
pub const PHASE_PARKED: u32 = 3;
/// The agent has taken its mail.
pub const PHASE_RESUMED: u32 = 4;
/// The guest is who the mail says.
pub const PHASE_ADOPTED: u32 = 5;
/// A restored guest could not become who the mail says.
pub const NOTICE_NOT_ADOPTED: u32 = 0x42;

/// What the guest asked for by a store to the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Turn the machine off.
    PowerOff(u32),
    /// The guest reports a failure it cannot survive.
    Notice(u32),
    /// The agent reached a phase of its life.
    Doorbell(u32),
}

/// What a store of `value` at `offset` asks for.
pub(crate) fn write(offset: u64, value: u32) -> Option<Request> {
    match offset {
        POWER_OFF => Some(Request::PowerOff(value)),
        NOTICE => Some(Request::Notice(value)),
        DOORBELL => Some(Request::Doorbell(value)),
        _ => None,
    }
}

/// What a load at `offset` reads.
pub(crate) fn read(offset: u64) -> Option<u32> {
    (offset == MAGIC).then_some(MAGIC_VALUE)
}
