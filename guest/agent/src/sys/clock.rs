//! Time as it passes in one life of the guest.

use super::arch::{self, syscall};

/// The processor's time stamp counter, which costs no system call.
#[inline]
pub fn ticks() -> u64 {
    arch::ticks()
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub fn monotonic_ns() -> u64 {
    const MONOTONIC: usize = 1;
    clock_ns(MONOTONIC)
}

/// Nanoseconds since 1970-01-01 UTC.
pub fn realtime_ns() -> u64 {
    const REALTIME: usize = 0;
    clock_ns(REALTIME)
}

/// By a system call, as it is wanted seldom: to find the kernel's faster way (vdso(7)) costs more.
fn clock_ns(clock: usize) -> u64 {
    let mut now = [0_u64; 2];
    // SAFETY: the kernel writes a timespec, which is two words.
    let read = unsafe { syscall(arch::CLOCK_GETTIME, [clock, (&raw mut now).expose_provenance(), 0, 0, 0]) };
    // It does not fail for these clocks.
    read.map_or(0, |_| now[0] * 1_000_000_000 + now[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_clocks_run() {
        let (ticks_before, before) = (ticks(), monotonic_ns());
        assert!(before > 0);
        while monotonic_ns() == before {}
        assert!(ticks() > ticks_before && monotonic_ns() > before);
    }
}
