//! Whether the host has the memory for another machine, by what machines of the pool were seen to take.
//!
//! A machine's memory is a ceiling and no commitment: pages are the host's until the guest writes to them. So what a machine takes is
//! measured when it comes back, and the most of late is what the next is expected to take.

use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};

use super::PoolError;
use crate::HostStats;

/// What a machine is expected to take before one was measured, in bytes.
const FIRST_GUESS_BYTES: u64 = 16 << 20;
/// What is left to the host whatever machines are wanted, in bytes.
const RESERVE_BYTES: u64 = 128 << 20;
/// More than the kernel keeps to itself of what lies idle, in bytes.
const KERNELS_BYTES: u64 = 1 << 30;
/// A measurement that is lower than what was expected counts for one part in so many.
const FORGETTING: u64 = 8;

#[derive(Debug)]
pub(super) struct Admission {
    expected_bytes: AtomicU64,
}

impl Default for Admission {
    fn default() -> Self {
        Self { expected_bytes: AtomicU64::new(FIRST_GUESS_BYTES) }
    }
}

impl Admission {
    /// Refuses to have so many machines made at a time where the host has no room for them.
    pub(super) fn check(&self, making: usize) -> Result<(), PoolError> {
        let expected_bytes = self.expected_bytes.load(Ordering::Relaxed).saturating_mul(making.max(1) as u64);
        let needed_bytes = expected_bytes.saturating_add(RESERVE_BYTES);
        if idle_bytes() >= needed_bytes.saturating_add(KERNELS_BYTES) {
            return Ok(());
        }
        // A host that does not say what it has is believed to have it.
        let Some(available_bytes) = available_bytes() else { return Ok(()) };
        if available_bytes >= needed_bytes {
            return Ok(());
        }
        Err(PoolError::Memory { needed_bytes, available_bytes })
    }

    /// Takes note of what the machine of this process takes.
    pub(super) fn measure(&self, process_id: u32) {
        let Some(bytes) = own_bytes(process_id) else { return };
        // Two at a time may lose one of the measurements.
        let expected = self.expected_bytes.load(Ordering::Relaxed);
        self.expected_bytes.store(next(expected, bytes), Ordering::Relaxed);
    }
}

fn next(expected: u64, measured: u64) -> u64 {
    if measured >= expected { measured } else { expected - (expected - measured) / FORGETTING }
}

/// What the host uses for nothing, which is known in a microsecond.
fn idle_bytes() -> u64 {
    let host = rustix::system::sysinfo();
    host.freeram.saturating_mul(host.mem_unit.into())
}

/// What the host can give without taking from anybody. Linux `Documentation/filesystems/proc.rst`, "meminfo".
fn available_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The memory that a process has and shares with nobody, nor with a file, while it lives.
fn own_bytes(process_id: u32) -> Option<u64> {
    Some(HostStats::private_bytes_of(process_id)).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_machines_take_is_learned_at_once_and_forgotten_slowly() {
        assert_eq!(next(16, 100), 100);
        assert_eq!(next(100, 20), 90);
        let mut expected = 1 << 30;
        for _ in 0..100 {
            expected = next(expected, 1 << 20);
        }
        assert!(expected < 2 << 20, "{expected}");
    }

    #[test]
    fn a_host_without_room_refuses_with_numbers() {
        let admission = Admission::default();
        assert!(admission.check(1).is_ok());
        admission.expected_bytes.store(u64::MAX / 2, Ordering::Relaxed);
        let refused = admission.check(1);
        assert!(matches!(refused, Err(PoolError::Memory { needed_bytes, available_bytes })
            if needed_bytes > available_bytes && available_bytes > 0));
    }

    #[test]
    fn what_lies_idle_can_be_had() {
        let (idle, available) = (idle_bytes(), available_bytes().expect("there is a /proc"));
        assert!((1 << 20..available).contains(&(idle / 2)), "{idle} of {available}");
    }

    #[test]
    fn this_process_takes_something_of_its_own() {
        assert!(own_bytes(std::process::id()).expect("there is a /proc") > 4096);
        assert_eq!(own_bytes(u32::MAX), None);
    }
}
