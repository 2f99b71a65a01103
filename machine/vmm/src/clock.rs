//! The clock times are reported in.

use rustix::time::{ClockId, clock_gettime};

/// Host `CLOCK_MONOTONIC` in nanoseconds; the same clock in every process of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nanoseconds(pub u64);

/// Now.
pub fn monotonic() -> Nanoseconds {
    read(ClockId::Monotonic)
}

/// What the host's wall clock says, since 1970-01-01 UTC.
pub(crate) fn realtime() -> Nanoseconds {
    read(ClockId::Realtime)
}

fn read(clock: ClockId) -> Nanoseconds {
    let now = clock_gettime(clock);
    Nanoseconds(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
}
