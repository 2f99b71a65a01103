//! What a machine uses, inside and on its host.

use std::fs;
use std::time::Duration;

use kiln_protocol::{Call, Measure, Measured, Outcome, Signal};

use super::target::{AskError, Target};
use crate::agent::AgentError;

/// What a machine uses at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    /// In its guest, as the guest says: a guest that lies here deceives its owner alone.
    pub guest: GuestStats,
    /// On the host.
    pub host: HostStats,
}

/// What a guest uses, as its kernel tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestStats {
    /// Memory it has, in bytes, without what its kernel took at its start.
    pub memory_bytes: u64,
    /// Of that, what is in use and could not be had at once.
    pub memory_used_bytes: u64,
    /// Processes of its users, a reaper among them.
    pub processes: u32,
    /// Processor time of all that ran in it, its kernel's own work among it; what a template used is in it, too.
    pub cpu_time: Duration,
    /// Its `CLOCK_MONOTONIC`, which begins with its template's and stands still between a snapshot and what is made of it.
    pub uptime: Duration,
}

/// What the process uses that a machine is, as the host's kernel tells. Zero for one that has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostStats {
    /// Memory that is mapped and there, in bytes; what it shares with others from the same snapshot is in it.
    pub resident_bytes: u64,
    /// Of that, what it shares with nobody, nor with a file: what would be free again without it.
    pub private_bytes: u64,
    /// The most that has been resident.
    pub resident_peak_bytes: u64,
    /// Processor time, the guest's among it.
    pub cpu_time: Duration,
}

impl HostStats {
    /// What a process uses. Costs three small reads of `/proc`.
    pub(crate) fn of(process_id: u32) -> Self {
        let read = |name: &str| fs::read_to_string(format!("/proc/{process_id}/{name}")).unwrap_or_default();
        Self::from_tables(&read("statm"), &read("status"), &read("stat"))
    }

    /// [`private_bytes`](Self::private_bytes) alone, for one small read.
    pub(crate) fn private_bytes_of(process_id: u32) -> u64 {
        let statm = fs::read_to_string(format!("/proc/{process_id}/statm")).unwrap_or_default();
        Self::from_tables(&statm, "", "").private_bytes
    }

    /// Linux man pages `proc_pid_statm(5)`, `proc_pid_status(5)` and `proc_pid_stat(5)`.
    fn from_tables(statm: &str, status: &str, stat: &str) -> Self {
        let page_bytes = rustix::param::page_size() as u64;
        let mut pages = statm.split_ascii_whitespace().skip(1).map(|word| word.parse().unwrap_or(0_u64));
        let (resident, shared) = (pages.next().unwrap_or(0), pages.next().unwrap_or(0));
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let peak = peak.and_then(|peak| peak.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        // Its name, the second word, is in brackets, and anything may be in it.
        let times = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
        let ticks: u64 = times.skip(11).take(2).map(|word| word.parse().unwrap_or(0_u64)).sum();
        let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
        Self {
            resident_bytes: resident.saturating_mul(page_bytes),
            private_bytes: resident.saturating_sub(shared).saturating_mul(page_bytes),
            resident_peak_bytes: peak.unwrap_or(0).saturating_mul(1024),
            cpu_time: Duration::from_micros(ticks.saturating_mul(1_000_000) / ticks_per_second),
        }
    }
}

impl From<Measured> for GuestStats {
    fn from(measured: Measured) -> Self {
        let Measured { memory_bytes, memory_used_bytes, cpu_us, processes, uptime_us } = measured;
        Self {
            memory_bytes,
            memory_used_bytes,
            processes,
            cpu_time: Duration::from_micros(cpu_us),
            uptime: Duration::from_micros(uptime_us),
        }
    }
}

/// What a guest uses.
pub(crate) async fn guest(machine: Target<'_>) -> Result<GuestStats, AskError> {
    match machine.ask(Call::Measure(Measure {})).await?.0 {
        Outcome::Measured(measured) => Ok(measured.into()),
        _ => Err(AgentError::Broken("a reply that does not answer what was asked").into()),
    }
}

/// Sends a signal to every process of a guest.
pub(crate) async fn signal(machine: Target<'_>, number: u32) -> Result<(), AskError> {
    match machine.ask(Call::Signal(Signal { number })).await?.0 {
        Outcome::Done(_) => Ok(()),
        _ => Err(AgentError::Broken("a reply that does not answer what was asked").into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_uses_is_read_whatever_it_is_called() {
        let page_bytes = rustix::param::page_size() as u64;
        let ticks = rustix::param::clock_ticks_per_second();
        let stat = format!("7 (a) (b) c) S 1 1 1 0 -1 4 1 1 0 0 {ticks} {ticks} 5 5 20 0");
        let stats = HostStats::from_tables("100 10 4 0 0 0 0\n", "Name:\tx\nVmHWM:\t    2048 kB\n", &stat);
        let expected = HostStats {
            resident_bytes: 10 * page_bytes,
            private_bytes: 6 * page_bytes,
            resident_peak_bytes: 2 << 20,
            cpu_time: Duration::from_secs(2),
        };
        assert_eq!(stats, expected);
        assert_eq!(HostStats::from_tables("", "", ""), HostStats::default());
        assert_eq!(HostStats::from_tables("x y z", "VmHWM: much", "7 (a"), HostStats::default());
    }

    #[test]
    fn this_process_uses_something() {
        let stats = HostStats::of(std::process::id());
        assert!(stats.private_bytes > 0 && stats.private_bytes <= stats.resident_bytes, "{stats:?}");
        assert!(stats.resident_peak_bytes > 0, "{stats:?}");
        assert_eq!(HostStats::of(u32::MAX), HostStats::default());
    }
}
