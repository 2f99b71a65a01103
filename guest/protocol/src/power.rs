//! The power device: one page of 32-bit registers at [`GPA`](crate::POWER_GPA) through which the agent speaks to
//! the monitor without the guest kernel. A store there from user mode leaves the guest at once.

/// Written with a code: the machine powers off. The code is for the record; commands report theirs by `Exited`.
pub const OFF: usize = 0x0;
/// Written with a code: what comes next is no orderly end (agent or kernel panic, or a reset).
pub const NOTICE: usize = 0x4;
/// Written with a phase: the agent has come this far.
pub const DOORBELL: usize = 0x8;
/// Reads as [`MAGIC_VALUE`] when the device is there.
pub const MAGIC: usize = 0xc;
/// "KILN" in little-endian ASCII.
pub const MAGIC_VALUE: u32 = 0x4e4c_494b;
/// The size of the page, in bytes.
pub const PAGE_BYTES: usize = 4096;

/// Doorbell phase: the agent's first instructions ran.
pub const PHASE_STARTED: u32 = 1;
/// Doorbell phase: the agent listens on its vsock port.
pub const PHASE_LISTENING: u32 = 2;
/// Doorbell phase: the agent is parked. It goes on when there is mail in the [mailbox](crate::mailbox).
pub const PHASE_PARKED: u32 = 3;
/// Doorbell phase: the agent has taken its mail and acknowledged it, and nothing else yet.
pub const PHASE_RESUMED: u32 = 4;
/// Doorbell phase: the guest is the one the mail says; only now user processes run.
pub const PHASE_ADOPTED: u32 = 5;

/// Notice code: the agent panicked; the guest kernel will follow, because process 1 ends.
pub const NOTICE_AGENT_PANIC: u32 = 0x41;
/// Notice code: a restored guest could not take on its new identity, and ends before any user process runs.
pub const NOTICE_NOT_ADOPTED: u32 = 0x42;
