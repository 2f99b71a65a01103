//! What the guest uses, as its kernel tells.

use kiln_protocol::{Failed, Measured};
use rustix::fs::{CWD, Mode, OFlags, RawDir};
use rustix::io::Errno;

use alloc::vec::Vec;

use crate::failure::internal;
use crate::{files, sys};

/// A tick of processor time in microseconds: Linux tells them to users as hundredths of a second. Linux man page `proc_stat(5)`.
const TICK_US: u64 = 10_000;
/// What directory entries are read into at a time.
const ENTRIES_BYTES: usize = 4096;

/// What the guest uses at this moment. The kernel's tables are there once a command has been started; before, there is nothing
/// of a user's to count, and memory alone is told.
///
/// # Errors
/// What the kernel reports.
pub(crate) fn measure() -> Result<Measured, Failed> {
    let read = |path| files::read(path).map_err(|error| internal("read /proc", error));
    let (memory, times) = (read("/proc/meminfo")?, read("/proc/stat")?);
    let kib = |name| field(&memory, name).map(|kib| kib.saturating_mul(1024));
    let told = kib(b"MemTotal:").zip(kib(b"MemAvailable:"));
    let (total, available) = told.unwrap_or_else(|| {
        let info = rustix::system::sysinfo();
        let unit = u64::from(info.mem_unit.max(1));
        (info.totalram as u64 * unit, (info.freeram as u64 + info.bufferram as u64) * unit)
    });
    Ok(Measured {
        memory_bytes: total,
        memory_used_bytes: total.saturating_sub(available),
        cpu_us: busy_ticks(&times).saturating_mul(TICK_US),
        processes: processes().map_err(|error| internal("list the processes", error))?,
        uptime_us: sys::monotonic_ns() / 1000,
    })
}

/// The first number of a line that begins so.
fn field(table: &[u8], name: &[u8]) -> Option<u64> {
    let line = table.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(name))?;
    numbers(line).next()
}

/// The numbers of a line, as far as they are some.
fn numbers(line: &[u8]) -> impl Iterator<Item = u64> {
    let words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    words.map_while(|word| core::str::from_utf8(word).ok()?.parse().ok())
}

/// What of /proc/stat's first line is work: all but idle, iowait and steal, and what a guest of the guest's is counted twice for.
fn busy_ticks(times: &[u8]) -> u64 {
    let line = times.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let Some(line) = line.strip_prefix(b"cpu ") else { return 0 };
    let is_work = |index: usize| matches!(index, 0..=2 | 5 | 6);
    numbers(line)
        .enumerate()
        .filter(|(index, _)| is_work(*index))
        .map(|(_, ticks)| ticks)
        .fold(0, u64::saturating_add)
}

/// How many processes the commands' namespace has: its /proc is the agent's too.
fn processes() -> Result<u32, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::fs::openat(CWD, "/proc", flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut buffer = Vec::with_capacity(ENTRIES_BYTES);
    let mut entries = RawDir::new(&directory, buffer.spare_capacity_mut());
    let mut count = 0_u32;
    while let Some(entry) = entries.next() {
        let is_process = entry?.file_name().to_bytes().iter().all(u8::is_ascii_digit);
        count = count.saturating_add(is_process.into());
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_by_its_names_whatever_is_in_it() {
        let table = b"MemTotal:  2048 kB\nMemFree: 5 kB\nMemAvailable:     1000 kB\n";
        assert_eq!(field(table, b"MemAvailable:"), Some(1000));
        assert_eq!(field(table, b"MemTotal:"), Some(2048));
        for odd in
            [&b""[..], b"MemTotal:", b"MemTotal: x", b"MemTotal: -1", b"MemTotal: 99999999999999999999"]
        {
            assert_eq!(field(odd, b"MemTotal:"), None);
        }
    }

    #[test]
    fn only_work_is_counted() {
        assert_eq!(busy_ticks(b"cpu  1 2 4 1000 1000 8 16 1000 1000 1000\ncpu0 9 9\n"), 31);
        for odd in [&b""[..], b"cpu", b"cpu0 1 2 3", b"cpu  x 2"] {
            assert_eq!(busy_ticks(odd), 0);
        }
        let most = u64::MAX;
        assert_eq!(busy_ticks(alloc::format!("cpu  {most} {most}\n").as_bytes()), most);
    }
}
