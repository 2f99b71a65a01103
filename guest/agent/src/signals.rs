//! What becomes of a signal to the command that is process 1 of its namespace.
//!
//! The kernel drops a signal to a process 1 that has set up nothing for it, which makes Ctrl-C of `docker run sleep`
//! useless. Here the signal does what it would do to any other process: what the kernel drops, SIGKILL stands in for.

use crate::files;

/// SIGTERM, which every process has the time to act on.
pub(crate) const SIGTERM: u32 = 15;
/// SIGKILL, which none has.
pub(crate) const SIGKILL: u32 = 9;
/// The highest signal there is. Linux man page signal(7).
const MAX_SIGNAL: u32 = 64;

/// Whether there is such a signal.
pub(crate) fn exists(number: u32) -> bool {
    (1..=MAX_SIGNAL).contains(&number)
}

/// What became of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The process takes it, or wants nothing of it.
    Received,
    /// It may yet be taken, or dropped: a process that starts another blocks all signals for a moment, one that reads them with
    /// signalfd(2) for good, and in sigwait(3) they are neither blocked nor handled.
    Open,
    /// The kernel has dropped it.
    Dropped,
}

/// What has become of a signal to process 1.
pub(crate) fn fate(number: u32) -> Fate {
    // On both sides of the other, for it is another process's doing, and that goes on.
    let waits = || files::read("/proc/1/syscall").is_ok_and(|syscall| waits(&syscall));
    let waited = waits();
    match files::read("/proc/1/status") {
        Ok(status) => fate_of(number, &status, waited || waits()),
        Err(_) => Fate::Received,
    }
}

/// The same of a process with this /proc/PID/status, which `waits` for signals or does not.
fn fate_of(number: u32, status: &[u8], waits: bool) -> Fate {
    let bit = 1_u64.checked_shl(number.wrapping_sub(1)).unwrap_or(0);
    let has = |name: &str| {
        let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name.as_bytes()));
        let mask = line.and_then(|mask| core::str::from_utf8(mask).ok());
        Some(u64::from_str_radix(mask?.trim(), 16).ok()? & bit != 0)
    };
    let set = |names: [&str; 2]| Some(has(names[0])? | has(names[1])?);
    match (set(["SigIgn:", "SigCgt:"]), set(["SigPnd:", "ShdPnd:"]), has("SigBlk:")) {
        (Some(false), Some(false), Some(false)) if !waits => Fate::Dropped,
        (Some(false), Some(_), Some(_)) => Fate::Open,
        _ => Fate::Received,
    }
}

/// Whether a process with this /proc/PID/syscall is in `rt_sigtimedwait(2)`, which sigwait(3) is.
fn waits(syscall: &[u8]) -> bool {
    let number = syscall.split(|byte| *byte == b' ').next();
    number.and_then(|number| core::str::from_utf8(number).ok()?.parse().ok())
        == Some(crate::sys::RT_SIGTIMEDWAIT)
}

/// Whether the default action of a signal is to end the process. Linux man page signal(7).
pub(crate) fn ends_a_process(number: u32) -> bool {
    /// CHLD, CONT, STOP, TSTP, TTIN, TTOU, URG, WINCH; KILL needs no help.
    const OTHERS: [u32; 9] = [SIGKILL, 17, 18, 19, 20, 21, 22, 23, 28];
    !OTHERS.contains(&number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    const TERM: u32 = 15;
    const BIT: u64 = 1 << (TERM - 1);

    fn fate(pending: u64, blocked: u64, ignored: u64, caught: u64) -> Fate {
        let status = format!(
            "Name:\tx\nSigPnd:\t0\nShdPnd:\t{pending:016x}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n",
        );
        fate_of(TERM, status.as_bytes(), false)
    }

    #[test]
    fn process_1_drops_only_what_it_has_set_up_nothing_for() {
        assert_eq!(fate(0, 0, 0, 0), Fate::Dropped);
        assert_eq!(fate(!BIT, !BIT, !BIT, !BIT), Fate::Dropped);
        assert_eq!(fate(0, 0, BIT, 0), Fate::Received);
        assert_eq!(fate(0, BIT, 0, BIT), Fate::Received);
        assert_eq!(fate_of(TERM, b"", false), Fate::Received);
        assert_eq!(fate_of(TERM, b"SigBlk:\tx\nSigIgn:\t0\nSigCgt:\t0\n", false), Fate::Received);
    }

    #[test]
    fn what_process_1_has_blocked_or_waits_for_it_may_yet_take() {
        assert_eq!(fate(0, BIT, 0, 0), Fate::Open);
        assert_eq!(fate(BIT, BIT, 0, 0), Fate::Open);
        assert_eq!(fate(BIT, 0, 0, 0), Fate::Open);
        let none = b"SigPnd:\t0\nShdPnd:\t0\nSigBlk:\t0\nSigIgn:\t0\nSigCgt:\t0\n";
        assert_eq!(fate_of(TERM, none, true), Fate::Open);
        assert!(waits(b"128 0x7ffe 0x0\n"));
        assert!(!waits(b"running\n") && !waits(b"12 0x7ffe\n") && !waits(b""));
    }

    #[test]
    fn stopping_and_telling_signals_do_not_end_a_process() {
        assert!([1, 2, 3, 6, 10, 12, 13, 14, 15, 34, 64].into_iter().all(ends_a_process));
        assert!(![9, 17, 18, 19, 20, 21, 22, 23, 28].into_iter().any(ends_a_process));
    }
}
